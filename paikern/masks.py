"""``MaskSet``: which weights are kept, one bit each, by parameter name."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from paikern import _maskfile, ops
from paikern._attach import AttachedMasks
from paikern._names import Slot, find, slots, storage_key, strip_wrappers
from paikern.channels import decoded
from paikern.errors import MaskFormatError, PaikernError
from paikern.ops.unpack_mask import count_kept
from paikern.prunable import Filter, prunable_parameters
from paikern.sparse.in_models import packed_weights
from paikern.sparse.packed_weight import PackedWeight

__all__ = ["AttachedMasks", "MaskSet", "load_masks"]

_SHOWN_ROWS = 12


class MaskSet(Mapping[str, Tensor]):
    """A mapping from parameter name to a bool tensor, True where the weight is kept.

    The masks are held as bits and unpacked on access, a new tensor each time. Names are those of
    the model without wrappers (no ``module.``, ``_orig_mod.``, ``parametrizations.X.original``) and
    keep their order. A ``MaskSet`` is not changed after it is made.

    Args:
        packed: name -> uint8 ``[ceil(numel / 8)]``: bit i % 8 of byte i // 8 belongs to weight i in
            row-major order, spare bits are zero. Not copied.
        shapes: name -> shape of the parameter.
        metadata: what made the masks, as far as JSON can hold it; written into the mask file.

    Raises:
        ValueError: a mask of the wrong length, dtype or with spare bits set, or a missing shape.

    >>> masks = MaskSet.from_bool({"fc.weight": torch.tensor([[True, False, True]])})
    >>> masks.kept, masks.total, masks["fc.weight"].tolist()
    (2, 3, [[True, False, True]])
    """

    __hash__ = None  # type: ignore[assignment]  # equality goes by value

    def __init__(
        self,
        packed: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._packed: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kept: dict[str, int] | None = None
        self.metadata: dict[str, Any] = dict(metadata or {})
        for name, bits in packed.items():
            if name not in shapes:
                raise ValueError(f"shapes: no shape for '{name}'")
            shape = tuple(shapes[name])
            _check_packed(name, bits, math.prod(shape))
            self._packed[name] = bits.detach().contiguous()
            self._shapes[name] = shape

    # --- making one ------------------------------------------------------------------------------

    @classmethod
    def from_bool(
        cls, masks: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> MaskSet:
        """From a mapping of parameter name to mask: bool, or numbers that are all 0 or 1.

        Prefixes of wrappers are taken off the names.

        Raises:
            ValueError: a value other than 0 and 1, or two names that become the same.
        """
        packed: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for given, mask in masks.items():
            name = strip_wrappers(given)
            if name in packed:
                raise ValueError(f"masks: '{given}' and another name both stand for '{name}'")
            kept = mask != 0
            if mask.dtype != torch.bool and not torch.equal(kept.to(mask.dtype), mask):
                raise ValueError(
                    f"masks: '{given}' holds values other than 0 and 1; pass mask != 0 for nonzeros"
                )
            packed[name] = ops.pack_mask(kept.detach().cpu())
            shapes[name] = tuple(mask.shape)
        return cls(packed, shapes, metadata)

    @classmethod
    def from_model(
        cls, model: nn.Module, *, ignore: Filter = (), include: Filter = None
    ) -> MaskSet:
        """The nonzero pattern of a model's prunable weights (NaN counts as nonzero).

        Where ``torch.nn.utils.prune`` or ``paikern.torch_prune`` left a ``weight_mask``, that is
        the mask; of a weight that ``paikern.sparsify`` has packed it is the positions.

        Raises:
            ValueError: nothing to prune, or a weight on the meta device.
        """
        by_name = {slot.name: slot for slot in reversed(slots(model))}
        packed: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        stored = packed_weights(model)
        for name, entry in prunable_parameters(model, ignore, include, packed=True).items():
            shapes[name] = entry.shape
            if name in stored:
                if stored[name].positions.is_meta:
                    raise ValueError(
                        f"from_model: '{name}' is on the meta device and holds no values; load the "
                        "weights first"
                    )
                packed[name] = stored[name].packed_mask().cpu()
                continue
            slot = by_name[name]
            _refuse_meta("from_model", slot)
            buffer = slot.torch_prune_mask
            values = slot.effective() if buffer is None else buffer
            packed[name] = ops.pack_mask((values != 0).cpu())
        return cls(packed, shapes, {"method": "from_model"})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, max_bytes: int = _maskfile.MAX_DATA_BYTES
    ) -> MaskSet:
        """Read a file that ``save`` wrote.

        The file is not trusted: lengths are checked before memory is taken, nothing in it is
        executed or imported, and bits, shapes and provenance are checked against their digests.

        Args:
            path: the file.
            max_bytes: refuse files with more mask data than this.

        Raises:
            MaskFormatError: missing, truncated, altered, oversized, or no mask file.
        """
        packed, shapes, metadata = _maskfile.read(path, max_bytes)
        return cls(packed, shapes, metadata)

    # --- looking at it ---------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        return ops.unpack_mask(self.packed(name), self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, name: object) -> bool:
        return name in self._packed  # Mapping's own would unpack the mask

    def packed(self, name: str) -> Tensor:
        """The bits of one mask, uint8 ``[ceil(numel / 8)]``. Shared memory: do not write to it.

        Raises:
            KeyError: no mask of that name (the nearest is suggested).
        """
        try:
            return self._packed[name]
        except KeyError:
            near = difflib.get_close_matches(str(name), self._packed, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise KeyError(f"no mask is named '{name}'{hint}") from None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the parameter."""
        return dict(self._shapes)

    @property
    def kept_by_layer(self) -> dict[str, int]:
        """Name -> number of kept weights."""
        if self._kept is None:
            self._kept = {name: count_kept(bits) for name, bits in self._packed.items()}
        return dict(self._kept)

    @property
    def kept(self) -> int:
        """Number of kept weights."""
        return sum(self.kept_by_layer.values())

    @property
    def total(self) -> int:
        """Number of weights that the masks cover."""
        return sum(math.prod(shape) for shape in self._shapes.values())

    @property
    def sparsity(self) -> float:
        """Fraction of weights removed, counted (0 for an empty set)."""
        return 1.0 - self.kept / self.total if self.total else 0.0

    @property
    def channels(self) -> dict[str, Tensor]:
        """Weight name -> bool ``[out]``, True for the channels kept by a structured method.

        Empty where the masks were not made by channels. Layers that keep all of theirs, because
        they cannot become narrower, are not in it.

        Raises:
            MaskFormatError: the entry of the file is damaged.
        """
        return decoded(self.metadata.get("channels", {}))

    @property
    def node_sparsity(self) -> float:
        """Fraction of the channels in ``channels`` that are removed (0 for none at all)."""
        kept = self.channels.values()
        total = sum(mask.numel() for mask in kept)
        return 1.0 - sum(int(mask.sum()) for mask in kept) / total if total else 0.0

    @property
    def digest(self) -> str:
        """sha256 over names, shapes and bits: equal exactly for equal masks."""
        return _maskfile.digest(self._packed, self._shapes)

    def __eq__(self, other: object) -> bool:
        """Same names, shapes and bits; order and metadata do not count."""
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self._shapes == other._shapes and all(
            torch.equal(bits.cpu(), other._packed[name].cpu())
            for name, bits in self._packed.items()
        )

    def __repr__(self) -> str:
        method = f", method {self.metadata['method']}" if "method" in self.metadata else ""
        lines = [
            f"MaskSet: {len(self)} parameters, kept {self.kept:,} of {self.total:,}, "
            f"sparsity {self.sparsity:.4f}{method}"
        ]
        names = list(self)
        hidden = len(names) - _SHOWN_ROWS
        head = names if hidden <= 0 else names[: _SHOWN_ROWS - 3]
        tail = names[len(names) - 3 :] if hidden > 0 else []
        width = max((len(name) for name in head + tail), default=0)

        def row(name: str) -> str:
            shape = self._shapes[name]
            kept = f"{self.kept_by_layer[name]:,} of {math.prod(shape):,}"
            return f"  {name:<{width}}  {list(shape)!s:<18}  {kept}"

        lines += [row(name) for name in head]
        lines += [f"  ... {hidden} more ..."] if hidden > 0 else []
        lines += [row(name) for name in tail]
        return "\n".join(lines)

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskSet:
        return self  # nothing changes it, so copies of a model may share it

    # --- using it on a model ---------------------------------------------------------------------

    def slots(self, model: nn.Module) -> dict[str, Slot]:
        """Where the masked parameters live in ``model``, wrapped or not; packed ones are left out.

        Raises:
            MaskFormatError: a parameter is missing or has another shape (all of them are named).
        """
        found, _, problems = self._match(model)
        if problems:
            raise MaskFormatError(_another_model(problems))
        return found

    def apply(self, model: nn.Module) -> None:
        """Zero the pruned weights in place. Whatever is under a mask becomes 0, NaN included.

        The model is not touched unless all masks fit. A weight that ``paikern.sparsify`` has packed
        has nothing where its own mask is 0; of its values those under these masks become 0.

        Raises:
            MaskFormatError: the masks belong to another model.
            ValueError: weights on the meta device, or sharded (DTensor).
        """
        found, packed, problems = self._match(model)
        if problems:
            raise MaskFormatError(_another_model(problems))
        for slot in found.values():
            _refuse_meta("apply", slot)
        for name, slot in found.items():
            tensor = slot.tensor.detach()
            ops.apply_mask_(tensor, self._packed[name].to(tensor.device))
        for name, weight in packed.items():
            kept = weight.gather(self[name].to(weight.device))
            weight.values.detach().masked_fill_(~kept, 0)

    def attach(self, model: nn.Module, optimizer: Any) -> AttachedMasks:
        """Apply the masks now and after every optimizer step, so pruned weights stay 0.

        The optimizer's tensors of the same shape (momentum, moments) are masked as well, and a
        dense checkpoint loaded later is masked again. Works before or after wrapping in DDP or
        ``torch.compile``, with fused and foreach optimizers and with tied weights; state-dict keys
        do not change. Packed weights are left alone: they have no pruned values.

        Args:
            model: the model that the masks were made for.
            optimizer: any torch optimizer of its parameters, except LBFGS.

        Returns:
            A handle; ``handle.remove()`` ends it.

        Raises:
            MaskFormatError: the masks belong to another model.
            TypeError, ValueError: no torch optimizer, LBFGS, or one of other parameters; a packed
            weight that keeps more than these masks.
        """
        for name, weight in self._match(model)[1].items():
            if not bool(weight.gather(self[name].to(weight.device)).all()):
                raise ValueError(
                    f"attach: '{name}' is packed with weights that these masks prune; use "
                    "pk.densify, then pk.sparsify with these masks"
                )
        return AttachedMasks(self, model, optimizer)

    def verify(self, model: nn.Module) -> None:
        """Check that the model has every masked parameter and zeros wherever a mask says so.

        Raises:
            PaikernError: one line that names all problems; ``problems(model)`` lists them.
        """
        found = self.problems(model)
        if found:
            raise PaikernError(f"verify: {'; '.join(found)}")

    def problems(self, model: nn.Module) -> list[str]:
        """What ``verify`` complains about, one line each; empty if all is well."""
        found, packed, lines = self._match(model)
        for name, slot in found.items():
            if slot.tensor.is_meta:
                lines.append(f"{name} is on the meta device and holds no values")
                continue
            alive = (slot.effective() != 0).cpu()
            lines += _revived(name, int(alive.logical_and_(~self[name].cpu()).sum()))
        for name, weight in packed.items():
            if weight.values.is_meta:
                lines.append(f"{name} is on the meta device and holds no values")
                continue
            pruned = ~weight.gather(self[name].to(weight.device))
            if bool(pruned.any()):
                alive = weight.values.detach()[pruned] != 0
                lines += _revived(name, int(alive.sum()))
        return lines

    def to_torch_prune(self, model: nn.Module) -> None:
        """Hand the masks to ``torch.nn.utils.prune``: ``weight_orig`` and ``weight_mask`` appear.

        Every layer that shares a tied weight gets the mask. A layer that is pruned already by
        ``paikern.torch_prune`` is pruned further by it.

        Raises:
            MaskFormatError: the masks belong to another model.
            ValueError: a parametrized or packed weight, which torch's pruning cannot take.
        """
        from paikern import torch_prune as packed_prune  # most programs do not need it
        from paikern.torch_prune.buffers import MaskedBuffers

        found, packed, problems = self._match(model)
        if problems:
            raise MaskFormatError(_another_model(problems))
        for name in packed:
            raise ValueError(f"to_torch_prune: '{name}' is packed; use pk.densify first")
        masks: dict[tuple[object, ...], Tensor] = {}
        for name, slot in found.items():
            if slot.holder is not slot.owner:
                raise ValueError(
                    f"to_torch_prune: '{name}' is parametrized; remove the parametrization first"
                )
            masks[storage_key(slot.tensor)] = self[name]
        done: set[tuple[int, str]] = set()
        for slot in slots(model):
            mask = masks.get(storage_key(slot.tensor))
            place = (id(slot.owner), slot.attribute)
            if mask is not None and place not in done:
                done.add(place)
                bits = isinstance(slot.owner._buffers, MaskedBuffers)
                prune = packed_prune if bits else torch_prune
                prune.custom_from_mask(slot.owner, slot.attribute, mask.to(slot.tensor.device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: packed bits, and shapes and provenance in the header.

        The file appears whole or not at all; an existing one is replaced.

        Raises:
            OSError: as the file system says; nothing is left behind.
        """
        reached = {"sparsity_reached": self.sparsity}
        _maskfile.write(path, self._packed, self._shapes, {**self.metadata, **reached})

    def _match(
        self, model: nn.Module
    ) -> tuple[dict[str, Slot], dict[str, PackedWeight], list[str]]:
        """Slots of dense weights, packed weights, and what is missing or has another shape."""
        stored = packed_weights(model)
        packed = {
            name: stored[known]
            for name in self._packed
            if (known := name if name in stored else strip_wrappers(name)) in stored
        }
        found, missing = find(model, [name for name in self._packed if name not in packed])
        problems = [f"the model has no parameter {name!r}" for name in missing]
        shapes = {name: tuple(slot.tensor.shape) for name, slot in found.items()}
        shapes |= {name: tuple(weight.shape) for name, weight in packed.items()}
        for name in self._packed:
            if name in shapes and shapes[name] != self._shapes[name]:
                found.pop(name, None)
                packed.pop(name, None)
                problems.append(
                    f"{name} has shape {list(shapes[name])}, its mask {list(self._shapes[name])}"
                )
        return found, packed, problems


def load_masks(
    path: str | os.PathLike[str], *, max_bytes: int = _maskfile.MAX_DATA_BYTES
) -> MaskSet:
    """Read a mask file; see ``MaskSet.load``.

    Raises:
        MaskFormatError: missing, truncated, altered, oversized, or no mask file.

    >>> import tempfile
    >>> masks = MaskSet.from_bool({"fc.weight": torch.tensor([[True, False, True]])})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     masks.save(f"{folder}/masks.safetensors")
    ...     load_masks(f"{folder}/masks.safetensors") == masks
    True
    """
    return MaskSet.load(path, max_bytes=max_bytes)


def _check_packed(name: str, bits: Tensor, numel: int) -> None:
    if name == "__metadata__":
        raise ValueError("packed: '__metadata__' is the header entry of mask files, not a name")
    length = (numel + 7) // 8
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (length,):
        raise ValueError(
            f"packed: '{name}' must be uint8 of shape [{length}] for {numel} weights, got "
            f"{bits.dtype} of shape {list(bits.shape)}; use ops.pack_mask"
        )
    spare = -numel % 8
    if spare and int(bits[-1]) >> (8 - spare):
        raise ValueError(f"packed: '{name}' has bits beyond its last weight; use ops.pack_mask")


def _refuse_meta(operation: str, slot: Slot) -> None:
    if slot.tensor.is_meta:
        raise ValueError(
            f"{operation}: '{slot.name}' is on the meta device and holds no values; load the "
            "weights first"
        )
    if hasattr(slot.tensor, "placements"):
        raise ValueError(
            f"{operation}: '{slot.name}' is sharded (DTensor); apply the masks before sharding"
        )


def _revived(name: str, count: int) -> list[str]:
    return [f"{name} has {count} pruned weights that are not 0; apply the masks"] if count else []


def _another_model(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return f"the masks belong to another model: {'; '.join(problems[:3])}{more}"
