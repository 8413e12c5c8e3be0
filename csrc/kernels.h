// The C interface between the kernels (no torch headers, compiled by g++ or nvcc) and their registration.
//
// Every matrix has contiguous rows. A bias of n entries is a 1 x n matrix whose unit dimension is 1.
#pragma once

#include <cstdint>

namespace adapt_pruner {

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

enum Mode : int32_t {
  kFirst = 0,
  kVectorize = 1,
  kSecond = 2,
  kMixed = 3,
  kMagnitudeL1 = 4,
  kMagnitudeL2 = 5
};

enum Metric : int32_t { kCosine = 0, kEuclidean = 1, kManhattan = 2 };

constexpr bool reads_grad(Mode mode) { return mode == kFirst || mode == kVectorize || mode == kMixed; }
constexpr bool reads_fisher(Mode mode) { return mode == kSecond || mode == kMixed; }

// torch.nn.functional.cosine_similarity clamps each norm to this
constexpr double kCosineEps = 1e-8;

struct Matrix {
  const void* data;    // null where a mode does not read it
  int64_t row_stride;  // in elements
  int32_t dtype;
};

struct ImportanceMember {
  Matrix weight;
  Matrix grad;
  Matrix fisher;
  int64_t rows;
  int64_t cols;
  int64_t group_size;  // indices per unit along the unit dimension
  int64_t first_unit;  // of the member's set of units in the scores of all sets
  int32_t dim;         // the unit dimension: 0 rows, 1 columns
};

struct GatherMember {
  const void* source;
  void* target;               // contiguous
  int64_t source_row_stride;  // in elements
  int64_t rows;               // of the source
  int64_t cols;               // of the source
  int64_t group_size;
  int32_t dim;
  int32_t element_size;  // 1, 2, 4 or 8 bytes
};

}  // namespace adapt_pruner

extern "C" {

typedef void (*ApRangeBody)(int64_t begin, int64_t end, void* context);
// Runs body over [0, count), in pieces of at least `grain`, on any number of threads.
typedef void (*ApParallelFor)(int64_t count, int64_t grain, ApRangeBody body, void* context);

// ---- CPU ------------------------------------------------------------------------------------------------

const char* ap_cpu_isa();

void ap_cpu_unit_importance(const adapt_pruner::ImportanceMember* members, int64_t member_count, int32_t mode,
                            int64_t units, float* scores, ApParallelFor parallel_for);

// Merges the columns of x, [tokens, cols], into their running mean, centred second moment and count.
void ap_cpu_activation_stats(adapt_pruner::Matrix x, int64_t tokens, int64_t cols, double* mean, double* m2,
                             int64_t* count, ApParallelFor parallel_for);

void ap_cpu_gather_units(const adapt_pruner::GatherMember* members, int64_t member_count, const int64_t* keep,
                         int64_t kept, ApParallelFor parallel_for);

void ap_cpu_residual_similarity(adapt_pruner::Matrix h_in, adapt_pruner::Matrix h_out, int64_t tokens,
                                int64_t hidden, int32_t metric, float* result, ApParallelFor parallel_for);

// For `bench kernels`, see cpu/roofline.cpp. The exclusive or of both buffers, each `bytes` long.
uint64_t ap_cpu_roofline_read(const void* first, const void* second, int64_t bytes, bool ahead,
                              ApParallelFor parallel_for);

// `target` is aligned to a cache line.
void ap_cpu_roofline_copy(void* target, const void* source, int64_t bytes, bool streaming,
                          ApParallelFor parallel_for);

// ---- CUDA: data are in device memory, the members themselves in host memory; work is queued on `stream`,
// 0 or a cudaError_t is returned

int ap_cuda_runtime_version();
int ap_cuda_driver_version();
const char* ap_cuda_error_string(int error);

// Queues a copy from pageable host memory; the source may be reused on return.
int ap_cuda_upload(void* target, const void* source, int64_t bytes, void* stream);

// A workspace is device memory aligned to 16 bytes, of as many bytes as asked for, in use until the work that
// was queued is done.
int64_t ap_cuda_importance_workspace_bytes(const adapt_pruner::ImportanceMember* members,
                                           int64_t member_count);

int ap_cuda_unit_importance(const adapt_pruner::ImportanceMember* members, int64_t member_count, int32_t mode,
                            int64_t units, float* scores, void* workspace, void* stream);

int64_t ap_cuda_gather_workspace_bytes(int64_t member_count, int64_t kept);

// keep is host memory
int ap_cuda_gather_units(const adapt_pruner::GatherMember* members, int64_t member_count, const int64_t* keep,
                         int64_t kept, void* workspace, void* stream);

int64_t ap_cuda_activation_workspace_bytes(int64_t tokens, int64_t cols);

int ap_cuda_activation_stats(adapt_pruner::Matrix x, int64_t tokens, int64_t cols, double* mean, double* m2,
                             int64_t* count, void* workspace, void* stream);

// scratch: one float per token
int ap_cuda_residual_similarity(adapt_pruner::Matrix h_in, adapt_pruner::Matrix h_out, int64_t tokens,
                                int64_t hidden, int32_t metric, float* result, float* scratch, void* stream);
}
