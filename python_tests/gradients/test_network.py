"""`Network`: gradients and Hessian products of a run's model, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paikern as pk
from paikern.batches import Batch
from paikern.errors import NonFiniteScoreError, PaikernError
from paikern.gradients import Network, make_loss
from paikern.prunable import prunable_parameters
from paikern.scorers import Run
from python_tests.gradients.nets import batches, make
from python_tests.oracles import gradients as oracle


def run_of(model: nn.Module, **masks: Tensor) -> Run:
    layers = prunable_parameters(model)
    state = {n: p.detach() for n, p in model.named_parameters()}
    state.update({n: state[layer.source] for n, layer in layers.items()})
    return Run(model, state, layers, masks={n: pk.ops.pack_mask(m) for n, m in masks.items()})


def network(run: Run, mode: str = "train", loss_fn: Any = None) -> Network:
    return Network(run, make_loss(loss_fn), mode)


def made(name: str, count: int = 2) -> list[Batch]:
    return [Batch(b, b["labels"]) if isinstance(b, dict) else Batch(*b)
            for b in batches(name, count)]  # fmt: skip


def some_masks(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {
        n: torch.rand(m.shape, generator=generator) < 0.6 for n, m in oracle.ones(model).items()
    }


@pytest.mark.parametrize("name", ["mlp", "conv", "bert", "gpt2"])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_gradients_and_products_equal_the_oracle(name: str, masked: bool) -> None:
    model = make(name)
    masks = some_masks(model) if masked else oracle.ones(model)
    slopes, product = oracle.gradient_and_product(model, batches(name), masks)
    run = run_of(model, **(masks if masked else {}))
    with network(run).running() as net:
        found = net.gradients(made(name))
        twice = net.hessian_product(found, made(name))
    assert list(found) == list(twice) == list(slopes)
    for mine, expected in ((found, slopes), (twice, product)):
        size = max(float(e.abs().max()) for e in expected.values())
        for key, value in expected.items():
            torch.testing.assert_close(mine[key].double(), value, rtol=1e-4, atol=1e-5 * size)


def test_unequal_batches_count_by_their_samples() -> None:
    model = make("conv")
    x, y = batches("conv", 1)[0]
    parts = [Batch(x[:6], y[:6]), Batch(x[6:], y[6:])]
    with network(run_of(model), "eval").running() as net:
        whole, split = net.gradients([Batch(x, y)]), net.gradients(parts)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name] * 6 / 9, gradient, rtol=1e-4, atol=1e-7)


def test_opposite_gradients_cancel() -> None:
    run = run_of(make("mlp"))
    x = torch.ones(3, 7)
    with network(run, loss_fn=lambda y, sign: (y.sum(1) * sign).mean()).running() as net:
        found = net.gradients([Batch(x, torch.ones(3)), Batch(x, -torch.ones(3))])
    assert all(bool((g == 0).all()) for g in found.values())


def test_gradients_are_handed_over_one_at_a_time() -> None:
    run = run_of(make("mlp"))
    seen: list[str] = []

    def consume(name: str, gradient: Tensor) -> None:
        assert all(leaf.grad is None for leaf in net.weights.values())
        assert not gradient.requires_grad
        seen.append(name)

    with network(run).running() as net:
        net.backward(net.loss(made("mlp")[0]), consume)
    assert seen == ["4.weight", "2.weight", "0.weight"]


def test_leaves_are_aliases_and_masked_ones_are_copies() -> None:
    model = make("mlp")
    mask = torch.zeros(12, 7, dtype=torch.bool)
    mask[0, 0] = True
    net = network(run_of(model, **{"0.weight": mask}))
    assert net.weights["2.weight"].data_ptr() == model[2].weight.data_ptr()
    assert net.weights["0.weight"].data_ptr() != model[0].weight.data_ptr()
    assert torch.equal(net.weights["0.weight"], model[0].weight * mask)


def test_half_precision_gradients_add_up_in_float32() -> None:
    model = make("mlp").bfloat16()
    with network(run_of(model)).running() as net:
        found = net.gradients([Batch(b.inputs.bfloat16(), b.targets) for b in made("mlp")])
    assert {g.dtype for g in found.values()} == {torch.float32}


class Tied(nn.Module):
    """One weight in two layers, another that the output does not use, a third detached."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.unused, self.cut = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x))) + self.cut(x).detach()
        return y


def test_tied_weights_add_up_and_weights_out_of_reach_are_noted() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, x = Tied(), torch.randn(4, 5)
    run = run_of(model)
    with network(run, loss_fn=lambda y, _: y.square().mean()).running() as net:
        found = net.gradients([Batch(x)])
    model(x).square().mean().backward()
    assert list(found) == ["first.weight", "unused.weight", "cut.weight"]
    torch.testing.assert_close(found["first.weight"], model.first.weight.grad)
    assert float(found["unused.weight"].abs().max()) == float(found["cut.weight"].abs().max()) == 0
    assert run.notes == [
        "no gradient reaches unused.weight, cut.weight; their scores are 0 (use ignore= to leave "
        "them dense)"
    ]


