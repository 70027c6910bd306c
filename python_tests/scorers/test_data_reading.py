"""What the data-driven methods do with loaders, dtypes and inputs that users bring."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import paikern as pk
from paikern.errors import PaikernWarning

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3
QUICK: dict[str, dict[str, Any]] = {"ntk_sap": {"rounds": 2}, "cropit": {"rounds": 2}}
METHODS = [row["name"] for row in pk.methods() if row["needs_data"] and not row["structured"]]


def mlp() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return net


def shuffled(size: int = 6) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), size, shuffle=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_a_loader_that_shuffles_takes_no_random_numbers(method: str, fails: bool) -> None:
    net, loader = mlp(), shuffled()
    if fails:
        loader = DataLoader(TensorDataset(X * torch.nan, Y), 6, shuffle=True)
    before = torch.get_rng_state()
    options = {"sparsity": 0.5, "data": loader, "progress": False, **QUICK.get(method, {})}
    if fails:
        with pytest.raises(ValueError, match="inputs hold NaN"):
            pk.prune(net, method, **options)
    else:
        pk.prune(net, method, **options)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["px", "prospr", "snip"])
def test_shuffling_follows_the_seed(method: str) -> None:
    made = []
    for state in (0, 1):
        torch.manual_seed(state)
        masks = pk.prune(mlp(), method, sparsity=0.5, data=shuffled(), seed=7, progress=False)
        made.append([masks[name] for name in masks])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


class Mixed(nn.Module):
    """Computes in bfloat16 by itself."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.net(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x * 2, x * 3)[0]


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2))


@pytest.mark.parametrize(
    ("build", "shape"),
    [(mlp, (9, 6)), (Attention, (3, 5, 8)), (Convolutions, (3, 2, 6, 6))],
    ids=["mlp", "attention", "convolutions"],
)
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_wanda_sees_weights_that_autocast_converts(
    build: type[nn.Module], shape: tuple[int, ...], inside: bool
) -> None:
    torch.manual_seed(0)
    net, x = build(), torch.randn(shape)
    expected = pk.score(net, "wanda", data=x, batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PaikernWarning)
        if inside:
            found = pk.score(Mixed(net), "wanda", data=x, batch_size=2)
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = pk.score(net, "wanda", data=x, batch_size=2)
    for name in expected:
        a, b = expected.dense(name), found.dense(("net." if inside else "") + name)
        torch.testing.assert_close(b, a, rtol=3e-2, atol=3e-2 * float(a.max()))


@pytest.mark.parametrize("method", ["snip", "prospr", "wanda"])
def test_data_that_say_nothing_are_told(method: str) -> None:
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    data = [(X[:6] * 0, Y[:6])] * 4
    with pytest.warns(PaikernWarning, match=f"{method}: scores carry no information"):
        pk.prune(net, method, sparsity=0.5, data=data, on_collapse="floor", progress=False)


def test_wanda_leaves_the_refusal_of_a_shape_to_the_layer() -> None:
    with pytest.raises(ValueError, match=r"\(Conv2d\): .* expected input.* to have 2 channels"):
        pk.prune(Convolutions(), "wanda", sparsity=0.5, data=torch.ones(3, 1, 6, 6))


@pytest.mark.parametrize("method", ["snip", "grasp", "prospr"])
def test_models_of_inference_mode_are_refused(method: str) -> None:
    with torch.inference_mode():
        net = mlp()
    with pytest.raises(ValueError, match=r"0\.weight was made in torch.inference_mode"):
        pk.prune(net, method, sparsity=0.5, data=shuffled(), progress=False)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (X.numpy(), r"got ndarray; convert with torch\.from_numpy"),
        ((X.numpy(), Y.numpy()), r"got a tuple of ndarray, ndarray; convert with torch"),
        ((1.0, 2), "got a tuple of float, int$"),
        ((), "got tuple$"),
        (3, "got int$"),
    ],
    ids=["array", "arrays", "numbers", "nothing", "number"],
)
def test_batches_of_no_form_are_told_by_what_they_hold(batch: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pk.prune(mlp(), "wanda", sparsity=0.5, data=[batch])
