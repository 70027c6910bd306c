#include "launch.h"
// After the runtime's header: device code that nvcc and NVRTC share.
#include "dpai_kernels.cuh"

namespace paikern::cuda {
namespace {

const Kernel kKernels[] = {
    PK_KERNEL(paikern_dpai_update),
};

}  // namespace

KernelList dpai_kernels() { return {kKernels, static_cast<int64_t>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

}  // namespace paikern::cuda
