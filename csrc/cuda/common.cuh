// What the CUDA kernels share: launching persistent grids, finding one's work in a table, loading eight
// elements of any dtype, sums over a block.
//
// Compiled by g++ against an emulation of CUDA the same files run on the CPU, which is how their logic is
// tested without a GPU; hence AP_LAUNCH instead of <<<>>>.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define AP_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "cuda_emulation.h"
#define AP_LAUNCH(kernel, grid, block, stream, ...) \
  cuda_emulation::launch(dim3(grid), dim3(block), [=] { kernel(__VA_ARGS__); })
#endif

#include <cstdint>

#include "../kernels.h"

namespace adapt_pruner::cuda {

constexpr int kWarp = 32;
constexpr int kChunk = 8;  // elements that a thread loads at once: 16 bytes of fp16 or bf16, 32 of fp32
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMaxGridX = 2147483647;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Launches a kernel whose blocks loop over `items` of work: as many blocks as the device runs at a time, at
// most one per item.
template <class... Parameters, class... Arguments>
int launch_persistent(void (*kernel)(Parameters...), int threads, int64_t items, void* stream,
                      Arguments... arguments) {
  int device = 0, multiprocessors = 0, blocks = 0;
  int error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
  if (error != cudaSuccess) return error;
  const unsigned grid = static_cast<unsigned>(smaller(items, int64_t(multiprocessors) * blocks));
  AP_LAUNCH(kernel, grid, threads, stream, arguments...);
  return cudaGetLastError();
}

// The last entry of a table whose `first` is at most `item`; these ascend from 0.
template <auto first, class Entry>
__device__ inline const Entry& entry_of(const Entry* table, int64_t entries, int64_t item) {
  int64_t low = 0, high = entries;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (table[middle].*first <= item ? low : high) = middle;
  }
  return table[low];
}

// A pointer from a table, of which the compiler cannot know that it is one to global memory.
template <class T>
__device__ inline T* in_global(T* pointer) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

struct alignas(16) Vector16 {
  uint32_t words[4];
};

// kChunk elements as they lie in memory; fp32 alone needs `high`. All bits 0 is 0 in every dtype.
struct Chunk {
  Vector16 low, high;
};

__device__ inline int element_bytes(const Matrix& matrix) { return matrix.dtype == kFloat32 ? 4 : 2; }

// The rest of a matrix that starts at an element.
__device__ inline Matrix from(const Matrix& matrix, int64_t row, int64_t col) {
  const int64_t bytes = (row * matrix.row_stride + col) * element_bytes(matrix);
  return {static_cast<const char*>(matrix.data) + bytes, matrix.row_stride, matrix.dtype};
}

// Elements of a row from `col` on, 0 from the `count`-th on. Whole chunks of aligned matrices are loaded in
// vectors.
__device__ inline Chunk load_chunk(const Matrix& matrix, bool aligned, int64_t row, int64_t col,
                                   int64_t count) {
  Chunk chunk = {};
  const bool wide = matrix.dtype == kFloat32;
  const char* data = in_global(static_cast<const char*>(matrix.data));
  const char* first = data + (row * matrix.row_stride + col) * element_bytes(matrix);
  if (aligned && count >= kChunk) {
    const Vector16* vectors = reinterpret_cast<const Vector16*>(first);
    chunk.low = vectors[0];
    if (wide) chunk.high = vectors[1];
    return chunk;
  }
#pragma unroll
  for (int k = 0; k < kChunk; ++k) {
    if (k >= count) continue;
    if (wide) {
      (k < 4 ? chunk.low : chunk.high).words[k % 4] = reinterpret_cast<const uint32_t*>(first)[k];
    } else {
      chunk.low.words[k / 2] |= uint32_t(reinterpret_cast<const uint16_t*>(first)[k]) << (16 * (k % 2));
    }
  }
  return chunk;
}

__device__ inline float half_value(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ inline void convert(const Chunk& chunk, int32_t dtype, float* values) {
  if (dtype == kFloat32) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      values[k] = __uint_as_float(chunk.low.words[k]);
      values[k + 4] = __uint_as_float(chunk.high.words[k]);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {  // both halves of a word are elements; the lower one comes first
    const uint32_t word = chunk.low.words[k];
    values[2 * k] = dtype == kBFloat16 ? __uint_as_float(word << 16) : half_value(word & 0xffffu);
    values[2 * k + 1] = dtype == kBFloat16 ? __uint_as_float(word & 0xffff0000u) : half_value(word >> 16);
  }
}

// Whether every row starts at a multiple of 16 bytes; so does an absent matrix.
inline bool rows_aligned(const Matrix& matrix) {
  const int64_t size = matrix.dtype == kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.row_stride * size % 16 == 0;
}

template <class T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// The sum over the block in thread 0, in an order fixed by kThreads. `shared` holds one value per warp and
// may be used again only after a barrier.
template <int kThreads, class T>
__device__ inline T block_sum(T value, T* shared) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x < kWarp) value = warp_sum(threadIdx.x < kThreads / kWarp ? shared[threadIdx.x] : T(0));
  return value;
}

// For each lane the sum of its values in all warps of the block, in their order; `shared` can be used again.
template <int kWarps>
__device__ inline double sum_over_warps(double value, double (*shared)[kWarp]) {
  const int lane = threadIdx.x % kWarp;
  shared[threadIdx.x / kWarp][lane] = value;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp][lane];
  __syncthreads();
  return sum;
}

}  // namespace adapt_pruner::cuda
