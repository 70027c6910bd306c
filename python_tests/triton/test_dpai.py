"""The DPaI update in Triton's interpreter, against the CPU: equal counts, close scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paikern import ops
from python_tests.triton.helpers import on

pytestmark = pytest.mark.triton

CONV: dict[str, Any] = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 2}
CASES = {
    "vectors": ((5, 7), (7,), (5,), {}),
    "batch": ((33, 40), (3, 40), (3, 33), {}),
    "convolution": ((4, 3, 3, 3), (2, 6, 5, 5), (2, 4, 5, 5), CONV),
    "empty": ((0, 7), (7,), (0,), {}),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_cpu(case: str, adam: bool, transposed: bool) -> None:
    shape, x_shape, g_shape, geometry = CASES[case]
    s = torch.randn(shape)
    s.view(-1)[:1] = 0.0
    mask = ops.pack_mask(torch.rand(shape) < 0.5)
    x, g = torch.rand(x_shape), torch.rand(g_shape)
    x[x < 0.3] = 0.0
    g.view(-1)[:2] = 0.0
    nodes = shape[1] * geometry.get("groups", 1) if transposed else shape[0]
    live = (torch.rand(nodes) < 0.5).to(torch.uint8)
    q = torch.rand(shape).round()
    update = {"groups": geometry.get("groups", 1), "transposed": transposed, "t": 4, "lr": 0.1}

    def steps() -> tuple[Any, ...]:
        scores = s.clone()
        state: dict[str, Tensor] = {}
        if adam:
            state = {"exp_avg": torch.full(shape, 0.1), "exp_avg_sq": torch.full(shape, 0.2)}
        first = ops.dpai_step_(
            scores, mask, x, g, live, 0.5, alpha=0.9, lr=0.1, t=3, transposed=transposed,
            **state, **geometry,
        )  # fmt: skip
        second = ops.dpai_update_(scores, q, mask, live, alpha=0.9, **state, **update)
        return first, second, scores, *state.values()

    found, wanted = on("triton", steps), on("cpu", steps)
    assert found[:2] == wanted[:2]
    for left, right in zip(found[2:], wanted[2:], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_scores_that_are_not_finite_are_told() -> None:
    s, mask = torch.tensor([[3e38, 1.0]]), ops.pack_mask(torch.ones(1, 2, dtype=torch.bool))
    live, q = torch.zeros(1, dtype=torch.uint8), torch.full((1, 2), 3e38)
    counts = on("triton", lambda: ops.dpai_update_(s, q, mask, live, lr=1.0))
    assert counts == (2, 2, False)


def test_a_kernel_too_wide_for_a_tile_goes_to_the_reference() -> None:
    s, q = torch.randn(2, 1, 2100), torch.rand(2, 1, 2100)
    mask, live = ops.pack_mask(s > 0), torch.ones(2, dtype=torch.bool)
    copy = s.clone()
    found = on("triton", lambda: ops.dpai_update_(s, q, mask, live, lr=0.1))
    assert found == on("reference", lambda: ops.dpai_update_(copy, q, mask, live, lr=0.1))
    assert torch.equal(s, copy)
