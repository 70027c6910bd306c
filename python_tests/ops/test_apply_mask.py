from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paikern import ops
from paikern.backends import registry
from python_tests.ops.selection_cases import DTYPES, LAYOUTS


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    size=st.integers(0, 100) | st.just(140_001),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    density=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_apply_mask_equals_masked_fill(
    backend: str, size: int, dtype: torch.dtype, layout: str, density: float
) -> None:
    base = torch.randn(size, 2).to(dtype)
    tensor = {"contiguous": base, "strided": base[:, 1], "transposed": base.T}[layout]
    mask = torch.rand(tensor.shape) < density
    wanted = tensor.masked_fill(~mask, 0)
    untouched = base[:, 0].clone()
    with registry.using(backend):
        assert ops.apply_mask_(tensor, ops.pack_mask(mask)) is tensor
    assert torch.equal(tensor, wanted)
    if layout == "strided":
        assert torch.equal(base[:, 0], untouched)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_apply_mask_kills_what_is_not_finite(dtype: torch.dtype, backend: str) -> None:
    bad = [math.nan, math.inf, -math.inf, -1.0, -0.0] * 4
    tensor = torch.tensor(bad, dtype=dtype)
    with registry.using(backend):
        ops.apply_mask_(tensor, torch.zeros(3, dtype=torch.uint8))
    assert tensor.tolist() == [0.0] * 20
    assert not torch.signbit(tensor).any()


def test_apply_mask_leaves_kept_bits_alone() -> None:
    tensor = torch.tensor([math.nan, math.inf, -0.0, 1e-45] * 3)
    before = tensor.view(torch.int32).clone()
    ops.apply_mask_(tensor, torch.full((2,), 255, dtype=torch.uint8))
    assert torch.equal(tensor.view(torch.int32), before)


def test_apply_mask_by_hand() -> None:
    weight = torch.nn.Parameter(torch.arange(10.0) + 1)
    ops.apply_mask_(weight, torch.tensor([0b10100101, 0b10], dtype=torch.uint8))
    assert weight.tolist() == [1, 0, 3, 0, 0, 6, 0, 8, 0, 10]


def test_apply_mask_is_seen_by_autograd() -> None:
    """A backward pass that needs the old values must fail, not use the new ones."""
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    ops.apply_mask_(weight, torch.tensor([5], dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("tensor", "packed", "error", "message"),
    [
        (torch.ones(3, dtype=torch.int32), torch.uint8, TypeError, "must be a float tensor"),
        (torch.ones(9), torch.uint8, ValueError, "holds 8 bits, 9 are needed"),
        (torch.ones(3), torch.int32, TypeError, "1-D uint8 tensor"),
    ],
)
def test_apply_mask_errors(tensor, packed, error, message: str) -> None:
    with pytest.raises(error, match=message):
        ops.apply_mask_(tensor, torch.zeros(1, dtype=packed))


def test_apply_mask_refuses_two_places_for_one_value() -> None:
    with pytest.raises(RuntimeError, match="single memory location"):
        ops.apply_mask_(torch.ones(1).expand(4), torch.tensor([3], dtype=torch.uint8))
