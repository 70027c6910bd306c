"""Which weights of a model are pruned."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn
from torch.nn.parameter import is_lazy

from paikern._names import Slot, slots, storage_key, unwrap, walk
from paikern.errors import PaikernWarning
from paikern.pattern import Layout
from paikern.sparse.packed_weight import PackedWeight

__all__ = ["Filter", "Prunable", "prunable_parameters", "unwrap"]

Filter: TypeAlias = "str | type[nn.Module] | nn.Module | Sequence[Any] | None"

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "linear"),
    (nn.ConvTranspose1d, "conv_transpose1d"),
    (nn.ConvTranspose2d, "conv_transpose2d"),
    (nn.ConvTranspose3d, "conv_transpose3d"),
    (nn.Conv1d, "conv1d"),
    (nn.Conv2d, "conv2d"),
    (nn.Conv3d, "conv3d"),
)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Prunable:
    """A weight to prune.

    ``name`` is that of the unwrapped model, ``source`` the one in ``model.named_parameters()``
    (they differ under DDP, ``torch.compile``, parametrizations and ``torch.nn.utils.prune``).
    ``kind`` is "linear", "conv2d", "conv_transpose1d", ..., "hf_conv1d" (transformers' ``Conv1D``,
    whose weight is ``[in, out]``), "attention", or "other" for one that only ``include`` names.
    ``groups`` is that of a convolution.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    module_name: str
    source: str
    groups: int = 1

    @property
    def layout(self) -> Layout:
        """Which dimensions of the weight are inputs and which are outputs."""
        transposed = self.kind == "hf_conv1d" or self.kind.startswith("conv_transpose")
        return Layout(transposed, self.groups)


def prunable_parameters(
    model: nn.Module, ignore: Filter = (), include: Filter = None, *, packed: bool = False
) -> dict[str, Prunable]:
    """The weights that are pruned by default, in ``model.modules()`` pre-order.

    These are the weights of every Linear, convolution (transposed too), transformers ``Conv1D`` and
    attention projection, the first and the last layer included; no bias, norm or embedding. A
    weight that several modules share counts once. Values are never read, so meta tensors will do.

    Args:
        model: any module, wrapped or not.
        ignore: leave these out. One or a list of: parameter or module names (a module stands for
            everything in it), ``"re:"`` patterns matched from the start of such names, module
            classes, modules.
        packed: take weights that `paikern.sparsify` has packed as well (kind "packed", by the name
            and the shape of the dense weight); they are left out otherwise.
        include: take only these, same forms. The exact name of any other parameter with two or
            more dimensions adds it, for instance an RNN's ``weight_ih_l0``.

    Raises:
        ValueError: nothing is left (the filter is named), a name that the model does not have, a
            bad pattern, or a lazy layer that has no shape yet.

    Warns:
        PaikernWarning: a weight is left out because an embedding shares it, it is packed, or it is
            no plain float parameter.

    >>> list(prunable_parameters(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))))
    ['0.weight', '2.weight']
    """
    every = slots(model)
    first: dict[tuple[object, ...], Slot] = {}
    for slot in every:
        first.setdefault(storage_key(slot.tensor), slot)
    drop = _Matcher("ignore", ignore, model, every)
    take = _Matcher("include", include, model, every)
    embedded = {
        storage_key(slot.tensor): slot.name
        for slot in every
        if isinstance(slot.owner, (nn.Embedding, nn.EmbeddingBag))
    }
    found: dict[str, Prunable] = {}
    seen: set[tuple[object, ...]] = set()
    notes = [
        f"{name} is left out: its weight is made from other parameters; fold it first"
        for name in _without_weight(model, every)
    ]
    candidates = 0
    stored: list[str] = []
    for slot in every:
        kind = _kind(slot)
        if kind is None:
            if slot.name not in take.names and slot.source not in take.names:
                continue
            kind = "other"
        if is_lazy(slot.tensor):
            raise ValueError(
                f"layer '{slot.module_name}' is a {type(slot.owner).__name__} without a shape yet; "
                "run one forward pass first"
            )
        key = storage_key(slot.tensor)
        if key in seen:
            continue
        seen.add(key)
        candidates += 1
        if drop.matches(slot) or (include is not None and not take.matches(slot)):
            continue
        reason = None
        if kind != "other":
            reason = _unfit(slot, embedded.get(key))
        elif slot.tensor.dim() < 2:
            raise ValueError(
                f"include: '{slot.name}' has {slot.tensor.dim()} dimension; biases and norms are "
                "not pruned"
            )
        if reason is not None:
            notes.append(f"{slot.name} is left out: {reason}")
            continue
        # A tied weight goes by its first name, as in model.named_parameters().
        name, source = first[key].name, first[key].source
        if kind == "packed":
            if not packed:
                stored.append(slot.module_name)
                continue
            name = first[key].module_name
        groups = getattr(slot.owner, "groups", 1) if kind.startswith("conv") else 1
        weight = slot.owner if isinstance(slot.owner, PackedWeight) else slot.tensor
        shape = tuple(weight.shape)
        found[name] = Prunable(name, shape, kind, slot.module_name, source, groups)
    if stored:
        more = f" and {len(stored) - 1} more" if len(stored) > 1 else ""
        notes.append(f"{stored[0]}{more} left out: packed weights; use pk.densify first")
    if not found:
        raise ValueError(_nothing(model, candidates, ignore, include, notes))
    for note in notes:
        warnings.warn(note, PaikernWarning, stacklevel=2)
    return found


