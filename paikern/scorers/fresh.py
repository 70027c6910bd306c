"""New weights and inputs for methods that judge an architecture, and its outputs as one tensor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paikern.batches import Batch
from paikern.gradients.refusals import refused_by
from paikern.prunable import Prunable, prunable_parameters
from paikern.scorers.base import Run


def draw_parameters(run: Run, generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh parameters by the names of `model.named_parameters()`, in their order.

    Weights of linear layers, convolutions and attention projections, pruned or not, are Kaiming
    normal, `N(0, 2 / inputs)`; biases are 0; scales of norms are 1. What is none of these
    (embeddings, positions, class tokens) is left out and keeps its value. Drawn in float32 on the
    CPU, so that device and dtype do not change them.
    """
    layers = _weights(run)
    norms = {
        id(parameter)
        for module in run.model.modules()
        if "norm" in type(module).__name__.lower()
        for key, parameter in module.named_parameters(recurse=False)
        if key == "weight" and parameter.dim() == 1
    }
    found = {}
    for name, parameter in run.model.named_parameters():
        if name in layers:
            std = math.sqrt(2 / max(1, _inputs(layers[name])))
            drawn = torch.randn(parameter.shape, generator=generator).mul_(std)
            found[name] = drawn.to(parameter)
        elif id(parameter) in norms:
            found[name] = torch.ones_like(parameter, requires_grad=False)
        elif parameter.dim() == 1 and "bias" in name.rpartition(".")[2]:
            found[name] = torch.zeros_like(parameter, requires_grad=False)
    return found


def _weights(run: Run) -> dict[str, Prunable]:
    """All weights of layers by source, those that the run ignores among them."""
    if "fresh" not in run.cache:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            every = prunable_parameters(run.model)
        found = {layer.source: layer for layer in [*every.values(), *run.layers.values()]}
        run.cache["fresh"] = found
    layers: dict[str, Prunable] = run.cache["fresh"]
    return layers


def _inputs(layer: Prunable) -> int:
    """How many values one output is the sum of."""
    return math.prod(layer.shape) // max(1, layer.layout.outputs(layer.shape))


def draw_inputs(batch: Batch, generator: torch.Generator) -> Batch:
    """N(0, 1) in the shapes of floating-point inputs; masks and integers stay."""
    inputs = batch.inputs
    if not isinstance(inputs, Mapping):
        return Batch(_noise("", inputs, generator), batch.targets)
    return Batch({k: _noise(k, v, generator) for k, v in inputs.items()}, batch.targets)


def _noise(key: str, value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point() or "mask" in key:
        return value
    return torch.randn(value.shape, generator=generator).to(value)


def output_of(model: nn.Module, batch: Batch) -> Tensor:
    """What the model makes of a batch, as one tensor `[n, ...]`, float32 at least.

    Of a mapping or an object the logits, else the last hidden state, else the first tensor of
    floats. Labels among keyword inputs are held back.

    Raises:
        ValueError: the model does not take the batch, or returns no tensor of floats.
    """
    with refused_by(model, batch):
        if isinstance(batch.inputs, Mapping):
            given = {key: value for key, value in batch.inputs.items() if key != "labels"}
            outputs = model(**given)
        else:
            outputs = model(batch.inputs)
    found = _tensor(outputs)
    if found is None:
        raise ValueError(
            f"model: it returns {type(outputs).__name__}, in which no tensor of floats was found; "
            "return one, or outputs with logits"
        )
    return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found


def _tensor(outputs: Any) -> Tensor | None:
    if isinstance(outputs, Tensor):
        return outputs if outputs.is_floating_point() else None
    if isinstance(outputs, Mapping):
        named = [outputs.get("logits"), outputs.get("last_hidden_state"), *outputs.values()]
    elif isinstance(outputs, (tuple, list)):
        named = list(outputs)
    else:
        named = [getattr(outputs, key, None) for key in ("logits", "last_hidden_state")]
    return next((t for t in map(_tensor, filter(_is_given, named)) if t is not None), None)


def _is_given(value: Any) -> bool:
    return value is not None