def test_a_frozen_weight_is_refused_by_name() -> None:
    model = make("mlp")
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"2\.weight is frozen .*ignore=\['2\.weight'\]"):
        network(run_of(model))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


class Mean(nn.Module):
    """An operation without a second derivative between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(Once.apply(torch.tanh(self.a(x))))
        return y


def test_what_cannot_be_differentiated_twice_is_named() -> None:
    batch = Batch(torch.ones(2, 3), torch.tensor([0, 1]))
    with network(run_of(Mean())).running() as net:
        slopes = net.gradients([batch])  # once is fine
        with pytest.raises(PaikernError, match=r"differentiated as often .*once_differentiable"):
            net.hessian_product(slopes, [batch])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_differentiated_twice(attention: str) -> None:
    model = make("bert")
    model.set_attn_implementation(attention)
    with network(run_of(model)).running() as net:
        slopes = net.gradients(made("bert"))
        assert all(bool((h != 0).any()) for h in net.hessian_product(slopes, made("bert")).values())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(2, 3, 2, 2), r"torch.float32 \[2, 3, 2, 2\]: head \(Linear\): mat1 and mat2"),
        (torch.ones(1, 3, 1), r"body \(Conv2d\): "),
        (torch.ones(2, 4, 8, 8), r"stem \(Conv2d\): Given groups=1"),
        (torch.ones(1, 3, 2, 2), r"norm1 \(BatchNorm2d\): Expected more than 1 value per channel"),
        (torch.ones(2, 3, 8, 8).double(), r"torch.float64 \[2, 3, 8, 8\]: stem \(Conv2d\): "),
    ],
    ids=["flat", "dimensions", "channels", "one value", "dtype"],
)
def test_a_batch_that_does_not_fit_is_refused_at_its_layer(inputs: Tensor, message: str) -> None:
    model = make("conv")
    if "head" in message:
        model.wide = nn.Conv2d(6, 9, 1)
    if "body" in message:
        model.stem, model.norm1 = nn.Identity(), nn.Identity()
    labels = torch.zeros(len(inputs), dtype=torch.long)
    expected = pytest.raises(ValueError, match=f"does not take a batch of .*{message}")
    with network(run_of(model)).running() as net, expected:
        net.loss(Batch(inputs, labels))


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda y, t: y.sum() * float("nan"), "is nan; look for"),
        (lambda y, t: y.exp().sum() * float("inf"), "is inf; look for"),
        (lambda y, t: y.detach().sum(), "does not depend on the weights"),
    ],
)
def test_losses_that_carry_nothing(loss_fn: Any, message: str) -> None:
    expected = pytest.raises(ValueError, match=f"loss_fn: the loss of batch 3 {message}")
    with network(run_of(make("mlp")), loss_fn=loss_fn).running() as net, expected:
        net.loss(made("mlp")[0], 3)


def test_a_gradient_that_is_not_finite_names_the_layer() -> None:
    # The root of 0 has the value 0 and an infinite slope.
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
    with network(run_of(model), loss_fn=lambda y, t: y.abs().sqrt().sum()).running() as net:
        with pytest.raises(NonFiniteScoreError, match=r"gradient of 0\.weight holds 4 NaN"):
            net.gradients([Batch(torch.ones(1, 2))])
        assert all(leaf.grad is None for leaf in net.weights.values())


def test_running_under_no_grad_and_inference_mode() -> None:
    model, batch = make("mlp"), made("mlp")[0]
    with network(run_of(model)).running() as net:
        expected = net.gradients([batch])
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            inside = Batch(batch.inputs + 0, batch.targets)
            with network(run_of(model)).running() as net:
                found = net.gradients([inside])
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient)


def test_checkpointed_blocks_are_computed_again_under_the_same_masks() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.again = inner, True

        def forward(self, x: Tensor) -> Tensor:
            if not self.again:
                return self.inner(x)  # type: ignore[no-any-return]
            return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]

    model = Checkpointed(make("mlp"))
    masks = {f"inner.{n}": m for n, m in some_masks(model.inner).items()}
    results = []
    for model.again in (False, True):
        with network(run_of(model, **masks)).running() as net:
            results.append(net.gradients(made("mlp")))
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient)


def test_loss_equals_torch() -> None:
    model, batch = make("mlp"), made("mlp")[0]
    with network(run_of(model)).running() as net:
        torch.testing.assert_close(
            net.loss(batch), F.cross_entropy(model(batch.inputs), batch.targets)
        )
