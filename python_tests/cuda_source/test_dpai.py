"""The DPaI update by the CUDA sources: given the same q, the scores of the CPU bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from paikern import ops
from paikern.backends import cpu, cuda_dpai
from python_tests.cuda_source.path_calls import close, on

pytestmark = pytest.mark.cuda_source

CONV: dict[str, Any] = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 2}
WIDE: dict[str, Any] = {"stride": [1], "padding": [0], "dilation": [1], "groups": 1}
STEPS = {
    "vectors": ((5, 7), (7,), (5,), {}),
    "many": ((40, 131), (131,), (40,), {}),
    "batch": ((33, 40), (3, 40), (3, 33), {}),
    "no-sample": ((3, 4), (0, 4), (0, 3), {}),
    "convolution": ((4, 3, 3, 3), (2, 6, 5, 5), (2, 4, 5, 5), CONV),
    "wide-kernel": ((2, 2, 1030), (1, 2, 1033), (1, 2, 4), WIDE),
    "empty": ((0, 7), (7,), (0,), {}),
}
SHAPES = (
    (33, 31),
    (1, 1),
    (17, 70),
    (6, 5, 3),
    (12, 9, 3, 3),
    (3, 2, 40),
    (2, 3, 1024),
    (2, 2, 1100),
)
FUSED = cpu.isa() != "portable"  # multiply-adds round once


def _same(found: Tensor, wanted: Tensor) -> None:
    if FUSED:
        assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))
    else:
        torch.testing.assert_close(found, wanted, equal_nan=True)


def _moments(shape: tuple[int, ...], adam: bool) -> dict[str, Tensor]:
    if not adam:
        return {}
    return {"exp_avg": torch.randn(shape) * 0.1, "exp_avg_sq": torch.rand(shape)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates_are_the_cpus_bit_for_bit(
    shape: tuple[int, ...], adam: bool, transposed: bool
) -> None:
    s, q = torch.randn(shape), torch.rand(shape)
    q[torch.rand(shape) < 0.6] = 0.0
    s.view(-1)[:1] = 0.0
    mask = ops.pack_mask(torch.rand(shape) < 0.3)
    for groups in (1, 3) if shape[0] % 3 == 0 else (1,):
        nodes = shape[1] * groups if transposed else shape[0]
        live = torch.rand(nodes) < 0.6
        moments = _moments(shape, adam)

        def update(m=moments, n=live, c=groups) -> tuple[Any, ...]:
            scores, state = s.clone(), {name: t.clone() for name, t in m.items()}
            counts = ops.dpai_update_(
                scores, q, mask, n, alpha=0.9, lr=0.1, t=4, groups=c, transposed=transposed, **state
            )
            return counts, scores, *state.values()

        found, wanted = on("cuda_source", update), on("cpu", update)
        assert found[0] == wanted[0]
        for left, right in zip(found[1:], wanted[1:], strict=True):
            _same(left, right)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("case", STEPS)
def test_steps_equal_the_cpu(case: str, adam: bool, transposed: bool) -> None:
    shape, x_shape, g_shape, geometry = STEPS[case]
    s = torch.randn(shape)
    mask = ops.pack_mask(torch.rand(shape) < 0.5)
    x, g = torch.rand(x_shape), torch.rand(g_shape)
    x[x < 0.3] = 0.0
    g.view(-1)[:2] = 0.0
    nodes = shape[1] * geometry.get("groups", 1) if transposed else shape[0]
    live = (torch.rand(nodes) < 0.5).to(torch.uint8)
    moments = _moments(shape, adam)

    def step() -> tuple[Any, ...]:
        scores, state = s.clone(), {name: t.clone() for name, t in moments.items()}
        counts = ops.dpai_step_(
            scores, mask, x, g, live, 0.5, alpha=0.9, lr=0.1, t=3, transposed=transposed, **state,
            **geometry,
        )  # fmt: skip
        return counts, scores, *state.values()

    found, wanted, truth = on("cuda_source", step), on("cpu", step), on("reference", step)
    assert found[0] == wanted[0]
    for left, right, middle in zip(found[1:], wanted[1:], truth[1:], strict=True):
        if case in ("vectors", "many"):
            _same(left, right)
        close(left, middle)


def test_a_score_that_is_no_number_is_told() -> None:
    s, q = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2)
    mask, live = ops.pack_mask(s > 2), torch.ones(2, dtype=torch.bool)
    for number in (math.inf, math.nan, -math.inf):
        s[1, 1] = number
        found = on("cuda_source", lambda: ops.dpai_update_(s.clone(), q, mask, live, lr=1.0))
        assert found == (2, 2, False) if number != -math.inf else found[2] is False
    s[1, 1] = 3e38
    found = on("cuda_source", lambda: ops.dpai_update_(s, q * 3e38, mask, live, alpha=0.0, lr=2.0))
    assert found == (2, 2, False)


def test_a_gradient_that_is_nan_counts_as_a_path_and_breaks_the_score() -> None:
    s, mask, live = torch.ones(1, 2), torch.tensor([1], dtype=torch.uint8), torch.ones(1).bool()
    q = torch.tensor([[math.nan, 0.0]])

    def update() -> tuple[Any, Tensor]:
        scores = s.clone()
        return ops.dpai_update_(scores, q, mask, live, lr=1.0), scores

    found, wanted = on("cuda_source", update), on("cpu", update)
    assert found[0] == wanted[0] == (1, 1, False)
    _same(found[1], wanted[1])


@pytest.mark.parametrize("shape", [(40, 131), (17, 29, 3), (3, 2, 1100)], ids=str)
def test_bits_do_not_depend_on_the_blocks(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    s, q, mask = torch.randn(shape), torch.rand(shape), ops.pack_mask(torch.rand(shape) < 0.4)
    live = torch.rand(shape[0]) < 0.5

    def update() -> tuple[Any, Tensor]:
        scores = s.clone()
        return ops.dpai_update_(scores, q, mask, live, lr=0.3), scores

    first = on("cuda_source", update)
    for count in (1, 2, 3):
        monkeypatch.setattr(cuda_dpai, "blocks", lambda *shape, n=count: n)
        again = on("cuda_source", update)
        assert again[0] == first[0]
        assert torch.equal(again[1], first[1])
