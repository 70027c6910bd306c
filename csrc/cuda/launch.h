// How kernels are started: by name, with their arguments in slots of eight bytes.
//
// Parameters of kernels are pointers, long long and double, nothing else, so that one list of Python numbers starts the
// kernel that nvcc built here and the one that NVRTC built at run time. Each .cu names the kernels of its .cuh files in
// a list (PK_KERNEL); which ones run, in what order and on how many blocks, is said once, in
// paikern/backends/cuda_*.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "kernels.h"

#ifndef PAIKERN_CUDA_ON_CPU  // csrc/testing/cuda_on_cpu.h, which brings its own
#include <cuda_runtime.h>
#define PK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace paikern::cuda {

inline const char *text(cudaError_t code) { return code == cudaSuccess ? nullptr : cudaGetErrorString(code); }

template <class Parameter>
Parameter taken_from(const Slot &slot) {
  if constexpr (std::is_pointer_v<Parameter>) {
    return reinterpret_cast<Parameter>(static_cast<uintptr_t>(slot.integer));
  } else if constexpr (std::is_same_v<Parameter, double>) {
    return slot.real;
  } else {
    static_assert(std::is_same_v<Parameter, long long>, "parameters are pointers, long long and double");
    return slot.integer;
  }
}

template <class... Parameters, size_t... Index>
const char *start(void (*kernel)(Parameters...), const Grid &grid, const Slot *slots, void *stream,
                  std::index_sequence<Index...>) {
  PK_LAUNCH(kernel, static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.threads),
            static_cast<size_t>(grid.shared), stream, taken_from<Parameters>(slots[Index])...);
  return text(cudaGetLastError());
}

template <class... Parameters>
const char *start(void (*kernel)(Parameters...), const Grid &grid, const Slot *slots, void *stream) {
  return start(kernel, grid, slots, stream, std::index_sequence_for<Parameters...>());
}

// All blocks at the same time, or an error: for kernels whose blocks wait for each other.
template <class... Parameters, size_t... Index>
const char *start_together(void (*kernel)(Parameters...), const Grid &grid, const Slot *slots, void *stream,
                           std::index_sequence<Index...>) {
#ifdef PAIKERN_CUDA_ON_CPU
  return start(kernel, grid, slots, stream, std::index_sequence<Index...>());
#else
  std::tuple<Parameters...> values(taken_from<Parameters>(slots[Index])...);
  void *places[] = {&std::get<Index>(values)...};
  return text(cudaLaunchCooperativeKernel(reinterpret_cast<const void *>(kernel),
                                          dim3(static_cast<unsigned>(grid.blocks)),
                                          dim3(static_cast<unsigned>(grid.threads)), places,
                                          static_cast<size_t>(grid.shared), static_cast<cudaStream_t>(stream)));
#endif
}

template <class... Parameters>
const char *start_together(void (*kernel)(Parameters...), const Grid &grid, const Slot *slots, void *stream) {
  return start_together(kernel, grid, slots, stream, std::index_sequence_for<Parameters...>());
}

template <class... Parameters>
constexpr int parameters(void (*)(Parameters...)) {
  return static_cast<int>(sizeof...(Parameters));
}

#define PK_KERNEL(name)     \
  {#name, parameters(name), \
   [](const Grid &grid, const Slot *slots, void *stream) { return start(name, grid, slots, stream); }}

#define PK_COOPERATIVE_KERNEL(name) \
  {#name, parameters(name),         \
   [](const Grid &grid, const Slot *slots, void *stream) { return start_together(name, grid, slots, stream); }}

}  // namespace paikern::cuda
