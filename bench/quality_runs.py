"""One network pruned in one way: what the mask is worth, and what the network learns with it.

A mask that is found before training is found at the initial weights of a seed, and the network is
trained from those weights; a structured one is trained as the smaller network that it describes.
Methods that prune during training are told `PARTS` times. A method that refuses gives a row that
holds its message.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

from safetensors.torch import save
from torch import nn

from bench.quality_training import (
    Trained,
    model_of,
    samples,
    step_ms,
    trained,
    trained_with,
)
from bench.quality_ways import (
    ASNI_FORMS,
    DENSE,
    PARTS,
    STRUCTURED,
    SWEEP,
    SWEEP_SPARSITY,
    TRAINING,
    WAYS,
    Way,
)
from bench.timing import Row
from paikern.errors import PaikernError

_REFUSALS = (PaikernError, ValueError, RuntimeError, ArithmeticError)
_EMPTY: Row = {"seconds": None, "reference_seconds": None, "ratio": None}


def quality_rows(
    name: str, way_name: str, sparsity: float, seed: int, epochs: int | None = None
) -> list[Row]:
    """Prune, count and train one network; `epochs` other than the network's own, for a trial."""
    row: Row = {**_EMPTY, "method": way_name, "model": name, "sparsity": sparsity, "seed": seed}
    if way_name == DENSE:
        model, _ = model_of(name, seed)
        return [row | _trained(trained(name, model, None, seed, epochs), None)]
    way = WAYS[way_name]
    row["settings"] = way.settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if way.method == "asni":
                return [row | more for more in _asni(name, way, sparsity, seed, epochs)]
            if way.family == TRAINING:
                return [row | _during(name, way, sparsity, seed, epochs)]
            return [row | _before(name, way, sparsity, seed, epochs)]
        except _REFUSALS as error:
            return [row | {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}]


def _before(name: str, way: Way, sparsity: float, seed: int, epochs: int | None) -> Row:
    """Masks first, training afterwards."""
    import paikern as pk

    masks, seconds = pruned(name, way, sparsity, seed)
    model, example = model_of(name, seed)
    row = {"seconds": seconds, **topology(name, masks, seed)}
    if way.family != STRUCTURED:
        return row | _trained(trained(name, model, masks, seed, epochs), masks)
    small = pk.shrink(model, masks, example_inputs=example)
    found = _trained(trained(name, small, None, seed, epochs), None)
    return row | found | {"node_sparsity": masks.node_sparsity}


def _during(name: str, way: Way, sparsity: float, seed: int, epochs: int | None) -> Row:
    """Masks that come while the network is trained."""
    import paikern as pk

    found, pruner, seconds = _with_pruner(name, way, sparsity, seed, epochs)
    masks = pruner.masks
    row = {"seconds": seconds, **topology(name, masks, seed), **_trained(found, masks)}
    if getattr(pruner, "pruned_at", None) is not None:
        row["pruned_at"] = pruner.pruned_at / PARTS
    if way.structured and masks.kept < masks.total:
        _, example = model_of(name, seed)
        small = pk.shrink(found.model, masks, example_inputs=example)
        row |= {
            "node_sparsity": masks.node_sparsity, "step_ms": step_ms(name, small),
            "disk_bytes": disk_bytes(small, None),
        }  # fmt: skip
    return row


def _asni(name: str, way: Way, sparsity: float, seed: int, epochs: int | None) -> list[Row]:
    """The network that ASNI has trained, and two that are trained again with its masks."""
    found, pruner, seconds = _with_pruner(name, way, sparsity, seed, epochs)
    masks = pruner.masks
    shared = {"seconds": seconds, **topology(name, masks, seed)}
    own, centroids, original = ASNI_FORMS
    rows: list[Row] = [{**shared, "method": own, **_trained(found, masks)}]
    model, _ = model_of(name, seed)
    again = trained(name, model, masks, seed, epochs)
    rows.append({**shared, "method": original, **_trained(again, masks)})
    model, _ = model_of(name, seed)
    try:
        pruner.centroids(found.model).reinitialise(model)
        again = trained(name, model, masks, seed, epochs)
        rows.append({**shared, "method": centroids, **_trained(again, masks)})
    except _REFUSALS as error:
        rows.append({"method": centroids, "error": str(error).splitlines()[0]})
    return rows


def _with_pruner(
    name: str, way: Way, sparsity: float, seed: int, epochs: int | None
) -> tuple[Trained, Any, float]:
    import paikern as pk

    model, example = model_of(name, seed)

    def make(model: nn.Module, optimizer: Any, schedule: Any) -> Any:
        return pk.pruner(
            way.method, model, sparsity=sparsity, epochs=PARTS, optimizer=optimizer,
            scheduler=schedule, data=samples(name), example_inputs=example, seed=seed,
            **way.options,
        )  # fmt: skip

    return trained_with(name, model, seed, epochs, make)


def _trained(found: Trained, masks: Any) -> Row:
    return {
        "accuracy": found.accuracy, "train_seconds": found.seconds, "step_ms": found.step_ms,
        "disk_bytes": disk_bytes(found.model, masks),
    }  # fmt: skip


def pruned(name: str, way: Way, sparsity: float, seed: int, **more: Any) -> tuple[Any, float]:
    """The masks and the seconds that finding them took."""
    import paikern as pk

    model, example = model_of(name, seed)
    reads = {row["name"]: row["needs_data"] for row in pk.methods()}
    given: dict[str, Any] = {**way.options, **more}
    if reads[way.method]:
        # ProsPr takes a new batch for every step of its training.
        given["data"] = samples(name, 4 if way.method in ("prospr", "prospr_s") else 1)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = pk.prune(
            model, way.method, sparsity=sparsity, example_inputs=example, seed=seed, apply=False,
            progress=False, **given,
        )  # fmt: skip
    return masks, time.perf_counter() - start


def topology(name: str, masks: Any, seed: int) -> Row:
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
        "total": masks.total,
        "empty_layers": sum(layer.kept == 0 for layer in found.layers),
    }


def disk_bytes(model: nn.Module, masks: Any) -> int:
    """Size as a safetensors file; of masked weights the kept values and one bit for each place."""
    tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    for name in () if masks is None else masks:
        tensors[f"{name}.kept"] = tensors.pop(name)[masks[name]]
        tensors[f"{name}.mask"] = masks.packed(name)
    return len(save(tensors))


def counted_row(name: str, way_name: str, sparsity: float) -> Row:
    """A network that is not trained."""
    way = WAYS[way_name]
    masks, seconds = pruned(name, way, sparsity, 0)
    return {
        **_EMPTY, "op": "topology", "method": way_name, "model": name, "sparsity": sparsity,
        "seed": 0, "settings": way.settings, "seconds": seconds, **topology(name, masks, 0),
    }  # fmt: skip


def sweep_row(label: str) -> Row:
    """One point of the node-path plane."""
    masks, seconds = pruned("resnet20", WAYS["dpai"], SWEEP_SPARSITY, 0, **SWEEP[label])
    return {
        **_EMPTY, "op": "sweep", "model": "resnet20", "sparsity": SWEEP_SPARSITY, "seed": 0,
        "size": label, **SWEEP[label], "seconds": seconds, **topology("resnet20", masks, 0),
    }  # fmt: skip
