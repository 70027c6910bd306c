from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from python_tests.ops.path_cases import GEOMETRIES, Geometry, geometries, keep

PAPER: dict[str, Any] = {"alpha": 0.99, "beta": 0.5}


def convolution(geometry: Geometry) -> dict[str, Any]:
    stride, padding, dilation, groups = geometry.args
    return {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


def moments(s: Tensor, adam: bool) -> dict[str, Any]:
    if not adam:
        return {}
    return {"exp_avg": torch.randn_like(s) * 0.1, "exp_avg_sq": torch.rand_like(s)}


def agree(
    s: Tensor, density: float, nodes: int, adam: bool, maps: tuple[Tensor, ...], **more: Any
) -> None:
    """The native step and the reference, from the same state."""
    _, packed = keep(s, density)
    live = (torch.rand(nodes) < 0.7).to(torch.uint8)
    start = {"s": s, **moments(s, adam)}
    results = []
    for backend in ("cpu", "reference"):
        state = {n: t.clone() for n, t in start.items()}
        scores = state.pop("s")
        with registry.using(backend):
            found = ops.dpai_step_(
                scores, packed, *maps, live, 1e-2, **state, **PAPER, lr=0.3, t=3, **more
            )
        results.append((found, {"s": scores, **state}))
    (found, native), (expected, reference) = results
    assert found == expected
    for name, tensor in native.items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-5, atol=2e-6)


def test_dpai_step_on_the_worked_example() -> None:
    # specification section 1: M_1, M_2, P and G by hand, alpha = .99, beta = .5
    masks = torch.tensor([[1.0, 0, 1], [0, 0, 1]]), torch.tensor([[1.0, 1], [0, 0]])
    maps = (torch.ones(3), torch.ones(2)), (torch.tensor([2.0, 1.0]), torch.ones(2))
    live = torch.tensor([1, 1], dtype=torch.uint8), torch.tensor([1, 0], dtype=torch.uint8)
    q = torch.full((2, 3), 1 / 3), torch.tensor([[2 / 3, 1 / 3], [2 / 3, 1 / 3]])
    u = (
        torch.where(masks[0] > 0, 0.01, 0.505),
        torch.tensor([[0.01, 0.01], [1.0, 1.0]]),
    )
    params = kernels = 0
    for i in range(2):
        s = torch.tensor([[1.0, -1.0, 0.0], [-2.0, 3.0, 1.0]])[:, : masks[i].shape[1]].contiguous()
        before = s.clone()
        packed = ops.pack_mask(masks[i].bool())
        found = ops.dpai_step_(s, packed, *maps[i], live[i], 1 / 3, **PAPER, lr=1.0)
        torch.testing.assert_close(s - before, u[i] * before.sign() * q[i])
        params += found.params
        kernels += found.kernels
        assert found.finite
    assert (params, kernels) == (5, 5)


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (130, 257), (3, 5000)])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("transposed", [False, True])
def test_dpai_step_linear_equals_the_reference(
    adam: bool, shape: tuple[int, int], batch: int, transposed: bool
) -> None:
    maps = torch.rand(batch, shape[1]), torch.rand(batch, shape[0])
    agree(torch.randn(shape), 0.2, shape[transposed], adam, maps, transposed=transposed)


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_dpai_step_convolution_equals_the_reference(
    adam: bool, geometry: Geometry, transposed: bool
) -> None:
    nodes = geometry.groups * (geometry.channels if transposed else geometry.rows)
    agree(
        geometry.weight(), 0.1, nodes, adam, (geometry.x(), geometry.g()),
        transposed=transposed, **convolution(geometry),
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(geometries(), st.floats(0, 1), st.booleans(), st.booleans())
def test_dpai_step_over_geometries(
    geometry: Geometry, density: float, adam: bool, transposed: bool
) -> None:
    nodes = geometry.groups * (geometry.channels if transposed else geometry.rows)
    agree(
        geometry.weight(), density, nodes, adam, (geometry.x(), geometry.g()),
        transposed=transposed, **convolution(geometry),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.3))
