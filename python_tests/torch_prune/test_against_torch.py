"""Scripts that run unchanged with torch's pruning and with ours, compared bit for bit."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from python_tests.torch_prune.side_by_side import assert_same, both


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 36, 10),
    )


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Tensor]:
    losses = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        loss = functional.cross_entropy(net(x), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    # torch's pruning goes by the weights of the last forward pass, which are a step behind.
    net(torch.zeros(2, 3, 8, 8))
    return losses


CALLS: dict[str, Any] = {
    "l1": lambda p, m: p.l1_unstructured(m, "weight", amount=0.3),
    "l1-count": lambda p, m: p.l1_unstructured(m, "weight", 2),
    "random": lambda p, m: p.random_unstructured(m, name="weight", amount=0.3),
    "ln": lambda p, m: p.ln_structured(m, "weight", amount=0.4, n=2, dim=0),
    "ln-inf": lambda p, m: p.ln_structured(m, name="weight", amount=1, n=math.inf, dim=1),
    "ln-last": lambda p, m: p.ln_structured(m, "weight", 0.2, 1, -1),
    "random-channels": lambda p, m: p.random_structured(m, "weight", amount=1, dim=1),
    "identity": lambda p, m: p.identity(m, "weight"),
    "mask": lambda p, m: p.custom_from_mask(m, "weight", m.weight.detach() > -0.05),
    "class": lambda p, m: p.L1Unstructured.apply(m, "weight", amount=0.25) and None,
}


@pytest.mark.parametrize("second", CALLS)
@pytest.mark.parametrize("first", CALLS)
def test_two_calls(first: str, second: str) -> None:
    def script(library: ModuleType, net: nn.Sequential) -> Any:
        for call in (first, second):
            for index in (0, 4):
                CALLS[call](library, net[index])
        return train(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9))

    assert_same(*both(conv_net, script))


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adam-fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_iterated_global_pruning_and_training(optimizer: str) -> None:
    def script(library: ModuleType, net: nn.Sequential) -> Any:
        opt = OPTIMIZERS[optimizer](net.parameters())
        pairs = [(net[0], "weight"), (net[4], "weight"), (net[4], "bias")]
        results = []
        for amount in (0.2, 0.3, 100):
            library.global_unstructured(pairs, pruning_method=library.L1Unstructured, amount=amount)
            results += train(net, opt)
            zeros = [getattr(m, f"{n}_mask") == 0 for m, n in pairs]
            pruned = [getattr(m, n)[z] for (m, n), z in zip(pairs, zeros, strict=True)]
            assert not torch.cat(pruned).any()
        return results

    assert_same(*both(conv_net, script))


def test_global_random_pruning() -> None:
    def script(library: ModuleType, net: nn.Sequential) -> None:
        for amount in (0.4, 50):
            library.global_unstructured(
                [(net[0], "weight"), (net[4], "weight")],
                pruning_method=library.RandomUnstructured,
                amount=amount,
            )

    assert_same(*both(conv_net, script))


def test_global_importance() -> None:
    def script(library: ModuleType, net: nn.Sequential) -> None:
        pairs = [(net[0], "weight"), (net[4], "weight")]
        scores = {(net[0], "weight"): torch.rand_like(net[0].weight)}
        for amount in (0.4, 0.5):
            library.global_unstructured(pairs, library.L1Unstructured, scores, amount=amount)

    assert_same(*both(conv_net, script))


@pytest.mark.parametrize("n", [0.5, 1, 3, math.inf, -math.inf])
def test_norms(n: float) -> None:
    def script(library: ModuleType, net: nn.Sequential) -> None:
        library.ln_structured(net[4], "weight", 0.3, n, 1)
        library.ln_structured(net[0], "weight", 2, n, 0)

    assert_same(*both(conv_net, script))


@pytest.mark.parametrize(("n", "shape"), [("nuc", (3, 4, 5)), ("fro", (3, 4, 5)), ("fro", (3, 4))])
def test_matrix_norms(n: str, shape: tuple[int, ...]) -> None:
    def make() -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(torch.randn(shape))
        return module

    def script(library: ModuleType, module: nn.Module) -> Any:
        try:
            library.ln_structured(module, "weight", 2, n, -1)
        except RuntimeError:  # whatever torch.norm refuses
            return "refused"
        return int(module.weight_mask.sum())

    assert_same(*both(make, script))


def test_importance_scores() -> None:
    def script(library: ModuleType, net: nn.Sequential) -> None:
        for layer in (net[0], net[4]):
            scores = torch.randn_like(layer.weight)
            library.l1_unstructured(layer, "weight", 0.3, importance_scores=scores)
            library.ln_structured(layer, "weight", 0.3, 1, 0, importance_scores=-scores)
            library.l1_unstructured(layer, "weight", 5, importance_scores=scores.square())

    assert_same(*both(conv_net, script))


def test_remove_and_prune_again() -> None:
    def script(library: ModuleType, net: nn.Sequential) -> Any:
        results = []
        for _ in range(2):
            library.l1_unstructured(net[4], "weight", 0.3)
            library.random_unstructured(net[4], "bias", 3)
            results += train(net, torch.optim.SGD(net.parameters(), 0.1))
            for name in ("weight", "bias"):
                library.remove(net[4], name)
            assert not library.is_pruned(net)
            results.append(list(net.state_dict()))
            results.append(list(net.state_dict().values()))
        return results

    assert_same(*both(conv_net, script))


def test_custom_methods() -> None:
    def script(library: ModuleType, net: nn.Sequential) -> Any:
        class EveryOther(library.BasePruningMethod):
            PRUNING_TYPE = "unstructured"

            def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
                mask = default_mask.clone()
                mask.view(-1)[::2] = 0
                return mask

        class Below(EveryOther):
            def __init__(self, bound: float) -> None:
                self.bound = bound

            def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
                return torch.abs(t) > self.bound

        class FirstRow(library.BasePruningMethod):
            PRUNING_TYPE = "structured"
            dim = 0

            def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
                mask = default_mask.clone()
                mask[0] = 0
                return mask

        class Corner(library.BasePruningMethod):
            PRUNING_TYPE = "global"

            def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
                mask = default_mask.clone()
                mask[..., -1] = 0
                return mask

        class HalfAgain(library.L1Unstructured):
            def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
                return super().compute_mask(t * 2, default_mask)

        class GlobalL1(library.L1Unstructured):
            PRUNING_TYPE = "global"

        EveryOther.apply(net[4], "weight")
        Below.apply(net[0], "weight", 0.03)
        for layer in (net[0], net[4]):
            EveryOther.apply(layer, "weight")
            FirstRow.apply(layer, "weight")
            Corner.apply(layer, "weight")
            FirstRow.apply(layer, "weight")
            HalfAgain.apply(layer, "weight", amount=0.2)
            Below.apply(layer, "weight", bound=0.01)
            GlobalL1.apply(layer, "weight", amount=0.9)
        library.global_unstructured([(net[0], "weight"), (net[4], "weight")], EveryOther)
        library.global_unstructured([(net[0], "bias"), (net[4], "bias")], Below, bound=0.02)
        return train(net, torch.optim.SGD(net.parameters(), 0.1))

    # Local classes have the same names in both runs, so the hooks compare as well.
    assert_same(*both(conv_net, script))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    calls=st.lists(
        st.tuples(
            st.sampled_from(["l1", "random", "ln", "random_structured"]),
            st.one_of(st.floats(0, 1), st.integers(0, 3)),
            st.integers(-4, 3),
            st.sampled_from([1, 2, math.inf]),
        ),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_calls(shape: list[int], calls: list[Any], dtype: torch.dtype) -> None:
    """Either both refuse the same call, or both give the same."""

    def make() -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(torch.randn(shape, dtype=dtype))
        return module

    def script(library: ModuleType, module: nn.Module) -> Any:
        for kind, amount, dim, n in calls:
            try:
                if kind == "l1":
                    library.l1_unstructured(module, "weight", amount)
                elif kind == "random":
                    library.random_unstructured(module, "weight", amount)
                elif kind == "ln":
                    library.ln_structured(module, "weight", amount, n, dim)
                else:
                    library.random_structured(module, "weight", amount, dim)
            except (ValueError, IndexError):
                # torch's pruning has lost its hook by now, so the comparison ends here. Where two
                # things are wrong the errors may differ.
                return [kind, amount, dim]
        return module.weight.detach()

    torchs, ours = both(make, script)
    if torchs._forward_pre_hooks:
        assert_same(torchs, ours)


def error_of(library: ModuleType, call: Any) -> type[Exception]:
    layer = nn.Linear(4, 3)
    with pytest.raises(Exception) as caught:
        call(library, layer)
    return caught.type


ERRORS: dict[str, Any] = {
    "no number": lambda p, m: p.l1_unstructured(m, "weight", "half"),
    "fraction above 1": lambda p, m: p.l1_unstructured(m, "weight", 1.5),
    "negative": lambda p, m: p.random_unstructured(m, "weight", -1),
    "more than there is": lambda p, m: p.l1_unstructured(m, "weight", 13),
    "more channels than there are": lambda p, m: p.random_structured(m, "weight", 5, dim=1),
    "channels of a vector": lambda p, m: p.ln_structured(m, "bias", 1, n=1, dim=0),
    "no such dimension": lambda p, m: p.ln_structured(m, "weight", 1, n=1, dim=2),
    "no such negative dimension": lambda p, m: p.random_structured(m, "weight", 1, dim=-3),
    "no such parameter": lambda p, m: p.identity(m, "wait"),
    "scores of another shape": lambda p, m: p.l1_unstructured(
        m, "weight", 1, importance_scores=torch.ones(4, 3)
    ),
    "missing argument": lambda p, m: p.L1Unstructured.apply(m, "weight"),
    "remove the unpruned": lambda p, m: p.remove(m, "weight"),
    "abstract": lambda p, m: p.BasePruningMethod(),
    "parameters of no list": lambda p, m: p.global_unstructured(3, p.L1Unstructured, amount=1),
    "scores in a list": lambda p, m: p.global_unstructured(
        [(m, "weight")], p.L1Unstructured, [torch.ones(3, 4)], amount=1
    ),
    "global channels": lambda p, m: p.global_unstructured(
        [(m, "weight")], p.RandomStructured, amount=1
    ),
    "global: more than there is": lambda p, m: p.global_unstructured(
        [(m, "weight"), (m, "bias")], p.L1Unstructured, amount=16
    ),
    "a method of another parameter": lambda p, m: p.PruningContainer(
        p.L1Unstructured.apply(m, "weight", 1)
    ).add_pruning_method(p.L1Unstructured.apply(m, "bias", 1)),
    "no method": lambda p, m: p.PruningContainer(
        p.L1Unstructured.apply(m, "weight", 1)
    ).add_pruning_method(10),
    "not a parameter": lambda p, m: p.l1_unstructured(
        nn.utils.parametrizations.weight_norm(m), "weight", 1
    ),
    "None": lambda p, m: p.l1_unstructured(nn.Linear(2, 2, bias=False), "bias", 1),
}


@pytest.mark.parametrize("name", ERRORS)
def test_same_classes_of_errors(name: str) -> None:
    from torch.nn.utils import prune as torch_prune

    from paikern import torch_prune as prune

    expected = error_of(torch_prune, ERRORS[name])
    assert issubclass(error_of(prune, ERRORS[name]), expected)
