#include "launch.h"
#include "phew_keep.cuh"
#include "phew_tables.cuh"
#include "phew_walks.cuh"

namespace paikern::cuda {
namespace {

const Kernel kKernels[] = {
    PK_KERNEL(paikern_phew_sums),    PK_KERNEL(paikern_phew_shares), PK_KERNEL(paikern_phew_walks),
    PK_KERNEL(paikern_phew_repeats), PK_KERNEL(paikern_phew_keep),
};

}  // namespace

KernelList phew_kernels() { return {kKernels, static_cast<int64_t>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

}  // namespace paikern::cuda
