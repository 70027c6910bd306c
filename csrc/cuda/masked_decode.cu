#include "launch.h"
#include "masked_decode.cuh"

namespace paikern::cuda {
namespace {

const Kernel kKernels[] = {
    PK_KERNEL(paikern_masked_decode_1),
    PK_KERNEL(paikern_masked_decode_2),
    PK_KERNEL(paikern_masked_decode_4),
    PK_KERNEL(paikern_masked_decode_8),
};

}  // namespace

KernelList decode_kernels() { return {kKernels, static_cast<int64_t>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

}  // namespace paikern::cuda
