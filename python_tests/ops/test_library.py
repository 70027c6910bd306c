"""Every operation of `torch.ops.paikern`: opcheck, shapes on meta tensors, errors, compilation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from paikern import ops
from paikern.pathgraph import trace
from paikern.pathgraph.units import walk_graph
from paikern.pathgraph.walks import flattened

BITS = torch.tensor([0b10110101, 0b01], dtype=torch.uint8)
WEIGHT, X, G = torch.linspace(-1, 1, 10).reshape(2, 5), torch.rand(3, 5), torch.rand(3, 2)
CONV, MAP, OUT = torch.randn(1, 2, 1, 5), torch.rand(1, 2, 4, 6), torch.rand(1, 1, 4, 2)
GEOMETRY = [1, 1], [0, 0], [1, 1], 1
LIVE = torch.ones(2, dtype=torch.uint8)
RULE = (0.99, 0.5, 0.1, 1)  # alpha, beta, lr, t


def _state() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, 5), torch.rand(2, 5)


def _walks() -> dict[str, list[tuple]]:
    """Samples of what PHEW needs, on one linear layer."""
    net = torch.nn.Linear(2, 2, bias=False)
    state = {"weight": net.weight.detach()}
    w = flattened(walk_graph(trace(net, torch.ones(1, 2)), state), state, {"weight": (2, 2)})
    tables = ops.phew_tables(w.weights, w.geometry, w.table_size)
    walks = torch.tensor([[0], [3], [-1]])
    return {
        "phew_tables": [(list(w.weights), w.geometry, w.table_size, 0)],
        "phew_walks": [
            (list(w.weights), tables, w.geometry, list(w.graph), 0, 0, 5, w.width, 0, False)
        ],
        "phew_keep_": [
            (
                torch.zeros(1, dtype=torch.uint8),
                torch.zeros(6, dtype=torch.int64),
                walks,
                2,
                1,
                True,
            )
        ],
    }


def _packed() -> tuple:
    """Where the weights of BITS are."""
    positions, starts = ops.list_positions(BITS, 6, 2, 5, 4)
    back = ops.transpose_positions(positions, starts, 2, 5, 4)
    return positions, starts, *back, 2, 5, 4, 6


# A kernel of 1 x 5 with a stride of 3 over the maps of MAP, one channel each.
WINDOW = [1, 5], [1, 3], [0, 2], [1, 1], 1


def _kept() -> tuple:
    return *ops.list_positions(BITS, 6, 2, 5, 4), 2, 5, 4, 6


# One sample or more of every operation. A new operation without one fails the test below.
SAMPLES: dict[str, list[tuple]] = {
    "apply_mask_": [(torch.rand(2, 5), BITS), (torch.rand(5, 2).T.bfloat16(), BITS)],
    "balanced_mask": [
        (torch.tensor([3, 7, 0, 4]), WEIGHT[:0], [2, 2, 3, 4], False, -1, -5, 1),
        (torch.tensor([3, 7]), torch.rand(2, 3, 4), [1, 2, 3, 4], True, 2, 0, 0),
    ],
    "block_means": [(WEIGHT, [2, 2], True), (CONV, [1, 5], False)],
    "block_means_factored": [(WEIGHT, X[0], G[0], BITS, [1, 5], 2)],
    "dpai_step_": [
        (torch.randn(2, 5), BITS, X, G, LIVE, None, None, 1.0, *RULE, [], [], [], 1, False),
        (torch.randn(2, 5), BITS, X, G, LIVE, *_state(), 1.0, *RULE, [], [], [], 1, False),
    ],
    "dpai_update_": [
        (torch.randn(2, 5), torch.rand(2, 5), BITS, LIVE, *_state(), *RULE, 1, False),
    ],
    "expand_blocks": [(BITS[:1], [3, 5], [2, 2])],
    "gather_kept": [(WEIGHT, *_kept()), (WEIGHT.half().T.contiguous().T, *_kept())],
    "kth_largest": [([WEIGHT, X], 7), ([WEIGHT.double()], 1)],
    "list_positions": [(BITS, 6, 2, 5, 4)],
    "masked_conv2d": [(MAP[:, :1], torch.rand(6), None, *_packed(), *WINDOW)],
    "masked_conv2d_input": [(torch.rand(1, 2, 4, 2), torch.rand(6), *_packed(), *WINDOW, [4, 6])],
    "masked_conv2d_kept": [(torch.rand(1, 2, 4, 2), MAP[:, :1], *_packed(), *WINDOW)],
    "masked_linear": [
        (X, torch.rand(6), None, *_packed()),
        (X[0], torch.rand(6), G[0], *_packed()),
    ],
    "masked_linear_input": [(G, torch.rand(6), *_packed())],
    "masked_linear_kept": [(G, X, *_packed())],
    "nm_mask": [([WEIGHT, X.half(), CONV], 2, 4, [1, 0, 3], True)],
    "nm_mask_factored": [([WEIGHT], [X[0]], [G[0]], [BITS], 1, 2, [1], 1)],
    "pack_mask": [(WEIGHT > 0,), ((WEIGHT > 0).T,), (torch.empty(0, dtype=torch.bool),)],
    "path_backward": [(WEIGHT, G, 1, BITS), (WEIGHT, G[0], 0, None)],
    "path_conv_backward": [(CONV, OUT, [1, 2, 4, 6], *GEOMETRY, 1, BITS)],
    "path_conv_forward": [(CONV, MAP, *GEOMETRY, 2, None)],
    "path_conv_score": [(CONV, MAP, OUT, *GEOMETRY, 1, BITS, -1.0)],
    "path_forward": [(WEIGHT, X, 2, BITS), (WEIGHT, X[0], 1, None)],
    "path_score": [(WEIGHT, X, G, 1, BITS, -1.0)],
    "path_sweep": [
        (WEIGHT, X[0], G[0], 0.1, 1, BITS),
        (WEIGHT.half(), X[0], G[0], 0.0, 0, None),
    ],
    "scatter_kept": [(torch.rand(6), *_kept()), (torch.arange(6), *_kept())],
    "topk_mask": [
        ([WEIGHT, X], [7], [0, 3], True, [], None),
        ([WEIGHT, X.half()], [2, 3], [], False, [BITS, BITS[:0]], None),
        ([WEIGHT], [2], [], False, [], torch.zeros(1, 2, dtype=torch.float64)),
    ],
    "topk_mask_product": [([WEIGHT, X], [WEIGHT + 1, X.half()], [BITS, BITS[:0]], [7])],
    "topk_mask_factored": [
        ([WEIGHT, WEIGHT], [X[0], X[1]], [G[0], G[1]], [BITS, BITS[:0]], [0, 9], [4], 2, []),
        ([WEIGHT], [X], [G], [], [0], [4], 1, []),
    ],
    "transpose_positions": [(*ops.list_positions(BITS, 6, 2, 5, 4), 2, 5, 4)],
    "unpack_mask": [(BITS, [2, 5]), (BITS, [])],
    **_walks(),
}


def registered() -> list[str]:
    schemas = torch._C._jit_get_all_schemas()
    return sorted(s.name.split("::")[1] for s in schemas if s.name.startswith("paikern::"))


def test_every_operation_has_a_sample() -> None:
    assert set(registered()) == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    """Schema, autograd registration, shapes under fake tensors, tracing with dynamic shapes."""
    for sample in SAMPLES[name]:
        torch.library.opcheck(getattr(torch.ops.paikern, name), sample)


@pytest.mark.parametrize("name", SAMPLES)
def test_shapes_and_dtypes_on_meta_tensors(name: str) -> None:
    operation = getattr(torch.ops.paikern, name)

    def to_meta(value: object) -> object:
        if isinstance(value, list):
            return [to_meta(item) for item in value]
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def described(result: object) -> list[tuple]:
        results = result if isinstance(result, (list, tuple)) else [result]
        return [(r.shape, r.dtype) for r in results if isinstance(r, torch.Tensor)]

    for sample in SAMPLES[name]:
        assert described(operation(*map(to_meta, sample))) == described(operation(*sample))


COMPILED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pack and unpack": lambda w: w * ops.unpack_mask(ops.pack_mask(w > 0), w.shape),
    "apply": lambda w: ops.apply_mask_(w * 2, BITS) + 1,
    "topk_mask": lambda w: ops.topk_mask([w, w + 1], 7)[0],
    "topk_mask_factored": lambda w: ops.topk_mask_factored([w], [X[0]], [G[0]], [0], 4)[0],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_graph_breaks(name: str) -> None:
    function = COMPILED[name]
    compiled = torch.compile(function, fullgraph=True)
    for weight in (WEIGHT.clone(), -WEIGHT):
        assert torch.equal(compiled(weight), function(weight))


def test_compiles_a_selection_under_aot_eager() -> None:
    def pruned(weight: torch.Tensor) -> torch.Tensor:
        packed = ops.topk_mask(weight.detach(), 3, absolute=True)[0]
        return weight * ops.unpack_mask(packed, weight.shape)

    compiled = torch.compile(pruned, fullgraph=True, backend="aot_eager")
    ours, theirs = (WEIGHT.clone().requires_grad_() for _ in range(2))
    pruned(ours).sum().backward()
    compiled(theirs).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert int(ours.grad.sum()) == 3
