#include "flow.cuh"
#include "launch.h"

namespace paikern::cuda {
namespace {

const Kernel kKernels[] = {PK_KERNEL(paikern_flow)};

}  // namespace

KernelList flow_kernels() { return {kKernels, static_cast<int64_t>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

}  // namespace paikern::cuda
