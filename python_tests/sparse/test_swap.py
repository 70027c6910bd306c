"""sparsify and densify: what is swapped, what is left alone, and that failures change nothing."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import paikern as pk
from paikern.pathgraph import trace
from paikern.sparse import swap
from paikern.zoo.gpt2 import Conv1D
from python_tests.sparse import nets
from python_tests.sparse.nets import assert_equal

Log = pytest.LogCaptureFixture


def masked(model: nn.Module, density: float = 0.2) -> tuple[pk.MaskSet, dict[str, torch.Tensor]]:
    """Random masks, and the state that the model has with them applied."""
    masks = nets.random_masks(model, density)
    twin = copy.deepcopy(model)
    masks.apply(twin)
    return masks, {name: value.clone() for name, value in twin.state_dict().items()}


def kinds(model: nn.Module) -> list[str]:
    known = (nn.Linear, nn.Conv2d, Conv1D, pk.MaskedLinear, pk.MaskedConv1D)
    return [type(module).__name__ for module in model.modules() if isinstance(module, known)]


@pytest.mark.parametrize("kind", ["mlp", "mixer"])
def test_there_and_back(kind: str) -> None:
    model = nets.net(kind)
    masks, state = masked(model)
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    before = kinds(model)
    x = torch.randn(7, 24)
    packed = pk.sparsify(model, masks, force=True)
    assert packed is model
    assert not {"Linear", "Conv1D"} & set(kinds(model))
    assert torch.allclose(model(x), twin(x), atol=1e-5)
    assert pk.MaskSet.from_model(model) == masks
    assert list(pk.MaskSet.from_model(model)) == list(masks)
    masks.verify(model)
    assert_equal(nets.dense_state(model), state)
    assert pk.densify(model) is model
    assert kinds(model) == before
    assert list(model.state_dict()) == list(state)
    assert_equal(model.state_dict(), state)
    assert torch.equal(model(x), twin(x))


def test_a_layer_alone_is_returned() -> None:
    layer = nn.Linear(5, 3)
    masks, state = masked(layer)
    packed = pk.sparsify(layer, masks, force=True)
    assert isinstance(packed, pk.MaskedLinear)
    assert isinstance(layer.weight, nn.Parameter)
    assert pk.MaskSet.from_model(packed) == masks
    assert [entry.name for entry in pk.explain(packed).layers] == ["weight"]
    dense = pk.densify(packed)
    assert type(dense) is nn.Linear
    assert_equal(dense.state_dict(), state)


def test_only_where_it_wins(caplog: Log) -> None:
    model = nn.Sequential(nn.Linear(2048, 1024), nn.Linear(1024, 16), nn.Linear(16, 4))
    masks = pk.MaskSet.from_bool(
        {
            "0.weight": torch.rand(1024, 2048) < 0.02,
            "1.weight": torch.rand(16, 1024) < 0.95,
            "2.weight": torch.rand(4, 16) < 0.5,
        }
    )
    with caplog.at_level(logging.WARNING, "paikern"):
        pk.sparsify(model, masks, batch=64)
    assert kinds(model) == ["MaskedLinear", "Linear", "Linear"]
    assert torch.equal(model[1].weight != 0, masks["1.weight"])
    assert len(caplog.records) == 1
    text = caplog.text
    assert "1 of 3 weights are packed" in text
    assert "1.weight (" in text
    assert "2.weight (" in text
    masks.verify(model)
    assert pk.MaskSet.from_model(model) == masks
    found = pk.explain(model, batch=64)
    assert [row.packed for row in found.layers] == [True, False, False]
    assert [row.kept for row in found.layers] == list(masks.kept_by_layer.values())
    # The dense ones are kept by the masks, the packed one keeps itself.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    handle = masks.attach(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(3, 2048)).square().sum().backward()
        optimizer.step()
    masks.verify(model)
    handle.remove()


def test_the_number_of_rows_decides() -> None:
    def packed(training: bool = False, **how: object) -> bool:
        model = nn.Linear(512, 512)
        masks = pk.MaskSet.from_bool({"weight": (torch.randperm(512 * 512) < 13107).view(512, 512)})
        return isinstance(pk.sparsify(model, masks, training=training, **how), pk.MaskedLinear)

    estimates = {n: swap.choice.masked_cost.estimate("cpu", 512, 512, 13107, n) for n in (1, 4096)}
    for rows, estimate in estimates.items():
        wins = estimate.kernel != "dense"
        assert packed(batch=rows) == wins
        assert packed(example_inputs=torch.ones(rows, 512)) == wins
    # Leading axes count together.
    assert packed(example_inputs=torch.ones(1, 4096, 512)) == (estimates[4096].kernel != "dense")


def test_example_inputs_leave_the_model_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    pk.explain(model, example_inputs=torch.randn(3, 8))
    pk.explain(model, example_inputs=(torch.randn(3, 8),))
    pk.explain(model, example_inputs={"input": torch.randn(3, 8)})
    torch.random.set_rng_state(state)
    assert_equal(model.state_dict(), before)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(TypeError, match=r"explain: example_inputs must be a tensor.* got int"):
        pk.explain(model, example_inputs=3)
    with pytest.raises(ValueError, match=r"explain: the model does not run .* multiplied"):
        pk.explain(model, example_inputs=torch.randn(3, 9))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.twice = self.a

    model = Tied()
    masks, state = masked(model)
    assert list(masks) == ["a.weight"]
    pk.sparsify(model, masks, force=True)
    assert model.a.weight is model.b.weight
    assert model.twice is model.a
    assert len(list(model.parameters())) == 3
    masks.verify(model)
    aliased = pk.MaskSet.from_bool({"b.weight": masks["a.weight"]})
    aliased.verify(model)
    twin = copy.deepcopy(model)
    assert twin.a.weight is twin.b.weight
    pk.densify(model)
    assert model.a.weight is model.b.weight
    assert model.twice is model.a
    assert_equal(model.state_dict(), state)


def test_a_weight_that_an_embedding_shares_stays_dense(caplog: Log) -> None:
    model = pk.zoo.create("gpt2", vocabulary=11, positions=16, layers=1, dim=8, heads=2, seed=0)
    masks = pk.MaskSet.from_bool({"lm_head.weight": torch.rand(11, 8) < 0.5})
    pk.sparsify(model, masks, force=True)
    assert "lm_head.weight (tied weight: Embedding.weight has no packed form)" in caplog.text
    assert torch.equal(model.transformer.wte.weight != 0, masks["lm_head.weight"])


def test_what_cannot_be_packed_is_told(caplog: Log) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.doubled = Doubled(8, 8)
            self.parametrized = parametrizations.orthogonal(nn.Linear(8, 8))
            self.pruned = nn.Linear(8, 8)
            prune.l1_unstructured(self.pruned, "weight", 0.25)
            self.signal = nn.Conv1d(8, 8, 3)
            self.extra = nn.Linear(8, 8)
            self.extra.register_buffer("scale", torch.ones(1))
            self.patched = nn.Linear(8, 8)
            self.patched.forward = lambda x: x  # type: ignore[method-assign]
            self.plain = nn.Linear(8, 8)

    model = Odd().eval()
    names = list(pk.MaskSet.from_model(model))
    masks = pk.MaskSet.from_bool(
        {n: torch.rand(s) < 0.5 for n, s in pk.MaskSet.from_model(model).shapes.items()}
        | {"pruned.weight": model.pruned.weight_mask != 0}
    )
    masks = pk.MaskSet.from_bool({n: masks[n] for n in names if n != "parametrized.weight"})
    pk.sparsify(model, masks, force=True)
    assert [name for name, m in model.named_modules() if isinstance(m, pk.MaskedLinear)] == [
        "plain"
    ]
    reasons = {row.name: row.why for row in pk.explain(model).layers}
    assert "has no packed form" in reasons["attention.in_proj_weight"]
    assert reasons["attention.out_proj.weight"] == "MultiheadAttention reads it past the layer"
    assert reasons["encoder.linear1.weight"] == "TransformerEncoderLayer reads it past the layer"
    assert "Doubled.weight has no packed form" in reasons["doubled.weight"]
    assert "remove the parametrization" in reasons["parametrized.weight"]
    assert "prune.remove(layer, 'weight')" in reasons["pruned.weight"]
    assert "Conv1d.weight has no packed form" in reasons["signal.weight"]
    assert "holds more than a weight and a bias" in reasons["extra.weight"]
    assert "has no packed form" in reasons["patched.weight"]
    assert "1 of 12 weights are packed" in caplog.text
    assert "; and 3 more" in caplog.text
    masks.verify(model)
    x = torch.randn(2, 4, 8)
    with torch.no_grad():  # the fast paths of attention and of the encoder read weights
        assert model.encoder(x).shape == x.shape
        assert model.attention(x, x, x)[0].shape == x.shape


def test_hooks_modes_and_frozen_weights_go_along() -> None:
    model = nets.net("mlp").eval()
    model.again.train()
    model.last.weight.requires_grad_(False)
    calls: list[str] = []
    handle = model.first.register_forward_hook(lambda *_: calls.append("hook"))
    bias = model.first.bias
    masks, _ = masked(model)
    for change in (lambda: pk.sparsify(model, masks, force=True), lambda: pk.densify(model)):
        change()
        model(torch.ones(2, 24))
        assert model.first.bias is bias
        assert not model.first.training
        assert model.again.training
    assert calls == ["hook"] * 2
    assert not model.last.weight.requires_grad
    assert model.first.weight.requires_grad
    handle.remove()
    model(torch.ones(2, 24))
    assert len(calls) == 2


def test_wrapped_models() -> None:
    model = nets.net("mlp")
    masks, state = masked(model)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 24)
    compiled(x)
    assert pk.sparsify(compiled, masks, force=True) is compiled
    assert isinstance(model.first, pk.MaskedLinear)
    assert torch.allclose(compiled(x), model(x))
    masks.verify(compiled)
    pk.densify(compiled)
    assert_equal(model.state_dict(), state)
    alone = torch.compile(nn.Linear(4, 4), backend="eager")
    with pytest.raises(ValueError, match=r"a layer by itself is compiled .*\(\._orig_mod\)"):
        pk.sparsify(alone, nets.random_masks(alone), force=True)
    assert type(alone._orig_mod) is nn.Linear
    parallel = nn.DataParallel(model)
    for change in (lambda: pk.sparsify(parallel, masks), lambda: pk.densify(parallel)):
        with pytest.raises(ValueError, match=r"DataParallel holds the parameters .*\(\.module\)"):
            change()
    average = torch.optim.swa_utils.AveragedModel(model)
    pk.sparsify(average, masks, force=True)
    assert isinstance(average.module.first, pk.MaskedLinear)
    masks.verify(average)


def test_packed_twice_and_pruned_again() -> None:
    model = nets.net("mlp")
    masks, state = masked(model)
    pk.sparsify(model, masks, force=True)
    pk.sparsify(model, masks, force=True)  # nothing is left to do
    assert_equal(nets.dense_state(model), state)
    fewer = pk.MaskSet.from_bool({n: m & (torch.rand(m.shape) < 0.5) for n, m in masks.items()})
    assert fewer.problems(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'first.weight' is packed with weights that these masks"):
        fewer.attach(model, optimizer)
    fewer.apply(model)
    fewer.verify(model)
    with pytest.raises(ValueError, match=r"'first.weight' is packed; use pk.densify"):
        masks.to_torch_prune(model)
    with pytest.raises(ValueError, match=r"is packed with other positions; use pk.densify first"):
        pk.sparsify(model, fewer, force=True)
    with pytest.raises(ValueError, match=r"first.weight and 2 more left out: packed weights; use"):
        pk.prune(model, "magnitude", sparsity=0.5)
    mixed = nn.Sequential(model, nn.Linear(5, 5))
    with pytest.warns(pk.PaikernWarning, match=r"0.first.weight and 2 more left out: packed"):
        assert list(pk.prune(mixed, "magnitude", sparsity=0.5)) == ["1.weight"]
    with pytest.raises(
        pk.PathRuleError, match=r"trace: '0.first.weight' is packed; use pk.densify"
    ):
        trace(mixed, torch.ones(1, 24))


# --- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "mixer"])
@pytest.mark.parametrize("named", [False, True])
def test_optimizer_state_is_gathered_and_comes_back(kind: str, named: bool) -> None:
    model = nets.net(kind)
    masks, _ = masked(model)
    parameters = model.named_parameters() if named else model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, amsgrad=True, weight_decay=0.1)
    handle = masks.attach(model, optimizer)
    nets.train(model, optimizer, 4)
    twin = copy.deepcopy(model)
    masks.apply(twin)
    twins = torch.optim.AdamW(twin.parameters(), lr=3e-3, amsgrad=True, weight_decay=0.1)
    twins.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    masks.attach(twin, twins)
    gradients = {n: p.grad for n, p in model.named_parameters()}

    pk.sparsify(model, masks, force=True, optimizer=optimizer)
    group = optimizer.param_groups[0]
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    if named:
        assert group["param_names"] == [name for name, _ in model.named_parameters()]
    assert group["lr"] == 3e-3
    assert group["weight_decay"] == 0.1
    assert len(optimizer.state) == len(group["params"])
    for name, mask in masks.items():
        values = model.get_submodule(name).values
        old = twin.get_parameter(name)
        assert torch.equal(values.grad, gradients[name][mask])
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(optimizer.state[values][key], twins.state[old][key][mask])
        assert optimizer.state[values]["step"] == 4
    nets.train(model, optimizer, 4, seed=2)
    nets.train(twin, twins, 4, seed=2)
    nets.assert_close(nets.dense_state(model), twin.state_dict(), 1e-4)

    pk.densify(model, optimizer=optimizer)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    if named:
        assert group["param_names"] == [name for name, _ in model.named_parameters()]
    for name, mask in masks.items():
        for value in optimizer.state[model.get_parameter(name)].values():
            assert value.dim() == 0 or not value[~mask].any()
    nets.train(model, optimizer, 4, seed=3)  # the masks are still attached
    nets.train(twin, twins, 4, seed=3)
    nets.assert_close(model.state_dict(), twin.state_dict(), 1e-4)
    handle.remove()


def test_groups_keep_their_parameters_and_a_scheduler_its_groups() -> None:
    model = nets.net("mlp")
    masks, _ = masked(model)
    decay = [model.first.weight, model.again.weight]
    others = [model.first.bias, model.last.bias, model.last.weight]
    optimizer = torch.optim.SGD(
        [{"params": decay, "weight_decay": 0.1}, {"params": others, "lr": 0.5}], lr=0.1
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    pk.sparsify(model, masks, force=True, optimizer=optimizer)
    first, second = optimizer.param_groups
    assert first["params"][0] is model.first.weight.values
    assert (first["weight_decay"], first["lr"], second["lr"]) == (0.1, 0.1, 0.5)
    # This group was in no order of the model, so it is left in its own.
    assert [id(p) for p in second["params"]] == [
        id(p) for p in (model.first.bias, model.last.bias, model.last.weight.values)
    ]
    nets.train(model, optimizer, 1)
    scheduler.step()
    assert (first["lr"], second["lr"]) == (0.05, 0.25)


@pytest.mark.parametrize("operation", ["sparsify", "densify"])
def test_optimizers_that_do_not_fit(operation: str) -> None:
    model = nets.net("mlp")
    masks, _ = masked(model)
    if operation == "densify":
        pk.sparsify(model, masks, force=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = [id(module) for module in model.modules()]

    def fails(optimizer: object, message: str, error: type[Exception] = ValueError) -> None:
        args, kwargs = (
            ((model, masks), {"force": True}) if operation == "sparsify" else ((model,), {})
        )
        with pytest.raises(error, match=f"{operation}: .*{message}"):
            getattr(pk, operation)(*args, optimizer=optimizer, **kwargs)
        assert_equal(model.state_dict(), before)
        assert [id(module) for module in model.modules()] == layers

    fails(3, "must be a torch.optim.Optimizer, got int", TypeError)
    fails(torch.optim.LBFGS(model.parameters()), "LBFGS keeps one state")
    fails(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), "holds none of the weights")
    odd = torch.optim.SGD(model.parameters(), lr=0.1)
    parameter = next(p for n, p in model.named_parameters() if "first.weight" in n)
    odd.state[parameter] = {"factors": torch.ones(3)}
    fails(odd, r"optimizer's 'factors' of 'first.weight' has shape \(3,\)")
    assert odd.state[parameter]["factors"].shape == (3,)


# --- failures leave everything as it was ---------------------------------------------------------


def unchanged(model: nn.Module, masks: pk.MaskSet, error: type[Exception], match: str) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = [(id(m), type(m)) for m in model.modules()]
    parameters = [id(p) for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(error, match=match):
        pk.sparsify(model, masks, force=True, optimizer=optimizer)
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) or v.isnan().any() for k, v in before.items())
    assert [(id(m), type(m)) for m in model.modules()] == layers
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == parameters


def test_nan_in_a_kept_weight() -> None:
    model = nets.net("mlp")
    masks, _ = masked(model)
    at = masks["last.weight"].nonzero()[0].tolist()
    with torch.no_grad():
        model.last.weight[at[0], at[1]] = torch.nan
    message = rf"sparsify: 'last.weight': .*holds NaN at \[{at[0]}, {at[1]}\]"
    unchanged(model, masks, ValueError, message)


def test_masks_of_another_model() -> None:
    model = nets.net("mlp")
    masks, _ = masked(model)
    ones = torch.ones(2, 2, dtype=torch.bool)
    more = pk.MaskSet.from_bool({**masks, "nothing.weight": ones})
    unchanged(model, more, pk.MaskFormatError, "the model has no parameter 'nothing.weight'")
    other = pk.MaskSet.from_bool({**masks, "first.weight": ones})
    unchanged(model, other, pk.MaskFormatError, r"first.weight has shape \[40, 24\]")


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nets.net("mlp")
    masks, _ = masked(model)
    pack, count = pk.PackedWeight.from_dense, [0]

    def third_fails(*args: object) -> pk.PackedWeight:
        count[0] += 1
        if count[0] == 3:
            raise torch.OutOfMemoryError("no memory is left")
        return pack(*args)

    monkeypatch.setattr(pk.PackedWeight, "from_dense", third_fails)
    unchanged(model, masks, torch.OutOfMemoryError, "no memory is left")
    assert count == [3]
    monkeypatch.undo()

    def no_state(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory for state")

    monkeypatch.setattr(pk.PackedWeight, "gather", no_state)
    functional.cross_entropy(model(torch.ones(1, 24)), torch.zeros(1, dtype=torch.long)).backward()
    unchanged(model, masks, torch.OutOfMemoryError, "no memory for state")


def test_weights_without_values() -> None:
    with torch.device("meta"):
        model = nets.net("mlp")
    masks = pk.MaskSet.from_bool({"first.weight": torch.ones(40, 24, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"'first.weight' is on the meta device"):
        pk.sparsify(model, masks)
    with pytest.raises(ValueError, match="batch must be an int of at least 1, got 0"):
        pk.sparsify(nets.net("mlp"), masks, batch=0)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_masks(density: float) -> None:
    model = nets.net("mlp")
    masks, state = masked(model, density)
    optimizer = torch.optim.AdamW(model.parameters())
    pk.sparsify(model, masks, force=True, optimizer=optimizer)
    nets.train(model, optimizer, 2)
    masks.verify(model)
    pk.densify(model, optimizer=optimizer)
    nets.train(model, optimizer, 1)
    assert set(model.state_dict()) == set(state)
