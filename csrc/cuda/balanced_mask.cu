#include "balanced_mask.cuh"
#include "launch.h"

namespace paikern::cuda {
namespace {

const Kernel kKernels[] = {
    PK_KERNEL(paikern_balanced_starts), PK_KERNEL(paikern_balanced_laps), PK_KERNEL(paikern_balanced_deal),
    PK_KERNEL(paikern_balanced_mark),   PK_KERNEL(paikern_balanced_draw), PK_KERNEL(paikern_balanced_rank),
};

}  // namespace

KernelList balanced_kernels() { return {kKernels, static_cast<int64_t>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

}  // namespace paikern::cuda
