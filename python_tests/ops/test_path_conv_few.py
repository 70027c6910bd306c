"""Convolutions over few positions, where each weight is read once, on both sides of every limit.

That way is taken for one group, at most 16 positions over the batch, at least 32 rows, a depth of
at least 128, at most 256 pixels of a map, and where too many weights are kept for lists of them
(csrc/cpu/path_few.h).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paikern import ops
from python_tests.ops import test_path_conv_backward as conv_backward
from python_tests.ops import test_path_conv_forward as conv_forward
from python_tests.ops import test_path_conv_score as conv_score
from python_tests.ops.path_cases import DTYPES, FEW, Geometry, error, exact

CHECKS = (conv_forward.check, conv_backward.check, conv_score.check)
ONE = Geometry((4, 4), (3, 3), (1, 1), (1, 1), (1, 1), rows=40, channels=30, batch=1)


@pytest.mark.parametrize("geometry", FEW, ids=str)
@pytest.mark.parametrize("density", [None, 0.0, 0.01, 0.02, 0.05, 0.5, 1.0])
def test_few_positions_equal_the_definition(geometry: Geometry, density: float | None) -> None:
    for dtype in DTYPES:
        for power in (1, 2):
            for check in CHECKS:
                check(geometry, dtype, density, power)


@pytest.mark.parametrize("rows", [31, 32, 33, 71])
@pytest.mark.parametrize("depth", [127, 128, 129, 130, 9 * 33])
@pytest.mark.parametrize("positions", [1, 2, 4, 15, 16, 17])
def test_few_positions_at_the_limits(rows: int, depth: int, positions: int) -> None:
    if depth == 9 * 33:  # a kernel that reaches beyond the map on both sides
        geometry = Geometry(
            (1, positions), (3, 3), (1, 1), (1, 1), (1, 1), rows=rows, channels=33, batch=1
        )
    else:  # one tap, every other pixel
        geometry = Geometry(
            (1, 2 * positions), (1, 1), (1, 2), (0, 0), (1, 1), rows=rows, channels=depth, batch=1
        )
    assert geometry.out == (1, positions)
    for density in (None, 0.3):
        for check in CHECKS:
            check(geometry, torch.float32, density, 1)


def run(geometry: Geometry, weight: Tensor, x: Tensor, g: Tensor, mask: Tensor) -> list[Tensor]:
    packed = ops.pack_mask(mask)
    return [
        ops.path_conv_forward(weight, x, *geometry.args, mask=packed),
        ops.path_conv_backward(weight, g, list(x.shape), *geometry.args, mask=packed),
        ops.path_conv_score(weight, x, g, *geometry.args, mask=packed),
    ]


def truth(geometry: Geometry, weight: Tensor, x: Tensor, g: Tensor, mask: Tensor) -> list[Tensor]:
    """The same by float64 autograd."""
    values = exact(weight, 1, mask).requires_grad_()
    x = x.double().requires_grad_()
    z = geometry.conv(x, values)
    back, slope = torch.autograd.grad(z, (x, values), g.double())
    return [z.detach(), back, slope * values.detach()]


@pytest.mark.parametrize("geometry", [ONE, FEW[0], FEW[3], FEW[5]], ids=str)
@pytest.mark.parametrize("percent", [2, 5, 8, 12, 20])
def test_one_weight_more_or_less(geometry: Geometry, percent: int) -> None:
    """Where few weights are kept they are listed; wherever that begins, nothing jumps."""
    weight, x, g = geometry.weight(), geometry.x(), geometry.g()
    order, count = torch.randperm(weight.numel()), -(-weight.numel() * percent // 100)
    for kept in (count - 1, count):
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[order[:kept]] = True
        mask = mask.view(weight.shape)
        wanted = truth(geometry, weight, x, g, mask)
        for found, value in zip(run(geometry, weight, x, g, mask), wanted, strict=True):
            assert error(found, value) <= 1e-6


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_few_positions_mask_as_zeros_do(density: float) -> None:
    weight, x, g = ONE.weight(), ONE.x(), ONE.g()
    mask = torch.rand(weight.shape) < density
    everything = torch.ones_like(mask)
    masked = run(ONE, weight, x, g, mask)
    zeroed = run(ONE, torch.where(mask, weight, 0.0), x, g, everything)
    assert all(torch.equal(a, b) for a, b in zip(masked, zeroed, strict=True))


def test_few_positions_by_hand() -> None:
    """2 x 2 pixels of ones under a 3 x 3 kernel of ones: four taps a position inside the map."""
    weight, x, g = torch.ones(32, 16, 3, 3), torch.ones(1, 16, 2, 2), torch.ones(1, 32, 2, 2)
    args = ([1, 1], [1, 1], [1, 1], 1)
    assert torch.equal(ops.path_conv_forward(weight, x, *args), torch.full((1, 32, 2, 2), 64.0))
    back = ops.path_conv_backward(weight, g, [1, 16, 2, 2], *args)
    assert torch.equal(back, torch.full((1, 16, 2, 2), 128.0))
    score = ops.path_conv_score(weight, x, g, *args)
    # Positions that see a tap: two of two along an axis for the middle, one for an outer one.
    once = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])
    assert torch.equal(score, once.expand(32, 16, 3, 3))


@pytest.mark.parametrize("density", [0.05, 1.0])
@pytest.mark.parametrize(
    "geometry",
    [
        # rows for several tables of sums, columns enough for several threads to add them up
        Geometry((4, 4), (3, 3), (1, 1), (1, 1), (1, 1), rows=550, channels=120, batch=1),
        Geometry((2, 2), (3, 3), (1, 1), (1, 1), (1, 1), rows=65, channels=1000, batch=4),
        Geometry((16, 16), (3, 3), (5, 5), (1, 1), (1, 1), rows=300, channels=130, batch=1),
    ],
    ids=str,
)
def test_few_positions_have_the_same_bits_for_any_number_of_threads(
    geometry: Geometry, density: float
) -> None:
    weight, x, g = geometry.weight(), geometry.x(), geometry.g()
    mask = torch.rand(weight.shape) < density
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(run(geometry, weight, x, g, mask))
    finally:
        torch.set_num_threads(threads)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))