def test_dpai_step_flags_equal_the_three_terms(
    seed: int, alpha: float, beta: float, density: float
) -> None:
    """a = (1-alpha) p + alpha [(1-beta) p (1-e) + beta p (1-f)], by loops, where e <= f."""
    torch.manual_seed(seed)
    s = torch.randn(6, 5, 2, 3)
    x = (torch.rand(1, 5, 6, 7) < 0.2).float()
    g = (torch.rand(1, 6, 5, 5) < 0.1).float()
    mask, packed = keep(s, density)
    q = torch.nn.grad.conv2d_weight(x, s.shape, g)
    hit = mask & (q != 0)
    kernel, node = hit.flatten(2).any(2), hit.flatten(1).any(1)
    p = s.sign() * q
    f, e = kernel[:, :, None, None].float(), node[:, None, None, None].float()
    expected = s + (1 - alpha) * p + alpha * ((1 - beta) * p * (1 - e) + beta * p * (1 - f))
    found = ops.dpai_step_(
        s, packed, x, g, node.to(torch.uint8), 1.0, alpha=alpha, beta=beta, lr=1.0,
        stride=[1, 1], padding=[0, 0], dilation=[1, 1],
    )  # fmt: skip
    torch.testing.assert_close(s, expected, rtol=1e-5, atol=1e-5)
    assert found == (int(hit.sum()), int(kernel.sum()), True)


def test_dpai_step_adam_is_torchs() -> None:
    s = torch.randn(9, 11)
    parameter = s.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=0.005)
    mean, square = torch.zeros_like(s), torch.zeros_like(s)
    live = torch.ones(9, dtype=torch.uint8)
    for t in range(1, 6):
        mask, packed = keep(s, 0.4)
        x, g = torch.rand(11), torch.rand(9)
        u = torch.where(mask & (torch.outer(g, x) != 0), 1 - 0.9, (1 - 0.9) + 0.9 * 0.25)
        parameter.grad = -u * parameter.detach().sign() * torch.outer(g, x)
        optimizer.step()
        ops.dpai_step_(
            s, packed, x, g, live, 1.0, exp_avg=mean, exp_avg_sq=square,
            alpha=0.9, beta=0.25, lr=0.005, t=t,
        )  # fmt: skip
        torch.testing.assert_close(s, parameter.detach(), rtol=1e-6, atol=1e-6)


def test_dpai_step_leaves_a_zero_score_and_follows_a_negative_q() -> None:
    s = torch.tensor([[0.0, -0.0, 2.0, -2.0]])
    packed, live = ops.pack_mask(torch.ones(4, dtype=torch.bool)), torch.ones(1, dtype=torch.bool)
    found = ops.dpai_step_(
        s, packed, torch.ones(4), -torch.ones(1), live, 1.0, alpha=0.0, beta=0.0, lr=0.5
    )
    assert s.tolist() == [[0.0, 0.0, 1.5, -1.5]]
    assert found == (4, 4, True)


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 17, 36])
def test_dpai_step_reports_scores_that_are_not_finite(adam: bool, value: float, at: int) -> None:
    for backend in ("cpu", "reference"):
        s = torch.randn(1, 37)
        s[0, at] = value
        with registry.using(backend):
            found = ops.dpai_step_(
                s, ops.pack_mask(torch.ones(37, dtype=torch.bool)), torch.ones(37), torch.ones(1),
                torch.ones(1, dtype=torch.uint8), 1.0, **moments(s, adam), lr=0.1,
            )  # fmt: skip
        assert not found.finite