def _kind(slot: Slot) -> str | None:
    owner, attribute = slot.owner, slot.attribute
    if isinstance(owner, nn.MultiheadAttention):
        return "attention" if attribute in _ATTENTION else None
    if isinstance(owner, PackedWeight):
        return "packed"
    if attribute != "weight":
        return None
    for cls, kind in _KINDS:
        if isinstance(owner, cls):
            return kind
    # transformers' Conv1D goes by its class name, so that transformers is not imported.
    named = any(cls.__name__ == "Conv1D" for cls in type(owner).__mro__)
    return "hf_conv1d" if named and slot.tensor.dim() == 2 else None


def _without_weight(model: nn.Module, every: list[Slot]) -> Iterator[str]:
    """Layers whose weight is computed from other parameters, as weight_norm does."""
    plain = {id(slot.owner) for slot in every if _kind(slot) is not None}
    classes = tuple(cls for cls, _ in _KINDS)
    for (name, _), module, _ in walk(model):
        if isinstance(module, classes) and id(module) not in plain:
            plain.add(id(module))
            yield name


def _unfit(slot: Slot, embedding: str | None) -> str | None:
    if embedding is not None:
        return f"the embedding '{embedding}' shares it"
    if not slot.tensor.dtype.is_floating_point:
        return f"{slot.tensor.dtype} values are no plain weights"
    return None


def _nothing(
    model: nn.Module, candidates: int, ignore: Filter, include: Filter, notes: list[str]
) -> str:
    if candidates == 0:
        more = "".join(f"; {note}" for note in notes)
        return (
            f"model: {type(model).__name__} has no Linear, Conv or attention weight to prune{more}"
        )
    if include is not None:
        return (
            f"include={_show(include)} (ignore={_show(ignore)}) leaves none of the {candidates} "
            "prunable weights"
        )
    if ignore not in ((), [], None):
        return f"ignore={_show(ignore)} leaves none of the {candidates} prunable weights"
    return f"model: nothing to prune; {'; '.join(notes)}"


def _show(given: Filter) -> str:
    items = [
        item
        if isinstance(item, str)
        else item.__name__
        if isinstance(item, type)
        else type(item).__name__
        for item in _items(given)
    ]
    return f"[{', '.join(items)}]"


def _items(given: Filter) -> list[Any]:
    if given is None:
        return []
    if isinstance(given, (str, type, nn.Module)):
        return [given]
    return list(given)


class _Matcher:
    """One of the two filters, its names checked against the model."""

    def __init__(self, argument: str, given: Filter, model: nn.Module, every: list[Slot]) -> None:
        self.names: set[str] = set()
        self._patterns: list[re.Pattern[str]] = []
        self._classes: list[type] = []
        inside: set[int] = set()
        # Enclosing modules of a parameter by its name; the root is everyone's.
        self._modules = dict(_named_modules(model))
        known = {name for slot in every for name in (slot.name, slot.source)} | set(self._modules)
        for item in _items(given):
            if isinstance(item, nn.Module):
                inside.update(id(module) for module in item.modules())
            elif isinstance(item, type) and issubclass(item, nn.Module):
                self._classes.append(item)
            elif not isinstance(item, str):
                raise TypeError(
                    f"{argument}: give names, 're:' patterns, module classes or modules, got "
                    f"{type(item).__name__} {item!r}"
                )
            elif item.startswith("re:"):
                self._patterns.append(_compile(argument, item))
            elif item in known:
                self.names.add(item)
            else:
                near = difflib.get_close_matches(item, known, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise ValueError(
                    f"{argument}: '{item}' is no parameter or module of the model{hint}"
                )
        self._inside = inside

    def matches(self, slot: Slot) -> bool:
        if id(slot.owner) in self._inside:
            return True
        enclosing = list(_prefixes(slot.module_name))
        names = [slot.name, slot.source, *enclosing, *_prefixes(slot.source.rpartition(".")[0])]
        if not self.names.isdisjoint(names):
            return True
        if any(p.match(name) for p in self._patterns for name in [slot.name, *enclosing]):
            return True
        around = [self._modules.get(name, slot.owner) for name in ["", *enclosing]]
        return any(isinstance(m, cls) for cls in self._classes for m in [*around, slot.owner])


def _compile(argument: str, item: str) -> re.Pattern[str]:
    try:
        return re.compile(item[3:])
    except re.error as error:
        raise ValueError(f"{argument}: '{item}' is no regular expression: {error}") from error


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for (path, source), module, _ in walk(model):
        yield path, module
        yield source, module


def _prefixes(path: str) -> Iterator[str]:
    """``a.b.c`` -> ``a``, ``a.b``, ``a.b.c``."""
    parts = path.split(".") if path else []
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])
