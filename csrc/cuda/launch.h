// How launchers start kernels, and how they report what CUDA says.
#pragma once

#include <cstdint>

#ifndef PAIKERN_CUDA_ON_CPU  // csrc/testing/cuda_on_cpu.h, which brings its own
#include <cuda_runtime.h>
#define PK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace paikern::cuda {

inline const char *text(cudaError_t code) { return code == cudaSuccess ? nullptr : cudaGetErrorString(code); }

}  // namespace paikern::cuda