@pytest.mark.parametrize("shape", [(700, 1600), (128, 128, 3, 3)])
def test_dpai_step_has_the_same_bits_for_any_number_of_threads(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape)
    _, packed = keep(start, 0.1)
    extra = (30, 30) if len(shape) == 4 else ()
    x, g = torch.rand(1, shape[1], *extra), torch.rand(1, shape[0], *extra)
    conv = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]} if extra else {}
    live = torch.ones(shape[0], dtype=torch.uint8)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            s = start.clone()
            found = ops.dpai_step_(s, packed, x, g, live, 1.0, **PAPER, lr=0.1, **conv)
            results.append((s, found))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(s, results[0][0]) and f == results[0][1] for s, f in results)


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("shape", [(31, 33), (6, 5, 3, 3), (6, 2, 7), (4, 3, 2, 2, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_dpai_update_equals_the_reference(
    adam: bool, shape: tuple[int, ...], transposed: bool
) -> None:
    s, q = torch.randn(shape), torch.rand(shape) * (torch.rand(shape) < 0.5)
    groups = 2 if transposed and len(shape) > 2 else 1
    live = (torch.rand(shape[1] * groups if transposed else shape[0]) < 0.5).to(torch.uint8)
    _, packed = keep(s, 0.3)
    start = {"s": s, **moments(s, adam)}
    results = []
    for backend in ("cpu", "reference"):
        state = {n: t.clone() for n, t in start.items()}
        scores = state.pop("s")
        with registry.using(backend):
            found = ops.dpai_update_(
                scores, q, packed, live, **state, **PAPER, lr=0.3, t=2, groups=groups,
                transposed=transposed,
            )  # fmt: skip
        results.append((found, {"s": scores, **state}))
    (found, native), (expected, reference) = results
    assert found == expected
    for name, tensor in native.items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-5, atol=2e-6)


def test_dpai_update_equals_dpai_step() -> None:
    s, x, g = torch.randn(5, 7), torch.rand(7), torch.rand(5)
    _, packed = keep(s, 0.3)
    live = torch.tensor([1, 0, 1, 1, 0], dtype=torch.uint8)
    by_step, by_update = s.clone(), s.clone()
    found = ops.dpai_step_(by_step, packed, x, g, live, 1.0, lr=0.1)
    assert found == ops.dpai_update_(by_update, torch.outer(g, x), packed, live, lr=0.1)
    assert torch.equal(by_step, by_update)


def test_dpai_step_of_nothing() -> None:
    s = torch.randn(3, 4)
    before, packed = s.clone(), ops.pack_mask(torch.ones(3, 4, dtype=torch.bool))
    live = torch.ones(3, dtype=torch.uint8)
    found = ops.dpai_step_(s, packed, torch.rand(0, 4), torch.rand(0, 3), live, 1.0, lr=1.0)
    assert found == (0, 0, True)
    assert torch.equal(s, before)
    empty = torch.randn(0, 4)
    none = ops.dpai_step_(empty, packed[:0], torch.rand(4), torch.rand(0), live[:0], 1.0, lr=1.0)
    assert none == (0, 0, True)


def test_dpai_ops_opcheck() -> None:
    s, x, g = torch.randn(4, 3, 3, 3), torch.rand(1, 3, 5, 5), torch.rand(1, 4, 5, 5)
    _, packed = keep(s, 0.5)
    live = torch.ones(4, dtype=torch.uint8)
    rule = (0.99, 0.5, 0.1, 1)
    conv = ([1, 1], [1, 1], [1, 1], 1, False)
    for state in ((None, None), (torch.zeros_like(s), torch.zeros_like(s))):
        torch.library.opcheck(
            torch.ops.paikern.dpai_step_, (s, packed, x, g, live, *state, 1.0, *rule, *conv)
        )
        q = torch.rand_like(s)
        torch.library.opcheck(
            torch.ops.paikern.dpai_update_, (s, q, packed, live, *state, *rule, 1, False)
        )


def test_dpai_step_names_what_is_wrong() -> None:
    s, x, g = torch.randn(3, 4), torch.rand(4), torch.rand(3)
    packed = ops.pack_mask(torch.ones(3, 4, dtype=torch.bool))
    live = torch.ones(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"node_live must be uint8 or bool with shape \(4,\)"):
        ops.dpai_step_(s, packed, x, g, live, 1.0, lr=0.1, transposed=True)
    with pytest.raises(ValueError, match="both exp_avg and exp_avg_sq"):
        ops.dpai_step_(s, packed, x, g, live, 1.0, lr=0.1, exp_avg=torch.zeros_like(s))
    with pytest.raises(TypeError, match="s must be float32"):
        ops.dpai_step_(s.half(), packed, x, g, live, 1.0, lr=0.1)
    with pytest.raises(ValueError, match="s must be contiguous"):
        ops.dpai_step_(s.T, packed, g, x, torch.ones(4, dtype=torch.uint8), 1.0, lr=0.1)
    with pytest.raises(ValueError, match="must have the same batch"):
        ops.dpai_step_(s, packed, x[None], g, live, 1.0, lr=0.1)
    with pytest.raises(ValueError, match=r"dpai_update_: q must have shape \(3, 4\)"):
        ops.dpai_update_(s, x, packed, live, lr=0.1)
