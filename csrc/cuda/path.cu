#include "launch.h"
// After the runtime's header: device code that nvcc and NVRTC share.
#include "path_kernels.cuh"

namespace paikern::cuda {
namespace {

const Kernel kKernels[] = {
    PK_KERNEL(paikern_path_forward),      PK_KERNEL(paikern_path_backward_32),   PK_KERNEL(paikern_path_backward_16),
    PK_KERNEL(paikern_path_sweep_32),     PK_KERNEL(paikern_path_sweep_16),      PK_KERNEL(paikern_path_score),
    PK_KERNEL(paikern_path_conv_forward), PK_KERNEL(paikern_path_conv_backward), PK_KERNEL(paikern_path_conv_score),
};

}  // namespace

KernelList path_kernels() { return {kKernels, static_cast<int64_t>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

}  // namespace paikern::cuda
