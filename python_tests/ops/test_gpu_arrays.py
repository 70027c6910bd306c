"""Arrays of CuPy and others go into the operations through DLPack, nothing copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paikern import ops


class GpuArray:
    """What an operation sees of a GPU array; the memory behind it is the CPU's."""

    __cuda_array_interface__ = "there is one"

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> object:
        return self.tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


def test_scores_and_masks() -> None:
    scores, other = torch.randn(50), torch.randn(7, 9)
    wanted = ops.topk_mask([scores, other], 20)
    found = ops.topk_mask([GpuArray(scores), other], 20)
    assert all(map(torch.equal, found, wanted))
    (alone,) = ops.topk_mask(GpuArray(scores), 20)
    assert torch.equal(alone, ops.topk_mask(scores, 20)[0])
    masks = ops.topk_mask([scores, other], 5, masks=[GpuArray(wanted[0]), None])
    assert torch.equal(masks[0], ops.topk_mask([scores, other], 5, masks=[wanted[0], None])[0])
    assert ops.kth_largest(GpuArray(scores), 3) == ops.kth_largest(scores, 3)
    assert torch.equal(ops.nm_mask(GpuArray(other), 2, 4)[0], ops.nm_mask(other, 2, 4)[0])
    packed = ops.pack_mask(GpuArray(scores > 0))
    assert torch.equal(ops.unpack_mask(GpuArray(packed), (50,)), scores > 0)


def test_factors() -> None:
    w, a, g = torch.randn(6, 8), torch.rand(8), torch.rand(6)
    found = ops.topk_mask_factored([GpuArray(w)], [GpuArray(a)], [GpuArray(g)], [0], 11)
    assert torch.equal(found[0], ops.topk_mask_factored([w], [a], [g], [0], 11)[0])
    found = ops.topk_mask_product(GpuArray(w), GpuArray(w.T.contiguous().T), 11)
    assert torch.equal(found[0], ops.topk_mask_product(w, w, 11)[0])


def test_a_mask_is_applied_in_the_arrays_own_memory() -> None:
    values = torch.ones(10)
    ops.apply_mask_(GpuArray(values), torch.tensor([3, 0], dtype=torch.uint8))
    assert values.tolist() == [1.0] * 2 + [0.0] * 8


def test_arrays_of_the_cpu_are_still_refused() -> None:
    with pytest.raises(TypeError, match="wrap arrays with torch"):
        ops.topk_mask([np.ones(3)], 1)
