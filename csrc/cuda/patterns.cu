#include "launch.h"
#include "patterns.cuh"

namespace paikern::cuda {
namespace {

const Kernel kKernels[] = {
    PK_KERNEL(paikern_nm_mask),        PK_KERNEL(paikern_nm_mask_64),    PK_KERNEL(paikern_block_means),
    PK_KERNEL(paikern_block_means_64), PK_KERNEL(paikern_expand_blocks),
};

}  // namespace

KernelList pattern_kernels() { return {kKernels, static_cast<int64_t>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

}  // namespace paikern::cuda
