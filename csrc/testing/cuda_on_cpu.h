// CUDA source on the CPU, for tests: the device code and the launchers of csrc/cuda, unchanged, run by g++.
//
// One block at a time; each of its threads is a fiber that runs until it meets a barrier or a warp collective. A thread
// whose barrier is missing therefore reads shared memory that its neighbours have not written yet: wrong results, not
// luck. A barrier that not all threads of a block reach, or a collective that not all lanes of a warp reach, is an
// exception of the launch that names the block, not a hang. paikern_on_cpu_without_barrier takes one barrier away by
// file and line, for tests that want to see it missed.
//
// Knows: indices, static and dynamic shared memory, __syncthreads and its counting forms, full-mask warp collectives,
// atomics, bit casts, population counts, rounded arithmetic, and the few runtime calls that launchers make. Does not
// know: tensor cores, asynchronous copies, cooperative groups, partial masks, real races, memory ordering, occupancy.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define PAIKERN_CUDA_ON_CPU 1
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __shared__ static  // one block at a time: its threads share it, and nobody else is there
#define __constant__ static
#define __launch_bounds__(...)
#define PK_DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(paikern::on_cpu::dynamic_shared())
#define PK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (static_cast<void>(stream), paikern::on_cpu::launch((grid), (block), (shared), [&] { (kernel)(__VA_ARGS__); }))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace paikern::on_cpu {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 1 << 16;

enum class Wait { kNone, kBlock, kWarp };

#if defined(__x86_64__)
// Two stack pointers and the registers that calls keep: swapcontext also asks the kernel for the signal mask, which
// takes ten times as long.
struct Context {
  void *stack = nullptr;
};
[[maybe_unused]] __attribute__((naked)) static void switch_stacks(void **, void *) {
  asm volatile(
      "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
}
inline void change(Context &from, Context &to) { switch_stacks(&from.stack, to.stack); }
inline void begin(Context &context, char *stack, void (*entry)()) {
  auto *top = reinterpret_cast<uintptr_t *>(stack + kStack - 72);  // as after a call: 8 off 16
  top[0] = 0;                                                      // where entry would return to: it does not
  top[-1] = reinterpret_cast<uintptr_t>(entry);                    // below it six registers
  context.stack = top - 7;
}
#else
struct Context {
  ucontext_t inside;
};
inline void change(Context &from, Context &to) { swapcontext(&from.inside, &to.inside); }
inline void begin(Context &context, char *stack, void (*entry)()) {
  getcontext(&context.inside);
  context.inside.uc_stack.ss_sp = stack;
  context.inside.uc_stack.ss_size = kStack;
  makecontext(&context.inside, entry, 0);
}
#endif

struct Fiber {
  Context context;
  char *stack = nullptr;
  Wait wait = Wait::kNone;
  bool done = false;
  void *fake_stack = nullptr;
};

struct Warp {
  uint64_t values[kWarp];
  uint64_t results[kWarp];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  const std::function<void()> *body = nullptr;
  Context scheduler;
  const char *error = nullptr;
  unsigned current = 0;
  int votes = 0, result = 0;  // of the counting barriers
  void *scheduler_fake = nullptr;
  const void *scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
};

inline Block *block = nullptr;

// Stacks live as long as the process and are never filled: pages that no kernel touches cost nothing.
inline char *stack_of(unsigned thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStack]);
  return stacks[thread].get();
}

[[noreturn]] inline void fail(const char *what) {
  const std::string where =
      std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z);
  block = nullptr;
  throw std::runtime_error("cuda_on_cpu: block (" + where + "): " + what);
}

inline void *dynamic_shared() { return block->shared.data(); }

inline unsigned linear_thread() { return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; }

// Leaves the fiber for the scheduler, until what it waits for has happened.
inline void pause(Wait wait) {
  Fiber &fiber = block->fibers[block->current];
  fiber.wait = wait;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber.fake_stack, block->scheduler_bottom, block->scheduler_size);
#endif
  change(fiber.context, block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block->fibers[block->current].fake_stack, nullptr, nullptr);
#endif
}

inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_bottom, &block->scheduler_size);
#endif
  (*block->body)();
  Fiber &fiber = block->fibers[block->current];
  fiber.done = true;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, block->scheduler_bottom, block->scheduler_size);
#endif
  change(fiber.context, block->scheduler);
}

// What a fiber finds wrong is thrown by the scheduler: an exception cannot leave a fiber.
inline void complain(const char *what) {
  block->error = what;
  for (;;) pause(Wait::kBlock);
}

