"""Parameter names of the unwrapped model, and the tensors behind them.

Wrapping changes names: ``DistributedDataParallel`` adds ``module.``, ``torch.compile`` adds
``_orig_mod.``, FSDP and activation checkpointing add prefixes of their own, a parametrization moves
``weight`` to ``parametrizations.weight.original`` and ``torch.nn.utils.prune`` renames it to
``weight_orig``. Masks use the name without all that, so they fit before and after wrapping.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

# Child names that only wrappers use, and the classes (by name, so that none has to be imported)
# whose child ``module`` is the wrapped model.
_WRAPPER_CHILDREN = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_WRAPPER_CLASSES = {
    "AveragedModel",
    "DataParallel",
    "DeepSpeedEngine",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
}


Parents: TypeAlias = "tuple[nn.Module, ...]"


@dataclass(frozen=True)
class Slot:
    """Where one parameter lives.

    ``name`` is the unwrapped name, ``source`` the one in ``model.named_parameters()``; ``owner`` is
    the module that computes with it as ``attribute`` and ``holder`` the one in whose
    ``_parameters`` it is stored as ``key``. The last two differ under a parametrization.
    """

    name: str
    source: str
    module_name: str
    owner: nn.Module
    attribute: str
    holder: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor:
        """The parameter as it is now, also after someone has replaced it."""
        tensor = self.holder._parameters[self.key]
        assert tensor is not None
        return tensor

    @property
    def torch_prune_mask(self) -> Tensor | None:
        """The buffer in which ``torch.nn.utils.prune`` keeps its mask, if the weight has one."""
        if self.holder is self.owner and self.key != self.attribute:
            return self.owner._buffers.get(f"{self.attribute}_mask")
        return None

    def is_stale(self, model: nn.Module) -> bool:
        """Whether ``model`` no longer reaches the parameter by its old path."""
        module: nn.Module | None = model
        for part in self.source.split(".")[:-1]:
            module = module._modules.get(part) if module is not None else None
        return module is not self.holder or self.holder._parameters.get(self.key) is None

    def effective(self) -> Tensor:
        """What the layer computes with: under ``torch.nn.utils.prune`` the masked weight."""
        mask = self.torch_prune_mask
        if mask is not None:
            return self.tensor.detach() * mask
        if self.holder is not self.owner:
            effective: Tensor = getattr(self.owner, self.attribute)
            return effective.detach()
        return self.tensor.detach()


def slots(model: nn.Module) -> list[Slot]:
    """Every name of every parameter, in the order of ``model.named_modules()``.

    A parameter with several names (tied weights) appears once for each.
    """
    return [
        _slot(path, key, module, parents)
        for path, module, parents in walk(model)
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP, ``torch.compile`` and the other wrappers around it."""
    while True:
        for key, child in model._modules.items():
            if child is not None and _is_wrapper(model, key):
                model = child
                break
        else:
            return model


def find(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, Slot], list[str]]:
    """The slots of ``names``, and the names that the model does not have.

    A name may be the unwrapped one, the one in ``named_parameters()``, any alias of a tied
    parameter, or one that still carries a wrapper's prefix.
    """
    table: dict[str, Slot] = {}
    everything = slots(model)
    for key in ("name", "source"):
        for slot in everything:
            table.setdefault(getattr(slot, key), slot)
    for slot in everything:
        table.setdefault(strip_wrappers(slot.name), slot)
    found: dict[str, Slot] = {}
    missing: list[str] = []
    for name in names:
        match = table.get(name) or table.get(strip_wrappers(name))
        if match is None:
            missing.append(name)
        else:
            found[name] = match
    return found, missing


def strip_wrappers(name: str) -> str:
    """``name`` without what wrappers add, as far as the name alone can tell.

    A leading ``module.`` is taken for DDP's; one further inside may be a real submodule and stays.

    >>> strip_wrappers("module._orig_mod.layer.parametrizations.weight.original")
    'layer.weight'
    """
    *path, last = name.split(".")
    parts = [*(part for part in path if part not in _WRAPPER_CHILDREN), last]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    if len(parts) >= 3 and parts[-3] == "parametrizations" and parts[-1] == "original":
        parts = [*parts[:-3], parts[-2]]
    return re.sub(r"(?<=[^.])_orig$", "", ".".join(parts))


def storage_key(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two live parameters exactly if they are the same numbers in memory."""
    if type(tensor) not in {Tensor, nn.Parameter} or tensor.numel() == 0:
        return (id(tensor),)
    # The storage object's address also tells meta tensors apart, whose data pointer is 0.
    storage = tensor.untyped_storage()._cdata
    return (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def _is_wrapper(module: nn.Module, child: str) -> bool:
    if child in _WRAPPER_CHILDREN:
        return True
    return child == "module" and any(c.__name__ in _WRAPPER_CLASSES for c in type(module).__mro__)


def walk(model: nn.Module) -> Iterator[tuple[tuple[str, str], nn.Module, Parents]]:
    """``((unwrapped path, path), module, enclosing modules)``, pre-order, shared ones repeated."""
    stack: list[tuple[tuple[str, str], nn.Module, Parents]] = [(("", ""), model, ())]
    while stack:
        (path, source), module, parents = stack.pop()
        yield (path, source), module, parents
        inner = (*parents, module)
        children = []
        for key, child in module._modules.items():
            if child is not None and child not in inner:
                below = path if _is_wrapper(module, key) else _join(path, key)
                children.append(((below, _join(source, key)), child, inner))
        stack.extend(reversed(children))


def _slot(path: tuple[str, str], key: str, module: nn.Module, parents: Parents) -> Slot:
    unwrapped, source = path[0], _join(path[1], key)
    if key == "original" and len(parents) >= 2:
        outer, attribute = unwrapped.rpartition(".")[::2]
        if outer.rpartition(".")[2] == "parametrizations":
            name = outer.rpartition(".")[0]
            owner = parents[-2]
            return Slot(_join(name, attribute), source, name, owner, attribute, module, key)
    attribute = key
    if key.endswith("_orig") and f"{key[:-5]}_mask" in module._buffers:
        attribute = key[:-5]
    return Slot(_join(unwrapped, attribute), source, unwrapped, module, attribute, module, key)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
