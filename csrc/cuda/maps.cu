#include "launch.h"
// After the runtime's header: device code that nvcc and NVRTC share.
#include "maps_kernels.cuh"

namespace paikern::cuda {
namespace {

const Kernel kKernels[] = {
    PK_KERNEL(paikern_live_nodes), PK_KERNEL(paikern_map_maximum),     PK_KERNEL(paikern_map_scale),
    PK_KERNEL(paikern_map_share),  PK_KERNEL(paikern_through_maximum),
};

}  // namespace

KernelList map_kernels() { return {kKernels, static_cast<int64_t>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

}  // namespace paikern::cuda