inline void resume(unsigned index) {
  Fiber &fiber = block->fibers[index];
  block->current = index;
  threadIdx = dim3(index % blockDim.x, index / blockDim.x % blockDim.y, index / (blockDim.x * blockDim.y));
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block->scheduler_fake, fiber.stack, kStack);
#endif
  change(block->scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block->scheduler_fake, nullptr, nullptr);
#endif
}

// Whether every thread of [first, last) that is not done waits for `wait`; with none left, false.
inline bool arrived(unsigned first, unsigned last, Wait wait) {
  bool any = false;
  for (unsigned t = first; t < last; ++t) {
    const Fiber &fiber = block->fibers[t];
    if (fiber.done) continue;
    if (fiber.wait != wait) return false;
    any = true;
  }
  return any;
}

inline void release(unsigned first, unsigned last) {
  for (unsigned t = first; t < last; ++t) block->fibers[t].wait = Wait::kNone;
}

inline void prepare(Fiber &fiber) {
  fiber.wait = Wait::kNone;
  fiber.done = false;
  fiber.fake_stack = nullptr;
  begin(fiber.context, fiber.stack, entry);
}

// How the threads of a block take turns; results must not depend on it. 0: each up to its next barrier or collective.
// 1: the first warp as far as the next barrier, then the second. 2: the same from the last warp.
inline int turns = 0;

// Lets the threads of a warp run until each waits; whether any did.
inline bool run_warp(unsigned first, unsigned last) {
  bool progress = false;
  for (unsigned t = first; t < last; ++t) {
    if (block->fibers[t].done || block->fibers[t].wait != Wait::kNone) continue;
    resume(t);
    if (block->error != nullptr) fail(block->error);
    progress = true;
  }
  return progress;
}

// Ends the collective of a warp that all its threads have come to.
inline bool join_warp(unsigned first, unsigned last) {
  if (!arrived(first, last, Wait::kWarp)) return false;
  Warp &warp = block->warps[first / kWarp];
  std::memcpy(warp.results, warp.values, sizeof(warp.results));
  release(first, last);
  return true;
}

inline void run_block(unsigned threads) {
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  for (unsigned t = 0; t < threads; ++t) {
    block->fibers[t].stack = stack_of(t);
    prepare(block->fibers[t]);
  }
  for (;;) {
    bool progress = false, left = false;
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned w = turns == 2 ? warps - 1 - i : i;
      const unsigned first = w * kWarp, last = std::min(threads, first + kWarp);
      progress |= run_warp(first, last);
      while (turns != 0 && join_warp(first, last)) {
        run_warp(first, last);
        progress = true;
      }
    }
    for (unsigned t = 0; t < threads; ++t) left |= !block->fibers[t].done;
    if (!left) return;
    for (unsigned w = 0; w < warps; ++w) progress |= join_warp(w * kWarp, std::min(threads, (w + 1) * kWarp));
    if (arrived(0, threads, Wait::kBlock)) {
      block->result = block->votes;
      block->votes = 0;
      release(0, threads);
      progress = true;
    }
    if (!progress) fail("threads wait for a barrier or a warp collective that the others do not reach");
  }
}

inline void launch(dim3 grid, dim3 threads, size_t shared, const std::function<void()> &body) {
  Block own;
  const unsigned count = threads.x * threads.y * threads.z;
  if (count == 0 || count > 1024) fail("a block has 1 to 1024 threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) fail("an empty grid");
  own.fibers.resize(count);
  own.warps.resize((count + kWarp - 1) / kWarp);
  own.body = &body;
  block = &own;
  gridDim = grid;
  blockDim = threads;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        own.shared.assign(shared, 0xab);  // whatever was there before
        run_block(count);
      }
    }
  }
  block = nullptr;
}

// One value of every lane of the warp, after all of them gave theirs.
template <class T>
const uint64_t *exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) complain("only full-mask warp collectives are known here");
  const unsigned thread = linear_thread(), warp = thread / kWarp;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  block->warps[warp].values[thread % kWarp] = bits;
  pause(Wait::kWarp);
  return block->warps[warp].results;
}

template <class T>
T taken(const uint64_t *values, unsigned lane) {
  T value;
  std::memcpy(&value, &values[lane], sizeof(T));
  return value;
}

