#include "bits.cuh"
#include "launch.h"

namespace paikern::cuda {
namespace {

const Kernel kKernels[] = {
    PK_KERNEL(paikern_pack_mask),     PK_KERNEL(paikern_unpack_mask),   PK_KERNEL(paikern_apply_mask_16),
    PK_KERNEL(paikern_apply_mask_32), PK_KERNEL(paikern_apply_mask_64),
};

}  // namespace

KernelList bits_kernels() { return {kKernels, static_cast<int64_t>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

int device_count(const char **why) {
  int count = 0;
  *why = text(cudaGetDeviceCount(&count));
  return *why == nullptr ? count : 0;
}

const char *use_device(int device) { return text(cudaSetDevice(device)); }

}  // namespace paikern::cuda
