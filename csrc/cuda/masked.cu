#include "launch.h"
#include "masked_few.cuh"
#include "masked_few_bits.cuh"
#include "masked_kept.cuh"
#include "masked_positions.cuh"
#include "masked_rows.cuh"

namespace paikern::cuda {
namespace {

const Kernel kKernels[] = {
    PK_KERNEL(paikern_masked_columns),  PK_KERNEL(paikern_masked_count),     PK_KERNEL(paikern_masked_dots_1),
    PK_KERNEL(paikern_masked_dots_2),   PK_KERNEL(paikern_masked_dots_4),    PK_KERNEL(paikern_masked_dots_few),
    PK_KERNEL(paikern_masked_few),      PK_KERNEL(paikern_masked_few_bits),  PK_KERNEL(paikern_masked_fill),
    PK_KERNEL(paikern_masked_list),     PK_KERNEL(paikern_masked_move),      PK_KERNEL(paikern_masked_move_bits),
    PK_KERNEL(paikern_masked_panels),   PK_KERNEL(paikern_masked_parts),     PK_KERNEL(paikern_masked_rows_1),
    PK_KERNEL(paikern_masked_rows_2),   PK_KERNEL(paikern_masked_rows_4),    PK_KERNEL(paikern_masked_scan),
    PK_KERNEL(paikern_masked_t_starts), PK_KERNEL(paikern_masked_transpose),
};

}  // namespace

KernelList masked_kernels() { return {kKernels, static_cast<int64_t>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

}  // namespace paikern::cuda