inline unsigned lanes_here() {
  const unsigned count = blockDim.x * blockDim.y * blockDim.z, first = linear_thread() / kWarp * kWarp;
  return std::min(kWarp, count - first);
}

template <class T>
T add_to(T *address, T value) {
  const T old = *address;
  *address = static_cast<T>(old + value);
  return old;
}

}  // namespace paikern::on_cpu

// --- barriers and warp collectives --------------------------------------------------------------------------------

namespace paikern::on_cpu {

inline std::string missing_file;
inline int missing_line = 0;
inline int64_t missed = 0;  // how often the missing barrier was come to

inline void barrier(const char *file, int line) {
  if (line == missing_line) {
    const std::string path(file);
    if (path.size() >= missing_file.size() && path.ends_with(missing_file)) {
      ++missed;
      return;
    }
  }
  pause(Wait::kBlock);
}

}  // namespace paikern::on_cpu

#define __syncthreads() paikern::on_cpu::barrier(__FILE__, __LINE__)

// Leaves out the barrier of this line; line 0 puts it back. Returns how often the one before was come to.
extern "C" __attribute__((visibility("default"), used)) inline int64_t paikern_on_cpu_without_barrier(const char *file,
                                                                                                      int line) {
  using namespace paikern::on_cpu;
  const int64_t before = missed;
  missing_file = file;
  missing_line = line;
  missed = 0;
  return before;
}

extern "C" __attribute__((visibility("default"), used)) inline void paikern_on_cpu_order(int turns) {
  paikern::on_cpu::turns = turns;
}

inline int __syncthreads_count(int predicate) {
  paikern::on_cpu::block->votes += predicate != 0;
  paikern::on_cpu::pause(paikern::on_cpu::Wait::kBlock);
  return paikern::on_cpu::block->result;
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { paikern::on_cpu::exchange(mask, 0); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t *values = paikern::on_cpu::exchange(mask, predicate != 0);
  unsigned word = 0;
  for (unsigned lane = 0; lane < paikern::on_cpu::lanes_here(); ++lane) {
    word |= static_cast<unsigned>(values[lane] != 0) << lane;
  }
  return word;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const uint64_t *values = paikern::on_cpu::exchange(mask, value);
  const unsigned own = paikern::on_cpu::linear_thread() % 32, base = own / width * width;
  return paikern::on_cpu::taken<T>(values, base + static_cast<unsigned>(lane) % static_cast<unsigned>(width));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32) {
  const uint64_t *values = paikern::on_cpu::exchange(mask, value);
  const unsigned own = paikern::on_cpu::linear_thread() % 32, other = own ^ static_cast<unsigned>(by);
  const bool inside = other / static_cast<unsigned>(width) == own / static_cast<unsigned>(width);
  return paikern::on_cpu::taken<T>(values, inside ? other : own);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const uint64_t *values = paikern::on_cpu::exchange(mask, value);
  const unsigned own = paikern::on_cpu::linear_thread() % 32, wide = static_cast<unsigned>(width);
  return paikern::on_cpu::taken<T>(values, own % wide + by < wide ? own + by : own);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const uint64_t *values = paikern::on_cpu::exchange(mask, value);
  const unsigned own = paikern::on_cpu::linear_thread() % 32;
  return paikern::on_cpu::taken<T>(values, own % static_cast<unsigned>(width) >= by ? own - by : own);
}

// --- atomics, bits, arithmetic ------------------------------------------------------------------------------------

template <class T>
T atomicAdd(T *address, T value) {
  return paikern::on_cpu::add_to(address, value);
}
template <class T>
T atomicMax(T *address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <class T>
T atomicMin(T *address, T value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}
template <class T>
T atomicOr(T *address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}
template <class T>
T atomicAnd(T *address, T value) {
  const T old = *address;
  *address = old & value;
  return old;
}
template <class T>
T atomicExch(T *address, T value) {
  const T old = *address;
  *address = value;
  return old;
}
template <class T>
T atomicCAS(T *address, T expected, T value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) { return bits == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float __fmul_rn(float a, float b) { return a * b; }  // built with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
template <class T>
T __ldg(const T *address) {
  return *address;
}

// Built-in vectors: 16-byte loads must be aligned, as they must be on the device.
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

// --- the runtime calls of the launchers ---------------------------------------------------------------------------

using cudaError_t = int;
using cudaStream_t = void *;
constexpr cudaError_t cudaSuccess = 0;
inline const char *cudaGetErrorString(cudaError_t) { return "an error of the CPU shim"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}
