// Similarity or distance of two residual streams on the GPU: a block per token, then one block for the mean.
#include "common.cuh"

namespace adapt_pruner::cuda {
namespace {

constexpr int kTokenThreads = 256;
constexpr int64_t kStep = kTokenThreads * kChunk;
constexpr int kMeanThreads = 1024;

struct Sums {  // of products (cosine), or the first alone of squared or absolute differences
  float dot, square_in, square_out;
};

template <Metric metric>
__device__ inline void accumulate(const float* x, const float* y, Sums* sums) {
#pragma unroll
  for (int k = 0; k < kChunk; ++k) {
    if constexpr (metric == kCosine) {
      sums->dot += x[k] * y[k];
      sums->square_in += x[k] * x[k];
      sums->square_out += y[k] * y[k];
    } else if constexpr (metric == kEuclidean) {
      sums->dot += (x[k] - y[k]) * (x[k] - y[k]);
    } else {
      sums->dot += fabsf(x[k] - y[k]);
    }
  }
}

template <Metric metric>
__device__ inline float value_of_token(float dot, float square_in, float square_out) {
  if constexpr (metric == kCosine) {
    const float eps = static_cast<float>(kCosineEps);
    // a norm that overflows must not pass for orthogonality: zero times infinity is NaN
    return dot / fmaxf(sqrtf(square_in), eps) / fmaxf(sqrtf(square_out), eps) +
           0.0f * (square_in + square_out);
  }
  return metric == kEuclidean ? sqrtf(dot) : dot;
}

template <Metric metric>
__global__ void __launch_bounds__(kTokenThreads)
    token_values(const Matrix h_in, const Matrix h_out, const bool aligned, const int64_t hidden,
                 float* __restrict__ per_token) {
  __shared__ float shared[3][kTokenThreads / kWarp];
  const int64_t token = blockIdx.x;
  Sums sums = {0.0f, 0.0f, 0.0f};
  const auto add = [&](const Chunk& chunk_in, const Chunk& chunk_out) {
    float x[kChunk], y[kChunk];
    convert(chunk_in, h_in.dtype, x);
    convert(chunk_out, h_out.dtype, y);
    accumulate<metric>(x, y, &sums);
  };
  int64_t col = int64_t(threadIdx.x) * kChunk;
  for (; aligned && col + kStep + kChunk <= hidden; col += 2 * kStep) {  // four loads in flight
    Chunk in[2], out[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      in[k] = load_chunk(h_in, true, token, col + k * kStep, kChunk);
      out[k] = load_chunk(h_out, true, token, col + k * kStep, kChunk);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) add(in[k], out[k]);
  }
  for (; col < hidden; col += kStep) {
    add(load_chunk(h_in, aligned, token, col, hidden - col),
        load_chunk(h_out, aligned, token, col, hidden - col));
  }
  const float dot = block_sum<kTokenThreads>(sums.dot, shared[0]);
  const float square_in = metric == kCosine ? block_sum<kTokenThreads>(sums.square_in, shared[1]) : 0.0f;
  const float square_out = metric == kCosine ? block_sum<kTokenThreads>(sums.square_out, shared[2]) : 0.0f;
  if (threadIdx.x == 0) per_token[token] = value_of_token<metric>(dot, square_in, square_out);
}

__global__ void __launch_bounds__(kMeanThreads)
    mean_of_tokens(const float* __restrict__ per_token, const int64_t tokens, float* __restrict__ result) {
  __shared__ double shared[kMeanThreads / kWarp];
  double sum = 0.0;
  for (int64_t token = threadIdx.x; token < tokens; token += kMeanThreads) sum += per_token[token];
  sum = block_sum<kMeanThreads>(sum, shared);
  if (threadIdx.x == 0) *result = static_cast<float>(sum / double(tokens));
}

template <Metric metric>
int launch(const Matrix& h_in, const Matrix& h_out, int64_t tokens, int64_t hidden, float* result,
           float* per_token, void* stream) {
  const bool aligned = rows_aligned(h_in) && rows_aligned(h_out);
  if (tokens > kMaxGridX) return cudaErrorInvalidValue;
  AP_LAUNCH(token_values<metric>, static_cast<unsigned>(tokens), kTokenThreads, stream, h_in, h_out, aligned,
            hidden, per_token);
  const int error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  AP_LAUNCH(mean_of_tokens, 1u, kMeanThreads, stream, per_token, tokens, result);
  return cudaGetLastError();
}

}  // namespace
}  // namespace adapt_pruner::cuda

int ap_cuda_residual_similarity(adapt_pruner::Matrix h_in, adapt_pruner::Matrix h_out, int64_t tokens,
                                int64_t hidden, int32_t metric, float* result, float* scratch, void* stream) {
  using namespace adapt_pruner;
  if (metric == kEuclidean)
    return cuda::launch<kEuclidean>(h_in, h_out, tokens, hidden, result, scratch, stream);
  if (metric == kManhattan)
    return cuda::launch<kManhattan>(h_in, h_out, tokens, hidden, result, scratch, stream);
  return cuda::launch<kCosine>(h_in, h_out, tokens, hidden, result, scratch, stream);
}
