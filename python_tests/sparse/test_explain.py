"""explain: one entry a weight, kernels, times, bytes, and a table."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import paikern as pk
from paikern.backends import masked_cost
from paikern.sparse import choice
from python_tests.sparse import nets


def big(density: float = 0.05) -> tuple[nn.Module, pk.MaskSet]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 10))
    return model, nets.random_masks(model, density)


@pytest.mark.parametrize("training", [False, True])
def test_the_figures_are_those_of_the_cost_table(training: bool) -> None:
    model, masks = big()
    pk.sparsify(model, masks, force=True)
    found = pk.explain(model, batch=128, training=training)
    assert found.training == training
    assert found.packed == 2
    first, last = found.layers
    kept = masks.kept_by_layer["0.weight"]
    expected = masked_cost.estimate("cpu", 2048, 1024, kept, 128, training=training)
    assert expected.kernel != "dense"
    assert (first.name, first.shape, first.kept, first.packed) == (
        "0.weight",
        (2048, 1024),
        kept,
        True,
    )
    assert (first.seconds, first.dense_seconds) == (expected.seconds, expected.dense_seconds)
    assert first.why == expected.why
    assert (first.backward if training else first.forward) == expected.kernel
    assert found.seconds == first.seconds + last.seconds
    assert found.dense_seconds == first.dense_seconds + last.dense_seconds
    assert (found.kept, found.total) == (masks.kept, masks.total)


def test_a_packed_layer_that_loses_is_not_said_to_be_dense() -> None:
    model = nn.Linear(64, 64)
    packed = pk.sparsify(model, nets.random_masks(model, 0.9), force=True)
    (row,) = pk.explain(packed, batch=512).layers
    assert row.packed
    assert row.forward in ("index", "decode")
    assert row.seconds > row.dense_seconds


def test_bytes_are_those_that_training_takes() -> None:
    model, masks = big()
    dense = copy.deepcopy(model)
    pk.sparsify(model, masks, force=True)
    found = pk.explain(model)
    measured = []
    for network in (model, dense):
        optimizer = torch.optim.Adam([p for n, p in network.named_parameters() if "bias" not in n])
        network(torch.randn(4, 1024, requires_grad=True)).sum().backward()
        optimizer.step()
        steps = sum(4 for _ in optimizer.state)  # a float32 counter each
        measured.append(nets.held_bytes(network, optimizer) - steps)
    assert pk.explain(model).nbytes == found.nbytes == measured[0]
    assert found.dense_nbytes == measured[1]
    assert found.nbytes < 0.2 * found.dense_nbytes


def test_layers_left_alone() -> None:
    model, masks = big()
    model.append(nn.MultiheadAttention(10, 2))
    found = pk.explain(model, batch=64)
    assert [row.name for row in found.layers] == [
        "0.weight",
        "2.weight",
        "3.in_proj_weight",
        "3.out_proj.weight",
    ]
    assert all(
        (row.packed, row.forward, row.backward) == (False, "dense", "dense") for row in found.layers
    )
    assert found.layers[0].kept == 1024 * 2048
    assert found.layers[0].nbytes == found.layers[0].dense_nbytes == 16 * 1024 * 2048
    assert found.layers[3].why == "MultiheadAttention reads it past the layer"
    assert found.layers[3].seconds is None
    masks.apply(model)
    (row, *_) = pk.explain(model, batch=64).layers
    assert row.kept == masks.kept_by_layer["0.weight"]
    assert row.why.startswith("pk.sparsify would pack it: ")


def test_the_table() -> None:
    model, masks = big()
    pk.sparsify(model, masks, batch=64)
    lines = str(pk.explain(model, batch=64)).splitlines()
    assert lines[0].startswith("time: expected for a training step; memory: ")
    assert lines[1].split("  ")[0] == "weight"
    assert lines[2].startswith("0.weight  2048 x 1024")
    assert lines[4].startswith("total")
    assert "2 packed" in lines[4]
    assert len(lines) == 5
    assert str(pk.explain(model, training=False)).startswith("time: expected for the forward pass")


def test_on_a_gpu_the_backend_chooses() -> None:
    class Far:  # a tensor of another device, as far as the choice looks
        device, dtype = torch.device("cuda"), torch.float32

    layer = pk.sparsify(nn.Linear(8, 8), pk.MaskSet.from_bool({"weight": torch.eye(8)}), force=True)
    found = choice.estimate(layer, 8, Far(), None, 4, training=True)
    assert "not yet measured on cuda" in found.why
    runs = choice.packed(layer, 8, Far(), found, None, 4, bits=False, training=True)
    assert runs == ("backend", None)


def test_other_dtypes_devices_and_wrappers() -> None:
    model, masks = big()
    pk.sparsify(model, masks, force=True)
    half = pk.explain(copy.deepcopy(model).bfloat16())
    assert half.layers[0].dense_nbytes == 8 * 1024 * 2048
    double = pk.explain(copy.deepcopy(model).double())
    assert double.seconds is None
    assert "not measured" in str(double)
    meta = pk.explain(copy.deepcopy(model).to("meta"))
    assert meta.kept == masks.kept
    with torch.device("meta"):
        bare = pk.zoo.create("lenet300")
    assert pk.explain(bare).kept == 266_200
    compiled = torch.compile(model, backend="eager")
    assert pk.explain(compiled, batch=8) == pk.explain(model, batch=8)
    with pytest.raises(ValueError, match="has no Linear, Conv or attention weight"):
        pk.explain(nn.LayerNorm(3))
