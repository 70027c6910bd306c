"""Two processes that see different data end with the same masks and the same weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import paikern as pk
from python_tests.training import nets

EPOCHS = 3


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    try:
        model = DistributedDataParallel(nets.make("mlp"))
        opt = nets.adam(model)
        data = nets.samples("mlp", seed=10 + rank)
        own = pk.prune(model, "snip", sparsity=0.5, data=data, apply=False)
        pruner = pk.pruner(
            "earlycrop_u",
            model,
            sparsity=0.5,
            epochs=EPOCHS,
            optimizer=opt,
            data=data,
            method="snip",
            latest=2,
        )
        for _ in range(EPOCHS):
            opt.zero_grad()
            functional.cross_entropy(model(data[0]), data[1]).backward()
            opt.step()
            pruner.on_epoch_end(model)
        pruner.masks.verify(model)
        own.save(f"{folder}/own{rank}")
        pruner.masks.save(f"{folder}/masks{rank}")
        torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_every_process_has_the_masks_of_the_first(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    masks = [pk.load_masks(tmp_path / f"masks{rank}") for rank in (0, 1)]
    assert masks[0] == masks[1]
    assert masks[0].metadata["history"] == masks[1].metadata["history"]
    assert pk.load_masks(tmp_path / "own0") != pk.load_masks(tmp_path / "own1")
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert nets.equal_states(*states)


def ticking(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    try:
        model = nets.make("residual")
        data = nets.samples("residual", seed=10 + rank)
        options = {"gate_lr": 0.1, "penalty": 0.0, "ticks": 2}
        pruner = pk.pruner("gate_decorators", model, sparsity=0.5, epochs=1, data=data, **options)
        pruner.on_epoch_end(model)
        pruner.masks.save(f"{folder}/masks{rank}")
        torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_every_process_has_the_gates_of_the_first(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ticking, (str(tmp_path),), nprocs=2)
    masks = [pk.load_masks(tmp_path / f"masks{rank}") for rank in (0, 1)]
    assert masks[0] == masks[1]
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert nets.equal_states(*states)
    assert not torch.equal(states[0]["norm1.weight"], torch.ones(8))
