"""One network pruned in one way: what the mask is worth, and what the network learns with it.

The mask is found at the initial weights of a seed and the network is trained from those weights on
4,000 of the 5,000 MNIST images; the accuracy is that on the other 1,000.
"""

from __future__ import annotations

import time
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.comparison_cases import prepared
from bench.mnist import Split, load
from bench.timing import Row

SPARSITIES = (0.68, 0.9, 0.968, 0.98, 0.99)
SEEDS = (0, 1, 2)
PX_SAMPLES = 100


class Net(NamedTuple):
    """A network of the zoo and how it is trained (SGD with momentum, one cycle)."""

    options: dict[str, Any]
    image_size: int
    epochs: int
    batch: int
    learning_rate: float


NETS = {
    "lenet300": Net({}, 28, 20, 100, 0.1),
    "resnet20": Net({"in_channels": 1, "image_size": 16}, 16, 5, 100, 0.1),
}

#: name in the tables -> (method, its options)
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {"scope": "erk"}),
    "magnitude": ("magnitude", {}),
    "synflow": ("synflow", {}),
    "synflow_l2": ("synflow_l2", {}),
    "px": ("px", {}),
    "npb": ("npb", {}),
    "npb, few": ("npb", {"outputs": "few"}),
    "phew": ("phew", {}),
    "dpai": ("dpai", {}),
    "dpai, alpha 0": ("dpai", {"alpha": 0.0}),
    "dpai, adam": ("dpai", {"variant": "published"}),
    "dpai, revive": ("dpai", {"revive": True}),
    "dpai, keep_nodes": ("dpai", {"keep_nodes": True}),
    "dpai, keep_nodes, alpha 0": ("dpai", {"keep_nodes": True, "alpha": 0.0}),
}
DENSE = "dense"

#: Networks of the comparison that are pruned and counted, but not trained: name -> sparsities.
COUNTED = {
    "vgg19_bn": (0.9, 0.98, 0.99),
    "resnet18@64": (0.9, 0.98, 0.99),
}
COUNTED_WAYS = tuple(way for way in WAYS if way not in ("px", "dpai, adam"))

#: The sweep of the node-path plane: name -> options, on ResNet-20 at 98 %.
SWEEP_SPARSITY = 0.98
SWEEP: dict[str, dict[str, Any]] = {
    **{
        f"{optimizer}{', keep_nodes' if keep else ''}, alpha {alpha:g}, beta {beta:g}": {
            "optimizer": optimizer, "keep_nodes": keep, "alpha": alpha, "beta": beta,
            "steps": 300 if optimizer == "ascent" else 1000,
        }
        for optimizer in ("ascent", "adam")
        for keep in (False, True)
        for alpha in (0.0, 0.5, 0.9, 0.99)
        for beta in ((0.0, 0.5, 1.0) if alpha else (0.5,))
    },
}  # fmt: skip


@cache
def data(image_size: int) -> Split:
    return load(image_size)


def model_of(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """The network at its initial weights, and one input of ones."""
    from paikern import zoo

    if name in COUNTED:
        subject = prepared(name)
        return subject.model, torch.ones_like(subject.example)
    net = NETS[name]
    model = zoo.create(name, seed=seed, **net.options)
    size = net.image_size
    shape = (1, size * size) if name == "lenet300" else (1, 1, size, size)
    return model, torch.ones(shape)


def pruned(name: str, way: str, sparsity: float, seed: int, **more: Any) -> tuple[Any, float]:
    """The masks and the seconds that finding them took."""
    import paikern as pk

    model, example = model_of(name, seed)
    method, options = WAYS[way]
    options = options | more
    if method == "px":
        split = data(NETS[name].image_size)
        x = split.train_x[:PX_SAMPLES]
        options = {**options, "data": x.flatten(1) if name == "lenet300" else x}
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = pk.prune(
            model, method, sparsity=sparsity, example_inputs=example, seed=seed, apply=False,
            progress=False, **options,
        )  # fmt: skip
    return masks, time.perf_counter() - start


def topology_row(name: str, masks: Any, seed: int) -> Row:
    """What the mask is worth: paths, nodes, kernels and weights that lie on a path."""
    import paikern as pk

    model, example = model_of(name, seed)
    found = pk.analyze(model, masks, example_inputs=example)
    alive = found.log_paths > -float("inf")
    return {
        "log_paths": found.log_paths if alive else None,
        "nodes": found.effective_nodes,
        "kernels": found.effective_kernels,
        "params": found.effective_params,
        "kept": found.kept,
        "empty_layers": sum(layer.kept == 0 for layer in found.layers),
    }


def quality_row(name: str, way: str, sparsity: float, seed: int, epochs: int | None = None) -> Row:
    """Prune, count and train one network; `epochs` other than the network's own, for a trial."""
    row: Row = {"method": way, "model": name, "sparsity": sparsity, "seed": seed}
    masks = None
    if way != DENSE:
        masks, row["seconds"] = pruned(name, way, sparsity, seed)
        row |= topology_row(name, masks, seed)
    start = time.perf_counter()
    row["accuracy"] = trained(name, masks, seed, epochs)
    row["train_seconds"] = time.perf_counter() - start
    return {"seconds": None, "reference_seconds": None, "ratio": None, **row}


def counted_row(name: str, way: str, sparsity: float) -> Row:
    """A network that is not trained."""
    masks, seconds = pruned(name, way, sparsity, 0)
    return {
        "op": "topology", "method": way, "model": name, "sparsity": sparsity, "seed": 0,
        "seconds": seconds, "reference_seconds": None, "ratio": None,
        **topology_row(name, masks, 0),
    }  # fmt: skip


def sweep_row(label: str) -> Row:
    """One point of the node-path plane."""
    masks, seconds = pruned("resnet20", "dpai", SWEEP_SPARSITY, 0, **SWEEP[label])
    return {
        "op": "sweep", "model": "resnet20", "sparsity": SWEEP_SPARSITY, "seed": 0, "size": label,
        **SWEEP[label], "seconds": seconds, "reference_seconds": None, "ratio": None,
        **topology_row("resnet20", masks, 0),
    }  # fmt: skip


def trained(name: str, masks: Any, seed: int, epochs: int | None) -> float:
    """Accuracy on the test images after training with the mask held."""
    net = NETS[name]
    epochs = net.epochs if epochs is None else epochs
    split = data(net.image_size)
    train_x, test_x = split.train_x, split.test_x
    model, _ = model_of(name, seed)
    if name == "lenet300":
        train_x, test_x = train_x.flatten(1), test_x.flatten(1)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=net.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    if masks is not None:
        masks.apply(model)
        masks.attach(model, optimizer)
    batches = len(split.train_y) // net.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, net.learning_rate, total_steps=max(1, epochs * batches)
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(split.train_y), generator=generator)
        for index in order.split(net.batch)[:batches]:
            optimizer.zero_grad()
            F.cross_entropy(model(train_x[index]), split.train_y[index]).backward()
            optimizer.step()
            schedule.step()
    if masks is not None:
        masks.verify(model)
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(x).argmax(1) for x in test_x.split(500)])
    return float((found == split.test_y).float().mean())
