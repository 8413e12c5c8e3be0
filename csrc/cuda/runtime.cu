// The little of the CUDA runtime that the registration needs; it includes no CUDA headers itself.
#include "common.cuh"

int ap_cuda_runtime_version() { return CUDART_VERSION; }

int ap_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

const char* ap_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int ap_cuda_upload(void* target, const void* source, int64_t bytes, void* stream) {
  if (bytes == 0) return cudaSuccess;
  // a graph would copy again from memory that is gone by then
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  if (error != cudaSuccess) return error;
  if (status != cudaStreamCaptureStatusNone) return cudaErrorStreamCaptureUnsupported;
  return cudaMemcpyAsync(target, source, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                         static_cast<cudaStream_t>(stream));
}
