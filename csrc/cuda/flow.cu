#include "flow.cuh"
#include "launch.h"

namespace paikern::cuda {
namespace {

const Kernel kKernels[] = {
    PK_COOPERATIVE_KERNEL(paikern_flow), PK_KERNEL(paikern_flow_sweep_32), PK_KERNEL(paikern_flow_sweep_16),
    PK_KERNEL(paikern_flow_dpai),        PK_KERNEL(paikern_flow_small),
};

}  // namespace

KernelList flow_kernels() { return {kKernels, static_cast<int64_t>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

}  // namespace paikern::cuda
