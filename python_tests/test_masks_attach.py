"""Pruned weights stay exactly zero while a model trains."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from paikern import zoo
from paikern.errors import MaskFormatError
from paikern.masks import MaskSet
from paikern.prunable import prunable_parameters

STEPS = 30

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "momentum-foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "momentum-fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


def random_masks(model: nn.Module, density: float = 0.3) -> MaskSet:
    generator = torch.Generator().manual_seed(0)
    return MaskSet.from_bool(
        {
            n: torch.rand(p.shape, generator=generator) < density
            for n, p in prunable_parameters(model).items()
        }
    )


def batches(count: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(8, 2, 4, 4, generator=generator)
        yield x, (x.sum((1, 2, 3)) > 0).long()


def train(model: nn.Module, optimizer: Any, steps: int = STEPS) -> list[float]:
    losses = []
    for x, y in batches(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """The optimizer's tensors of the parameter's shape."""
    values = optimizer.state[parameter].values()
    return [v for v in values if isinstance(v, Tensor) and v.shape == parameter.shape]


def assert_pruned(
    masks: MaskSet, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    masks.verify(model)
    parameters = dict(model.named_parameters())
    for name in masks:
        parameter = parameters[name]
        dead = ~masks[name]
        assert not parameter.detach()[dead].any()
        # training moved on: the kept weights are alive
        assert parameter.detach()[masks[name]].all()
        if optimizer is not None:
            for value in state_tensors(optimizer, parameter):
                assert not value[dead].any()


# --- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_invariance(name: str) -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    keys = list(model.state_dict())
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks.attach(model, optimizer)
    train(model, optimizer)
    assert_pruned(masks, model, optimizer)
    assert list(model.state_dict()) == keys
    assert any(not torch.equal(start[n][masks[n]], model.get_parameter(n)[masks[n]]) for n in masks)


def test_same_as_masking_the_weight_in_the_forward() -> None:
    """SGD on a masked model equals SGD through ``weight * mask``, which is what papers do."""
    model = small_net()
    masks = random_masks(model)

    class Times(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.register_buffer("mask", mask.float())

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask

    other = copy.deepcopy(model)
    for name in masks:
        layer = other.get_submodule(name.rpartition(".")[0])
        parametrize.register_parametrization(layer, "weight", Times(masks[name]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.attach(model, optimizer)
    losses = train(model, optimizer)
    expected = train(other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]


def test_state_from_before_attach_is_masked() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    weight = model.get_parameter("4.weight")
    kept = optimizer.state[weight]["exp_avg"].clone()
    masks.attach(model, optimizer)
    for name in masks:
        for value in state_tensors(optimizer, model.get_parameter(name)):
            assert not value[~masks[name]].any()
    after = optimizer.state[weight]["exp_avg"]
    assert torch.equal(after[masks["4.weight"]], kept[masks["4.weight"]])
    assert optimizer.state[weight]["step"] == 3


def test_attach_does_not_initialise_the_state() -> None:
    model = small_net()
    optimizer = torch.optim.Adam(model.parameters())
    random_masks(model).attach(model, optimizer)
    assert not optimizer.state


def test_gradients_stay_dense() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks.attach(model, optimizer)
    train(model, optimizer, 1)
    gradient = model.get_parameter("4.weight").grad
    assert gradient[~masks["4.weight"]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = small_net().to(dtype)
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    masks.attach(model, optimizer)
    for x, y in batches(10):
        optimizer.zero_grad()
        functional.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()
    masks.verify(model)


def test_autocast() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks.attach(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert_pruned(masks, model, optimizer)


def test_grad_scaler_with_skipped_steps() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    masks.attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(model(x), y)).backward()
        if step % 3 == 0:
            model.get_parameter("4.weight").grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**10
    assert_pruned(masks, model, optimizer)


def test_gradient_accumulation_and_clipping() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks.attach(model, optimizer)
    for step, (x, y) in enumerate(batches(), 1):
        (functional.cross_entropy(model(x), y) / 4).backward()
        if step % 4 == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            assert_pruned(masks, model, optimizer)


def test_closure_and_scheduler() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.attach(model, optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()
    assert_pruned(masks, model, optimizer)


def test_several_parameter_groups_and_frozen_layers() -> None:
    model = small_net()
    masks = random_masks(model)
    model.get_parameter("0.weight").requires_grad_(False)
    groups = [{"params": model[4].parameters(), "lr": 0.1}, {"params": model[6].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    masks.attach(model, optimizer)
    train(model, optimizer)
    assert_pruned(masks, model, optimizer)


def test_two_optimizers() -> None:
    model = small_net()
    masks = random_masks(model)
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam(model[4:].parameters(), lr=0.01)
    handles = [masks.attach(model, first), masks.attach(model, second)]
    for x, y in batches(5):
        functional.cross_entropy(model(x), y).backward()
        first.step()
        second.step()
    assert_pruned(masks, model)
    for handle in handles:
        handle.remove()


# --- copies, checkpoints, wrappers ---------------------------------------------------------------


def test_deepcopy_and_average() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks.attach(model, optimizer)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    snapshot = copy.deepcopy(model)
    frozen = {n: p.detach().clone() for n, p in snapshot.named_parameters()}
    for x, y in batches():
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        average.update_parameters(model)
    assert_pruned(masks, model, optimizer)
    masks.verify(average)
    masks.verify(snapshot)
    assert all(torch.equal(frozen[n], p) for n, p in snapshot.named_parameters())


def test_deepcopy_trains_with_its_own_attachment() -> None:
    model = small_net()
    masks = random_masks(model)
    masks.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    masks.attach(twin, optimizer)
    train(twin, optimizer, 5)
    assert_pruned(masks, twin, optimizer)


def test_dense_checkpoint_after_attach() -> None:
    model = small_net()
    masks = random_masks(model)
    dense = small_net(seed=1)
    dense_optimizer = torch.optim.AdamW(dense.parameters(), lr=0.01)
    train(dense, dense_optimizer, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks.attach(model, optimizer)
    model.load_state_dict(dense.state_dict())
    masks.verify(model)  # at once, not only after the next step
    optimizer.load_state_dict(dense_optimizer.state_dict())
    for name in masks:
        for value in state_tensors(optimizer, model.get_parameter(name)):
            assert not value[~masks[name]].any()
            assert value[masks[name]].any()
    train(model, optimizer, 5)
    assert_pruned(masks, model, optimizer)


def test_resume_from_a_checkpoint_gives_the_same_weights(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = small_net()
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    straight, optimizer = fresh()
    masks = random_masks(straight)
    masks.attach(straight, optimizer)
    train(straight, optimizer, 10)
    train(straight, optimizer, 10)

    model, optimizer = fresh()
    handle = masks.attach(model, optimizer)
    train(model, optimizer, 10)
    torch.save({"model": model.state_dict(), "opt": optimizer.state_dict()}, tmp_path / "c.pt")
    masks.save(tmp_path / "masks")
    handle.remove()
    model, optimizer = fresh()
    MaskSet.load(tmp_path / "masks").attach(model, optimizer)
    checkpoint = torch.load(tmp_path / "c.pt", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["opt"])
    train(model, optimizer, 10)
    for (name, a), b in zip(straight.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_whole_model_can_be_saved() -> None:
    model = small_net()
    masks = random_masks(model)
    masks.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    masks.verify(loaded)
    loaded.load_state_dict(small_net(seed=1).state_dict())
    masks.verify(loaded)


def test_optimizer_can_be_copied_and_pickled() -> None:
    model = small_net()
    optimizer = torch.optim.Adam(model.parameters())
    random_masks(model).attach(model, optimizer)
    train(model, optimizer, 2)
    copy.deepcopy(optimizer).step()
    torch.save(optimizer, io.BytesIO())


def test_replaced_parameters_and_modules_are_found_again() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.attach(model, optimizer)
    model[4].weight = nn.Parameter(torch.ones(10, 96))
    model[6] = nn.Linear(10, 3)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer, 3)
    assert_pruned(masks, model, optimizer)


def test_layers_wrapped_after_attach() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.attach(model, optimizer)
    model[4] = nn.DataParallel(model[4])
    train(model, optimizer, 3)
    masks.verify(model)


@pytest.mark.parametrize("attach_to", ["inner", "wrapper"])
def test_data_parallel(attach_to: str) -> None:
    model = small_net()
    masks = random_masks(model)
    wrapper = nn.DataParallel(model)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1, momentum=0.9)
    masks.attach(model if attach_to == "inner" else wrapper, optimizer)
    train(wrapper, optimizer)
    assert_pruned(masks, model, optimizer)
    wrapper.load_state_dict(nn.DataParallel(small_net(seed=1)).state_dict())
    masks.verify(model)
    model.load_state_dict(small_net(seed=2).state_dict())
    masks.verify(model)


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.usefixtures("one_process_group")
def test_distributed_data_parallel(attach_first: bool) -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if attach_first:
        masks.attach(model, optimizer)
    wrapper = nn.parallel.DistributedDataParallel(model)
    if not attach_first:
        masks.attach(wrapper, optimizer)
    keys = list(small_net().state_dict())
    assert list(wrapper.state_dict()) == [f"module.{key}" for key in keys]
    train(wrapper, optimizer)
    assert_pruned(masks, model, optimizer)
    masks.verify(wrapper)
    assert MaskSet.from_model(wrapper) == masks


def test_compiled_with_an_eager_backend() -> None:
    model = small_net()
    masks = random_masks(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.01)
    masks.attach(compiled, optimizer)
    train(compiled, optimizer)
    assert_pruned(masks, model, optimizer)


def test_compiled_optimizer_step() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    masks.attach(model, optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for x, y in batches(5):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        step()
        assert_pruned(masks, model, optimizer)


@pytest.mark.slow
def test_optimizer_step_compiled_with_inductor() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
    masks.attach(model, optimizer)
    step = torch.compile(optimizer.step)
    for x, y in batches(5):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        step()
        assert_pruned(masks, model, optimizer)


@pytest.mark.slow
def test_compiled_with_inductor() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks.attach(model, optimizer)
    compiled = torch.compile(model)
    train(compiled, optimizer)
    assert_pruned(masks, model, optimizer)
    masks.verify(compiled)


def test_tied_weights() -> None:
    model = zoo.create("gpt2", vocabulary=11, positions=16, layers=1, dim=8, heads=2, seed=0)
    mask = torch.rand(11, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    masks = MaskSet.from_bool({"lm_head.weight": mask})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks.attach(model, optimizer)
    tokens = zoo.example_input(model, batch=4)
    for _ in range(10):
        optimizer.zero_grad()
        functional.cross_entropy(
            model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        ).backward()
        optimizer.step()
    assert torch.equal(model.transformer.wte.weight != 0, mask)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_attention_and_transformer() -> None:
    model = zoo.create("vit_b_16", image_size=32, layers=1, dim=16, heads=2, num_classes=3, seed=0)
    masks = random_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks.attach(model, optimizer)
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    for _ in range(5):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    masks.verify(model)


# --- the handle ----------------------------------------------------------------------------------


def test_remove_ends_it() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hooks = dict(vars(model))
    handle = masks.attach(model, optimizer)
    assert handle.active
    handle.remove()
    handle.remove()
    assert not handle.active
    assert not model._load_state_dict_post_hooks
    assert set(vars(model)) == set(hooks)
    train(model, optimizer, 2)
    with pytest.raises(Exception, match="pruned weights that are not 0"):
        masks.verify(model)


def test_context_manager() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with masks.attach(model, optimizer) as handle:
        assert handle.active
        train(model, optimizer, 2)
        masks.verify(model)
    assert not handle.active
    assert not optimizer._optimizer_step_post_hooks


def test_attachment_does_not_keep_the_model_alive() -> None:
    model = small_net()
    alive = weakref.ref(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    random_masks(model).attach(model, optimizer)
    del model, optimizer
    gc.collect()
    assert alive() is None


def test_lbfgs_is_refused() -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="attach: LBFGS evaluates the model inside one step"):
        random_masks(model).attach(model, torch.optim.LBFGS(model.parameters()))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_optimizer_of_another_model_is_refused() -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(small_net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the optimizer holds none of the masked parameters"):
        random_masks(model).attach(model, optimizer)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("optimizer", [None, "sgd", nn.Linear(1, 1)])
def test_no_optimizer(optimizer: object) -> None:
    model = small_net()
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got"):
        random_masks(model).attach(model, optimizer)


def test_masks_of_another_model_are_refused() -> None:
    masks = random_masks(small_net())
    model = zoo.create("mlp", sizes=(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MaskFormatError, match="belong to another model"):
        masks.attach(model, optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_wrapped_optimizer_is_unwrapped() -> None:
    class Wrapper:
        """As Accelerate and Lightning do it."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.attach(model, Wrapper(optimizer))
    train(model, optimizer, 3)
    assert_pruned(masks, model, optimizer)
