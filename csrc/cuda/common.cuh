// What the CUDA kernels share: launching, loading eight elements of any dtype as fp32, sums over a block.
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
constexpr int64_t kMaxGridY = 65535;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct alignas(16) Vector16 {
  uint32_t words[4];
};

// Both halves of a word are elements; the lower one comes first.
__device__ inline void unpack(uint32_t word, int32_t dtype, float* values) {
  if (dtype == kBFloat16) {
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xffff0000u);
  } else {
    values[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
    values[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  }
}

__device__ inline float load_one(const void* data, int32_t dtype, int64_t i) {
  if (dtype == kFloat32) return static_cast<const float*>(data)[i];
  float pair[2];
  unpack(static_cast<const uint16_t*>(data)[i], dtype, pair);
  return pair[0];
}

// values[k] = element i + k for k < count, 0 beyond. Whole chunks of aligned matrices are loaded in vectors;
// the branches are the same for all threads of a block, except at the end of a row.
__device__ inline void load_chunk(const Matrix& matrix, bool aligned, int64_t i, int count, float* values) {
  if (!aligned || count < kChunk) {
#pragma unroll
    for (int k = 0; k < kChunk; ++k)
      values[k] = k < count ? load_one(matrix.data, matrix.dtype, i + k) : 0.0f;
    return;
  }
  if (matrix.dtype == kFloat32) {
    const Vector16* vectors = reinterpret_cast<const Vector16*>(static_cast<const float*>(matrix.data) + i);
    const Vector16 low = vectors[0], high = vectors[1];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      values[k] = __uint_as_float(low.words[k]);
      values[k + 4] = __uint_as_float(high.words[k]);
    }
    return;
  }
  const Vector16 packed = *reinterpret_cast<const Vector16*>(static_cast<const uint16_t*>(matrix.data) + i);
#pragma unroll
  for (int k = 0; k < 4; ++k) unpack(packed.words[k], matrix.dtype, values + 2 * k);
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

}  // namespace adapt_pruner::cuda
