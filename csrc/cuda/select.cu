#include "launch.h"
// After the runtime's header: device code that nvcc and NVRTC share.
#include "select_emit.cuh"
#include "select_filter.cuh"
#include "select_radix.cuh"
#include "select_sample.cuh"
#include "select_stream.cuh"

namespace paikern::cuda {
namespace {

const Kernel kKernels[] = {
    PK_KERNEL(paikern_select_sample),      PK_KERNEL(paikern_select_band),
    PK_KERNEL(paikern_select_filter),      PK_KERNEL(paikern_select_filter_factored),
    PK_KERNEL(paikern_select_filter_maps), PK_KERNEL(paikern_select_digit),
    PK_KERNEL(paikern_select_ties),        PK_KERNEL(paikern_select_emit),
    PK_KERNEL(paikern_select_forecast),    PK_KERNEL(paikern_select_collect),
    PK_KERNEL(paikern_select_observe),
};

}  // namespace

KernelList select_kernels() { return {kKernels, static_cast<int64_t>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

}  // namespace paikern::cuda
