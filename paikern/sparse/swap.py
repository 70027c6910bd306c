"""sparsify and densify: a model with packed weights where they pay, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paikern import ops
from paikern.masks import MaskSet
from paikern.ops.unpack_mask import count_kept
from paikern.progress import logger
from paikern.sparse import choice, layers
from paikern.sparse import optimizer as optimizers
from paikern.sparse.in_models import packed_weights
from paikern.sparse.layers import Place
from paikern.sparse.masked_linear import MaskedConv1D
from paikern.sparse.masked_module import MaskedModule
from paikern.sparse.observed import DEFAULT_BATCH, check_batch, check_flags, input_shapes
from paikern.sparse.optimizer import Exchange
from paikern.sparse.packed_weight import PackedWeight

_SHOWN = 8  # dense weights that the log names


@dataclass(frozen=True)
class _Packed:
    """A weight that is going to be packed: everything that takes memory exists already."""

    place: Place
    weight: PackedWeight
    layers: tuple[MaskedModule, ...]


def sparsify(
    model: nn.Module,
    masks: MaskSet,
    force: bool = False,
    *,
    batch: int | None = None,
    example_inputs: Any = None,
    optimizer: Any = None,
    training: bool | None = None,
) -> nn.Module:
    """Replace layers by ones that store and multiply their kept weights only.

    `nn.Linear`, transformers' `Conv1D` and `nn.Conv2d` become `MaskedLinear`, `MaskedConv1D` and
    `MaskedConv2d` where the measured cost says that this is faster; the other masked weights stay
    dense, with zeros where nothing is kept, and one line of the log names them. Zeros of a dense
    weight come back when it is trained: `masks.attach(model, optimizer)` keeps them, and leaves
    packed weights alone.

    Args:
        model: changed in place. Sparsify before wrapping it in DDP or FSDP; a model compiled by
            `torch.compile` is compiled again.
        masks: of this model.
        force: pack wherever it is possible.
        batch: rows of x to choose for (samples, times tokens where there are any); 32 unless given.
            Convolutions need `example_inputs`, which say how large their maps are.
        example_inputs: a tensor, a tuple or a dict of arguments. The model runs once on them,
            without gradients and in eval mode, to see what x each layer gets.
        optimizer: a torch optimizer of the model. The values take the place of the dense weights in
            their groups, and state of the weight's shape is gathered at the kept positions.
        training: choose for a training step (forward, both gradients) or for the forward pass
            alone; `model.training` unless given.

    Returns:
        `model`; if it is itself such a layer, the layer in its place.

    Raises:
        MaskFormatError: the masks belong to another model.
        ValueError: NaN in a kept weight, weights on the meta device or sharded, a wrapper that
            holds the dense weights, a hook on a weight that is packed, an optimizer of other
            parameters or with state that cannot be gathered. TypeError: no model, no MaskSet, a
            weight that stays dense and has a dtype that cannot be masked. Whatever is raised,
            out-of-memory included: the model and the optimizer are as they were.

    Example:
        >>> import paikern as pk
        >>> net = pk.zoo.create("lenet300", seed=0)
        >>> masks = pk.prune(net, "magnitude", sparsity=0.98)
        >>> net = pk.sparsify(net, masks, batch=64)
        >>> net.layers[1]
        MaskedLinear(...)
    """
    check_batch("sparsify", batch)
    check_flags("sparsify", force=force, training=training)
    layers.check_model("sparsify", model)
    if not isinstance(masks, MaskSet):
        raise TypeError(f"sparsify: masks must be a MaskSet, got {type(masks).__name__}")
    layers.refuse_holders("sparsify", model)
    places = _places(model, masks)
    shapes: dict[int, tuple[int, ...]] = {}
    if example_inputs is not None:
        owners = [owner for place in places for owner in place.owners]
        shapes = input_shapes("sparsify", model, owners, example_inputs)
    training = model.training if training is None else training

    packed: list[_Packed] = []
    dense: list[tuple[Place, str, Tensor]] = []
    for place in places:
        bits = _bits(place, masks)
        reason = place.reason
        if not reason and not force:
            reason = choice.loss(
                place, count_kept(bits), shapes, batch or DEFAULT_BATCH, training=training
            )
        if reason:
            dense.append((place, reason, bits.to(place.parameter.device)))
        else:
            packed.append(_pack(place, bits, training))

    exchanges = [
        Exchange(p.place.name, p.place.parameter, p.weight.values, p.weight.gather, ".values")
        for p in packed
    ]
    new: dict[int, nn.Module] = {
        id(owner): layer
        for p in packed
        for owner, layer in zip(p.place.owners, p.layers, strict=True)
    }
    copies = [_masked(place, reason, bits) for place, reason, bits in dense]

    def mask() -> None:
        for (place, _, bits), copy in zip(dense, copies, strict=True):
            if copy is None:
                ops.apply_mask_(place.parameter.detach(), bits)
            else:
                place.parameter.detach().copy_(copy)

    model = _swap("sparsify", model, new, exchanges, optimizer, mask)
    if dense:
        shown = "; ".join(f"{place.name} ({reason})" for place, reason, _ in dense[:_SHOWN])
        more = f"; and {len(dense) - _SHOWN} more" if len(dense) > _SHOWN else ""
        logger.warning(
            "sparsify: %d of %d weights are packed, the others stay dense with zeros: %s%s",
            len(packed),
            len(places),
            shown,
            more,
        )
    return model


def densify(model: nn.Module, *, optimizer: Any = None) -> nn.Module:
    """The way back from `sparsify`: dense layers, with zeros where nothing was kept.

    Each layer is of the class that it had before; dtype, device, `requires_grad`, hooks and the
    bias, the same Parameter, go with it. Training the result needs `masks.attach` to keep the
    zeros; `MaskSet.from_model(model)` before or `pk.sparsify`'s masks have them.

    Args:
        model: changed in place.
        optimizer: dense weights take the place of the values in their groups; their state is zero
            where nothing was kept.

    Returns:
        `model`; if it is itself a packed layer, the dense one in its place.

    Raises:
        ValueError: as `sparsify`. Whatever is raised, model and optimizer are as they were.

    Example:
        >>> import paikern as pk
        >>> net = pk.zoo.create("lenet300", seed=0)
        >>> masks = pk.prune(net, "magnitude", sparsity=0.98)
        >>> net = pk.densify(pk.sparsify(net, masks, force=True))
        >>> pk.MaskSet.from_model(net) == masks
        True
    """
    layers.check_model("densify", model)
    layers.refuse_holders("densify", model)
    new: dict[int, nn.Module] = {}
    exchanges: dict[int, Exchange] = {}
    for name, layer in layers.masked_modules(model):
        weight = layer.weight
        if hasattr(weight.values, "placements"):
            raise ValueError(
                f"densify: '{name}' is sharded (DTensor); densify the model before sharding"
            )
        layers.refuse_hooks("densify", f"{name}.weight.values".lstrip("."), weight.values)
        known = exchanges.get(id(weight))
        dense = layer.to_dense(None if known is None else known.new)
        new[id(layer)] = dense
        if known is None:
            parameter = dense.weight
            assert isinstance(parameter, nn.Parameter)
            exchanges[id(weight)] = Exchange(
                f"{name}.weight" if name else "weight",
                weight.values,
                parameter,
                weight.scatter,
                "-.values",
            )
    return _swap("densify", model, new, list(exchanges.values()), optimizer)


def _places(model: nn.Module, masks: MaskSet) -> list[Place]:
    slots = masks.slots(model)
    stored = packed_weights(model)
    for name, weight in stored.items():
        if name not in masks:
            continue
        if not torch.equal(weight.packed_mask().cpu(), masks.packed(name).cpu()):
            raise ValueError(
                f"sparsify: '{name}' is packed with other positions; use pk.densify first"
            )
    for slot in slots.values():
        if slot.tensor.is_meta or hasattr(slot.tensor, "placements"):
            where = "on the meta device" if slot.tensor.is_meta else "sharded (DTensor)"
            raise ValueError(
                f"sparsify: '{slot.name}' is {where}; sparsify a model with its values, unsharded"
            )
    return layers.places(model, slots)


def _bits(place: Place, masks: MaskSet) -> Tensor:
    """The mask of a weight; where several names stand for it, what all of them keep."""
    first, *others = (masks.packed(name) for name in place.names)
    for other in others:
        first = first & other.to(first.device)
    return first


def _pack(place: Place, bits: Tensor, training: bool) -> _Packed:
    parameter = place.parameter
    layers.refuse_hooks("sparsify", place.name, parameter)
    try:
        weight = PackedWeight.from_dense(parameter, bits.to(parameter.device))
    except ValueError as error:
        raise ValueError(f"sparsify: '{place.name}': {error}") from error
    made = tuple(layers.masked(owner, weight) for owner in place.owners)
    if training or any(isinstance(layer, MaskedConv1D) for layer in made):
        weight.where(transposed=True)  # now, so that no compiled graph sees it change
    return _Packed(place, weight, made)


def _masked(place: Place, reason: str, bits: Tensor) -> Tensor | None:
    """A masked copy of a weight that cannot be masked in place without memory, else None.

    Whatever could fail when the weight is masked after the swap fails here, before it.
    """
    weight = place.parameter.detach()
    try:
        ops.apply_mask_(weight.new_ones(1), bits.new_ones(1))
    except TypeError as error:
        raise TypeError(
            f"sparsify: '{place.name}' stays dense ({reason}) and {weight.dtype} cannot be masked; "
            "leave it out of the masks"
        ) from error
    if weight.is_inference():
        raise ValueError(
            f"sparsify: '{place.name}' was made in torch.inference_mode and cannot be masked; "
            "clone it outside"
        )
    if not bool(torch.isfinite(weight.sum())) and bool(
        (torch.isnan(weight) & ops.unpack_mask(bits, tuple(weight.shape))).any()
    ):
        raise ValueError(
            f"sparsify: '{place.name}' holds NaN in a kept weight; replace it, or leave the weight "
            "out of the masks"
        )
    return None if weight.is_contiguous() else ops.apply_mask_(weight.contiguous(), bits)


def _swap(
    operation: str,
    model: nn.Module,
    new: dict[int, nn.Module],
    exchanges: list[Exchange],
    optimizer: Any,
    finish: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Exchange layers and parameters, or nothing at all; `finish` may fail as well."""
    for module in model.modules():
        if id(module._modules.get("_orig_mod")) in new:
            raise ValueError(
                f"{operation}: a layer by itself is compiled and would go on as it was; use the "
                "layer inside it (._orig_mod), then compile it again"
            )
    gradients = [optimizers.gradient(exchange) for exchange in exchanges]
    before = list(model.parameters())
    old = {id(module): module for module in model.modules() if id(module) in new}
    result = layers.replace(model, new)
    try:
        plan = None
        if optimizer is not None:
            after = list(result.parameters())
            plan = optimizers.plan(operation, optimizer, exchanges, before, after)
        finish()
        if plan is not None:
            plan.carry_out()
    except BaseException:
        layers.replace(result, {id(new[key]): module for key, module in old.items()})
        raise
    for exchange, gradient in zip(exchanges, gradients, strict=True):
        exchange.new.grad = gradient
    return result
