"""Whole runs on a model that lies on the GPU: what the CPU finds, and the same from run to run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import paikern as pk
from paikern import ops
from paikern.backends import registry
from python_tests.cuda_source.test_device_loop import NETS

pytestmark = pytest.mark.gpu

#: Those that score by values of the weights alone: no sum is added in another order.
EXACT = ("magnitude", "random")
#: Short, so that differences in the last bits have no hundreds of steps to grow in.
OPTIONS: dict[str, dict[str, Any]] = {
    "dpai": {"steps": 5},
    "synflow": {"rounds": 5},
    "synflow_l2": {"rounds": 5},
    "logsynflow": {"rounds": 5},
    "px": {"rounds": 5},
}
METHODS = [row["name"] for row in pk.methods()]


def pruned(method: str, device: str, **options: Any) -> pk.MaskSet:
    net = pk.zoo.create("resnet20", num_classes=10, seed=0).eval().to(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 32, 32, generator=generator).to(device)
    if method == "px":
        options["data"] = torch.rand(16, 3, 32, 32, generator=generator).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = pk.prune(net, method, sparsity=0.9, example_inputs=x, **OPTIONS.get(method, {}),
                         **options)  # fmt: skip
    for name, weight in net.named_parameters():
        if name in masks:
            assert weight.device.type == torch.device(device).type
            assert not weight[~masks[name].to(weight.device)].any(), name
    return masks


def shared(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The share of kept weights that both keep."""
    both = sum(int((found[name].cpu() & wanted[name].cpu()).sum()) for name in wanted)
    return both / sum(int(mask.sum()) for mask in wanted.values())


@pytest.mark.parametrize("method", METHODS)
def test_masks_of_a_run_are_those_of_the_cpu(method: str, device: str, only: str) -> None:
    wanted = pruned(method, "cpu", backend="cpu")
    found = pruned(method, device)
    assert found.kept == wanted.kept
    assert list(found) == list(wanted)
    agreement = shared(found, wanted)
    if method in EXACT:
        assert agreement == 1.0
    else:
        assert agreement >= 0.999, agreement


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_the_same_again(method: str, device: str, only: str) -> None:
    first, second = (pruned(method, device) for _ in range(2))
    for name in first:
        assert torch.equal(first.packed(name).cpu(), second.packed(name).cpu()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sweeps_of_a_large_layer(dtype: torch.dtype, device: str, backend: str) -> None:
    rows, columns = (70, 130) if device == "cpu" else (5000, 8200)
    weight = torch.randn(rows, columns).to(dtype)
    x, g = torch.rand(columns), torch.rand(rows)
    mask = ops.pack_mask(torch.rand(rows, columns) < 0.3)
    there = [t.to(device) for t in (weight, x, g, mask)]
    truth = weight.double().abs() * ops.unpack_mask(mask, (rows, columns))

    def sweeps() -> list[Tensor]:
        w, a, b, m = there
        with registry.using(backend):
            return [
                ops.path_forward(w, a, mask=m),
                ops.path_backward(w, b, mask=m),
                *ops.path_sweep(w, a, b, 0.5, mask=m),
            ]

    found = sweeps()
    for vector, wanted in ((found[0], truth @ x.double()), (found[1], truth.T @ g.double())):
        assert ((vector.cpu().double() - wanted).abs() <= 1e-5 * wanted.max()).all()
    assert all(map(torch.equal, found, sweeps()))
    with registry.using("cpu"):
        bits, kept = ops.path_sweep(weight, x, g, 0.5, mask=mask)[1:]
    assert torch.equal(found[3].cpu(), bits)
    assert int(found[4]) == int(kept)
    assert torch.equal(found[2].cpu(), found[1].cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_selection_of_many_scores(dtype: torch.dtype, device: str, backend: str) -> None:
    n = 9_000 if device == "cpu" else 20_000_003
    scores = [torch.randn(n).to(dtype), torch.randn(n // 7).to(dtype)]
    there = [s.to(device) for s in scores]
    for k in (n // 100, n // 2):
        with registry.using(backend):
            found = ops.topk_mask(there, k, absolute=True)
        with registry.using("cpu"):
            wanted = ops.topk_mask(scores, k, absolute=True)
        assert all(torch.equal(f.cpu(), w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("method", ["synflow", "dpai"])
@pytest.mark.parametrize("name", NETS)
def test_loops_of_many_networks(name: str, method: str, device: str, only: str) -> None:
    """Whole rounds and steps from the table, replayed, in grids of every size."""
    torch.manual_seed(0)
    net, x = NETS[name]()
    options: dict[str, Any] = {"rounds": 8} if method == "synflow" else {"steps": 8}
    options |= {"sparsity": 0.8, "apply": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = pk.prune(net, method, example_inputs=x, **options)
        net, x = net.to(device), x.to(device)
        found, again = (pk.prune(net, method, example_inputs=x, **options) for _ in range(2))
    assert found.kept == wanted.kept
    assert shared(found, wanted) >= 0.99  # chaotic where few weights are kept
    for layer in found:
        assert torch.equal(found.packed(layer).cpu(), again.packed(layer).cpu()), layer
