// What the module _cuda knows of the kernels: a list for each .cu. No CUDA header, so that nvcc does not see pybind11.
#pragma once

#include <cstdint>

namespace paikern::cuda {

struct Grid {
  int64_t blocks, threads, shared;  // shared: bytes of dynamic shared memory
};

// An argument: a device pointer or an integer, or a floating-point number.
union Slot {
  int64_t integer;
  double real;
};

struct Kernel {
  const char *name;
  int parameters;
  const char *(*start)(const Grid &grid, const Slot *slots, void *stream);  // the CUDA error as text, or null
};

struct KernelList {
  const Kernel *kernels;
  int64_t count;
};

KernelList balanced_kernels();
KernelList bits_kernels();
KernelList decode_kernels();
KernelList dpai_kernels();
KernelList flow_kernels();
KernelList map_kernels();
KernelList masked_kernels();
KernelList path_kernels();
KernelList pattern_kernels();
KernelList phew_kernels();
KernelList select_kernels();

// Usable devices; 0 with `*why` set where there is no driver, or one that is too old.
int device_count(const char **why);

// Makes the device the one that kernels start on; the error as text, or null.
const char *use_device(int device);

}  // namespace paikern::cuda
