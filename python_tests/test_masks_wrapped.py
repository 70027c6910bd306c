"""Pruned weights stay zero in copies, checkpoints, wrapped and compiled models."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from paikern import zoo
from paikern.masks import MaskSet
from python_tests.masked_training import (
    assert_pruned,
    batches,
    random_masks,
    small_net,
    state_tensors,
    train,
)


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
