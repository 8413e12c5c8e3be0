// Runs CUDA kernels on the CPU, to test their logic without a GPU: the .cu files include this header instead
// of the toolkit's when g++ compiles them.
//
// Every CUDA thread of a block is a fiber with its own stack. A fiber runs until it reaches a barrier or a
// shuffle; the scheduler resumes the fibers in an order shuffled by the seed, so that code which relies on an
// order, because a barrier is missing, gives different results for different seeds. A barrier that not all
// threads reach ends the launch with an error.
//
// The emulated device has as many multiprocessors as a test wants, each running one block at a time.
//
// Not covered: tensor cores, asynchronous copies, races within a warp's lockstep, and speed.
#pragma once

#ifndef __x86_64__
#error "the context switch below is written for x86-64"
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

typedef int cudaError_t;
enum {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
typedef void* cudaStream_t;
constexpr int CUDART_VERSION = 13000;

// Saves the callee-saved registers and the stack pointer, and continues where `load` was saved.
extern "C" void cuda_emulation_switch(void** save, void* load);
__asm__(
    ".text\n"
    ".weak cuda_emulation_switch\n"
    ".type cuda_emulation_switch, @function\n"
    "cuda_emulation_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size cuda_emulation_switch, . - cuda_emulation_switch\n");

namespace cuda_emulation {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 64 << 10;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  void* stack_pointer;
  State state;
  unsigned warp_mask;  // of the lanes it waits for
  dim3 thread;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  std::vector<uint64_t> exchanged;  // one word per thread, for shuffles
  std::function<void()> body;
  dim3 grid, block, block_index;
  void* scheduler = nullptr;
  int current = 0;
  std::minstd_rand random;
  int error = cudaSuccess;
  int multiprocessors = 8;
  int64_t launches = 0;
};

inline Machine machine;

inline void wait(State state) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
  cuda_emulation_switch(&fiber.stack_pointer, machine.scheduler);
}

inline void run_thread() {
  machine.body();
  wait(State::kDone);
  __builtin_unreachable();
}

inline void start_fibers() {
  const unsigned threads = machine.block.x * machine.block.y * machine.block.z;
  machine.fibers.resize(threads);
  machine.stacks.resize(threads * kStackBytes + 16);
  machine.exchanged.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    const uintptr_t top =
        reinterpret_cast<uintptr_t>(machine.stacks.data() + (i + 1) * kStackBytes) & ~uintptr_t(15);
    void** stack = reinterpret_cast<void**>(top);
    *--stack = nullptr;  // where the thread would return to; keeps the stack aligned at its entry
    *--stack = reinterpret_cast<void*>(&run_thread);
    stack -= 6;  // the registers that the switch restores; their values do not matter
    const dim3 thread(i % machine.block.x, i / machine.block.x % machine.block.y,
                      i / (machine.block.x * machine.block.y));
    machine.fibers[i] = {stack, State::kReady, 0, thread};
  }
}

// Barriers that all their threads have reached are opened; an exited thread counts as arrived at the block's.
inline bool open_barriers() {
  std::vector<Fiber>& fibers = machine.fibers;
  bool opened = false, block_complete = true, anyone_waits = false;
  for (const Fiber& fiber : fibers) {
    block_complete = block_complete && (fiber.state == State::kAtBlockBarrier || fiber.state == State::kDone);
    anyone_waits = anyone_waits || fiber.state == State::kAtBlockBarrier;
  }
  for (size_t i = 0; i < fibers.size(); ++i) {
    if (block_complete && anyone_waits && fibers[i].state == State::kAtBlockBarrier) {
      fibers[i].state = State::kReady;
      opened = true;
    }
    if (fibers[i].state != State::kAtWarpBarrier) continue;
    const size_t first = i / kWarpSize * kWarpSize;
    const unsigned mask = fibers[i].warp_mask;
    unsigned arrived = 0;
    for (size_t k = first; k < first + kWarpSize && k < fibers.size(); ++k) {
      if (fibers[k].state == State::kAtWarpBarrier && fibers[k].warp_mask == mask)
        arrived |= 1u << (k - first);
    }
    if (arrived != mask) continue;
    for (size_t k = first; k < first + kWarpSize; ++k) {
      if (mask >> (k - first) & 1) fibers[k].state = State::kReady;
    }
    opened = true;
  }
  return opened;
}

inline void run_block() {
  start_fibers();
  std::vector<int> order(machine.fibers.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  for (;;) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[machine.random() % i]);
    bool all_done = true;
    for (const int i : order) {
      Fiber& fiber = machine.fibers[i];
      if (fiber.state == State::kReady) {
        machine.current = i;
        cuda_emulation_switch(&machine.scheduler, fiber.stack_pointer);
      }
      all_done = all_done && fiber.state == State::kDone;
    }
    if (all_done) return;
    if (!open_barriers()) {
      machine.error = cudaErrorLaunchFailure;
      return;
    }
  }
}

template <class Body>
void launch(dim3 grid, dim3 block, Body body) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads < 1 || threads > 1024 || grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535) {
    machine.error = cudaErrorInvalidConfiguration;
    return;
  }
  ++machine.launches;
  machine.grid = grid;
  machine.block = block;
  machine.body = body;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const uint64_t first = machine.random() % blocks;  // blocks have no order either
  for (uint64_t b = 0; b < blocks && machine.error == cudaSuccess; ++b) {
    const uint64_t index = (first + b) % blocks;
    machine.block_index = dim3(unsigned(index % grid.x), unsigned(index / grid.x % grid.y),
                               unsigned(index / (uint64_t(grid.x) * grid.y)));
    run_block();
  }
}

// The value of another lane of the warp; all lanes of the mask must ask.
template <class T>
T exchange(unsigned mask, T value, int source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move up to 8 bytes");
  const int me = machine.current, first = me / kWarpSize * kWarpSize;
  std::memcpy(&machine.exchanged[me], &value, sizeof(T));
  machine.fibers[me].warp_mask = mask;
  wait(State::kAtWarpBarrier);
  if (mask >> source_lane & 1) std::memcpy(&value, &machine.exchanged[first + source_lane], sizeof(T));
  wait(State::kAtWarpBarrier);  // nobody overwrites a word that is still to be read
  return value;
}

}  // namespace cuda_emulation

#define threadIdx (cuda_emulation::machine.fibers[cuda_emulation::machine.current].thread)
#define blockIdx (cuda_emulation::machine.block_index)
#define blockDim (cuda_emulation::machine.block)
#define gridDim (cuda_emulation::machine.grid)

inline void __syncthreads() { cuda_emulation::wait(cuda_emulation::State::kAtBlockBarrier); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return cuda_emulation::exchange(mask, value, (cuda_emulation::machine.current % 32) ^ lanes);
}

struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half half) {
  _Float16 value;
  std::memcpy(&value, &half.bits, sizeof(value));
  return float(value);
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline int cudaGetLastError() {
  const int error = cuda_emulation::machine.error;
  cuda_emulation::machine.error = cudaSuccess;
  return error;
}

inline int cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_emulation::machine.multiprocessors;
  return cudaSuccess;
}
template <class Kernel>
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
inline int cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0 };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline int cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }

extern "C" inline __attribute__((used)) void cuda_emulation_seed(unsigned seed) {
  cuda_emulation::machine.random.seed(seed + 1);
}
extern "C" inline __attribute__((used)) void cuda_emulation_multiprocessors(int count) {
  cuda_emulation::machine.multiprocessors = count;
}
// of kernels, since the library was loaded
extern "C" inline __attribute__((used)) int64_t cuda_emulation_launches() {
  return cuda_emulation::machine.launches;
}
