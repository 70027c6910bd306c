"""Which layers of a model can have a packed weight, and how each kind is packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from paikern._names import Slot, slots, storage_key, unwrap, walk
from paikern.sparse.masked_conv2d import MaskedConv2d
from paikern.sparse.masked_linear import MaskedConv1D, MaskedLinear
from paikern.sparse.masked_module import MaskedModule, hand_over
from paikern.sparse.packed_weight import DTYPES, PackedWeight

# Modules that read the weight tensor of a layer inside them, past its forward.
_READERS = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}
# Wrappers that hold parameters of their own choice since they were made.
_HOLDERS = {
    "DataParallel",
    "DeepSpeedEngine",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
}


@dataclass(frozen=True)
class Place:
    """A dense weight of the model, every name by which the masks know it, every layer that uses it.

    ``reason`` says why it cannot be packed; it is empty where it can.
    """

    names: tuple[str, ...]
    slot: Slot
    owners: tuple[nn.Module, ...]
    reason: str

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def parameter(self) -> nn.Parameter:
        tensor = self.slot.tensor
        assert isinstance(tensor, nn.Parameter)
        return tensor


def places(model: nn.Module, found: dict[str, Slot]) -> list[Place]:
    """The weights whose slots are `found`, tied ones once."""
    uses: dict[tuple[object, ...], dict[int, Slot]] = {}
    for slot in slots(model):
        uses.setdefault(storage_key(slot.tensor), {})[id(slot.owner)] = slot
    names: dict[tuple[object, ...], list[str]] = {}
    for name, slot in found.items():
        names.setdefault(storage_key(slot.tensor), []).append(name)
    readers = _read_by_others(model)
    result = []
    for key, known in names.items():
        used = list(uses[key].values())
        reason = next((r for slot in used if (r := _reason(slot, readers))), "")
        if reason and len(used) > 1:
            reason = f"tied weight: {reason}"
        owners = tuple(slot.owner for slot in used)
        result.append(Place(tuple(known), found[known[0]], owners, reason))
    return result


def kind(layer: nn.Module) -> str:
    """ "linear", "conv1d" (transformers' `Conv1D`), "conv2d", or "" for any other layer.

    A subclass with a forward or a __call__ of its own is another layer: it may do more with its
    weight.
    """
    if "forward" in layer.__dict__ or type(layer).__call__ is not nn.Module.__call__:
        return ""
    definer = next(cls for cls in type(layer).__mro__ if "forward" in vars(cls))
    if definer is nn.Linear:
        return "linear"
    if definer is nn.Conv2d:
        usual = type(layer)._conv_forward is nn.Conv2d._conv_forward  # type: ignore[attr-defined]
        return "conv2d" if usual else ""
    # transformers' Conv1D goes by its class name, so that transformers is not imported. Others of
    # that name are convolutions: a weight of two dimensions and nf outputs tells its copies.
    if definer.__name__ != "Conv1D":
        return ""
    weight = layer._parameters.get("weight")
    alike = weight is not None and weight.dim() == 2 and weight.shape[1] == getattr(layer, "nf", -1)
    return "conv1d" if alike or definer.__module__.startswith("transformers.") else ""


def matrix(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of the product that the layer computes."""
    if isinstance(layer, MaskedModule):
        rows, columns = layer.weight.rows, layer.weight.columns
        return (columns, rows) if isinstance(layer, MaskedConv1D) else (rows, columns)
    dense = layer.weight
    assert isinstance(dense, Tensor)
    shape = dense.shape
    rows, columns = shape[0], shape[1:].numel()
    return (columns, rows) if kind(layer) == "conv1d" else (rows, columns)


def masked(layer: nn.Module, weight: PackedWeight) -> MaskedModule:
    """The layer with its weight packed."""
    if isinstance(layer, nn.Conv2d):
        return MaskedConv2d.from_conv(layer, weight=weight)
    if isinstance(layer, nn.Linear):
        return MaskedLinear.from_linear(layer, weight=weight)
    return MaskedConv1D.from_conv1d(layer, weight=weight)


def masked_modules(model: nn.Module) -> Iterator[tuple[str, MaskedModule]]:
    """Name and layer, shared ones once."""
    seen: set[int] = set()
    for (path, _), module, _ in walk(model):
        if isinstance(module, MaskedModule) and id(module) not in seen:
            seen.add(id(module))
            yield path, module


def check_model(operation: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{operation}: model must be an nn.Module, got {type(model).__name__}")


def refuse_hooks(operation: str, name: str, parameter: Tensor) -> None:
    """Raise where a hook on the parameter would be lost: torch cannot hand it to another one."""
    for register in ("hook", "post_accumulate_grad_hook"):
        held = "_backward_hooks" if register == "hook" else f"_{register}s"
        if getattr(parameter, held, None):
            raise ValueError(
                f"{operation}: '{name}' has a hook (register_{register}), which its packed or "
                "dense form cannot take over; remove it and register it again afterwards"
            )


def refuse_holders(operation: str, model: nn.Module) -> None:
    """Raise where a wrapper around or inside the model holds the parameters as they were."""
    for module in model.modules():
        names = {cls.__name__ for cls in type(module).__mro__}
        for name in sorted(names & _HOLDERS):
            raise ValueError(
                f"{operation}: {name} holds the parameters as they are; use the model inside it "
                "(.module), then wrap it again"
            )


def replace(model: nn.Module, new: dict[int, nn.Module]) -> nn.Module:
    """Put `new[id(old)]` wherever the model has `old`; returns the model or what replaces it."""
    modules = list(model.modules())
    old = [module for module in modules if id(module) in new]
    for module in modules:
        for key, child in module._modules.items():
            if child is not None and id(child) in new:
                module._modules[key] = new[id(child)]
    for layer in old:
        hand_over(layer, new[id(layer)])
    return new.get(id(model), model)


def _read_by_others(model: nn.Module) -> dict[int, str]:
    """Layer -> the module around it that reads its weight."""
    return {
        id(getattr(module, name)): cls.__name__
        for module in unwrap(model).modules()
        for cls, names in _READERS.items()
        if isinstance(module, cls)
        for name in names
    }


def _reason(slot: Slot, readers: dict[int, str]) -> str:
    owner, name = slot.owner, type(slot.owner).__name__
    if slot.holder is not owner:
        return "it is parametrized; remove the parametrization to pack it"
    if slot.key != slot.attribute:
        return "torch.nn.utils.prune holds it; prune.remove(layer, 'weight') to pack it"
    if id(owner) in readers:
        return f"{readers[id(owner)]} reads it past the layer"
    if slot.attribute != "weight" or not kind(owner):
        plain = isinstance(owner, (nn.Linear, nn.Conv2d)) and slot.attribute == "weight"
        why = f": {name} has a forward or __call__ of its own" if plain else ""
        return f"{name}.{slot.attribute} has no packed form{why}"
    if slot.tensor.dtype not in DTYPES:
        return f"{slot.tensor.dtype} weights have no packed form"
    held = {*owner._parameters, *owner._buffers, *owner._modules}
    if held != {"weight", "bias"} or type(slot.tensor) is not nn.Parameter:
        return f"its layer {name} holds more than a weight and a bias"
    return ""
