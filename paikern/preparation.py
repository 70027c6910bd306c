"""What a run starts from: the model's tensors, the layers to prune, the data, all checked."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from paikern._names import slots
from paikern.batches import Batches
from paikern.errors import NonFiniteScoreError
from paikern.gradients import own_randomness
from paikern.masks import MaskSet
from paikern.prunable import Filter, prunable_parameters, unwrap
from paikern.scorers import Run, Scorer
from paikern.scorers.base import check_loss


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameter and buffer names of the unwrapped model -> tensors.

    Parameters go by the names that masks use, too, where a block inside is wrapped.
    """
    state = {slot.name: slot.tensor.detach() for slot in slots(model)}
    state |= {name: p.detach() for name, p in model.named_parameters()}
    state.update({name: b.detach() for name, b in model.named_buffers()})
    return state


def packed_of(masks: MaskSet | None, model: nn.Module) -> dict[str, Tensor]:
    """The bits by name; MaskFormatError where they were made for another model."""
    if masks is None:
        return {}
    masks.slots(model)
    return {name: masks.packed(name) for name in masks}


def prepare_run(
    model: nn.Module,
    scorer: Scorer,
    example_inputs: Any,
    ignore: Filter,
    include: Filter,
    seed: int,
    variant: str,
    data: Any = None,
    loss_fn: Any = None,
) -> Run:
    """The run of `pk.prune`, whose arguments these are; nothing is written to the model.

    Raises:
        ValueError: a loss_fn that the method does not use, a seed out of range, nothing to prune,
            missing data or example_inputs, weights on the meta device.
        NonFiniteScoreError: NaN or infinite weights, named.
    """
    check_loss("method", scorer.name, scorer.takes_loss, loss_fn)
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an integer from -2**63 to 2**63 - 1, got {seed!r}")
    inner = unwrap(model)
    layers = prunable_parameters(inner, ignore=ignore or (), include=include)
    state = state_of(inner)
    # A weight pruned by torch.nn.utils.prune is stored under another name than it is known by.
    state.update({name: state[layer.source] for name, layer in layers.items()})
    batches = None
    if data is not None:
        reads_labels = scorer.needs_labels or scorer.takes_loss
        batches = Batches(data, getattr(scorer, "batch_size", 128), labels=reads_labels)
    if scorer.needs_data and batches is None:
        raise ValueError(
            f"data: method {scorer.name!r} reads samples; pass data=, a tensor [n, ...] or an "
            "iterable of batches"
        )
    if scorer.needs_inputs and example_inputs is None and batches is not None:
        with own_randomness(inner, int(seed)):
            example_inputs = batches.example()
    run = Run(
        inner, state, layers, example_inputs, int(seed), variant, batches, loss_fn, scorer.name
    )
    if scorer.needs_inputs and example_inputs is None:
        raise ValueError(
            f"example_inputs: method {scorer.name!r} traces the model and needs one input, for "
            "instance example_inputs=torch.ones(1, 3, 32, 32)"
        )
    if scorer.reads_weights:
        _refuse_non_finite(run)
    return run


def _refuse_non_finite(run: Run) -> None:
    for name in run.layers:
        weight = run.weight(name)
        if weight.is_meta:
            raise ValueError(
                f"{name} is on the meta device and holds no values; load the weights first"
            )
        if weight.numel() and not _is_finite(weight):
            bad = int((~torch.isfinite(weight)).sum())
            raise NonFiniteScoreError(
                f"{name} holds {bad} NaN or infinite weights; repair the checkpoint, or leave the "
                f"layer out with ignore=[{name!r}]"
            )


def _is_finite(weight: Tensor) -> bool:
    """Without `torch.isfinite`, whose temporaries are larger than the weight."""
    return all(math.isfinite(float(bound)) for bound in weight.aminmax())
