"""Packed models in DDP and FSDP2: two processes train as one does, and nothing is broadcast."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import paikern as pk
from python_tests.sparse import nets
from python_tests.sparse.nets import assert_close, dense_state

STEPS = 5


def packed() -> tuple[torch.nn.Module, pk.MaskSet]:
    model = nets.net("mlp")
    masks = nets.random_masks(model)
    return pk.sparsify(model, masks, force=True), masks


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    try:
        model, masks = packed()
        with torch.no_grad():  # DDP starts every rank from the values of the first
            model.first.weight.values.add_(rank)
        wrapped = DistributedDataParallel(model)
        assert not list(wrapped.buffers())
        optimizer = optimizer_of(wrapped)
        for x, y in nets.batches(STEPS):
            half = slice(8 * rank, 8 * rank + 8)
            optimizer.zero_grad()
            functional.cross_entropy(wrapped(x[half]), y[half]).backward()
            optimizer.step()
        masks.verify(wrapped)
        assert pk.MaskSet.from_model(wrapped) == masks
        with pytest.raises(
            ValueError, match="densify: DistributedDataParallel holds the parameters"
        ):
            pk.densify(wrapped)
        torch.save(wrapped.state_dict(), f"{folder}/{rank}.pt")
        shard(masks)
    finally:
        torch.distributed.destroy_process_group()


def shard(masks: pk.MaskSet) -> None:
    """FSDP2 cuts the values like any other parameter."""
    model, _ = packed()
    twin = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.first, model.again, model.last, model):
        fully_shard(layer, mesh=mesh)
    found = nets.train(model, optimizer_of(model), 3)
    assert found == pytest.approx(nets.train(twin, optimizer_of(twin), 3), rel=1e-6)
    masks.verify(model)
    with pytest.raises(ValueError, match=r"densify: 'first' is sharded \(DTensor\)"):
        pk.densify(model)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    nets.assert_equal(states[0], states[1])

    model, _ = packed()
    again = copy.deepcopy(model)
    nets.train(model, optimizer_of(model), STEPS)
    again.load_state_dict({name.removeprefix("module."): v for name, v in states[0].items()})
    assert_close(dense_state(again), dense_state(model), 1e-4)
