"""Where a pruned module keeps its masks: a `_buffers` dict that holds bits and hands out tensors.

`nn.Module` asks `_parameters` and then `_buffers` for every attribute that is not a plain one, and
all that walks over a module's state (`state_dict`, `load_state_dict`, `to`, `buffers`) goes through
the same dict. So the module keeps its class, and only this dict knows that `weight_mask` is one bit
a weight and that `weight` is `weight_orig` where the bit is set.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paikern import ops
from paikern.torch_prune.masked import masked, watched

__all__ = ["MaskTensor", "MaskedBuffers", "PackedMask", "install", "pack", "uninstall"]


class MaskTensor(Tensor):
    """A mask as its module hands it out. What is written to it reaches the bits.

    Whatever is computed from it is a plain tensor. `data` and `detach()` are the tensor itself, for
    people write to `weight_mask.data`, and another tensor would not be known to the module.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    holder: PackedMask

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        self.holder.assign(value)
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.holder.lend(self)

    def detach(self) -> Tensor:
        return self

    def plain(self) -> Tensor:
        """A tensor of the ordinary class on the same memory."""
        return Tensor.detach(self)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.plain())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = memo.setdefault(id(self), self.clone())
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)


class PackedMask:
    """One mask: bits, and a dense tensor of them only while somebody holds it.

    Whoever holds the tensor may write to it, as to any buffer, so the bits are taken from it again
    when they are asked for and when it goes away.

    Args:
        bits: uint8 `[ceil(numel / 8)]`, see `pack_mask`. Shared, never written to.
        shape: of the weight.
        dtype: of the tensor that is handed out.

    >>> mask = PackedMask(torch.tensor([5], dtype=torch.uint8), (3,), torch.float32)
    >>> mask.dense()
    tensor([1., 0., 1.])
    >>> mask.dense()[1] = 1
    >>> mask.bits
    tensor([7], dtype=torch.uint8)
    """

    def __init__(self, bits: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        if bits.is_inference():  # autograd would refuse to save it
            with torch.inference_mode(False):
                bits = bits.clone()
        self._bits = bits
        # The tensor handed out, and one of our own on the same memory, there in its callback.
        self._lent: weakref.ReferenceType[MaskTensor] | None = None
        self._alias: Tensor | None = None
        # A tensor that cannot be packed: of a tracer, or of a functorch transform.
        self._foreign: Tensor | None = None

    @property
    def bits(self) -> Tensor:
        """uint8 `[ceil(numel / 8)]`. Shared: do not write to it."""
        if self._alias is not None:
            self._repack()
        return self._bits

    def dense(self) -> Tensor:
        """The mask as ones and zeros; the same tensor for as long as somebody holds it."""
        if self._foreign is not None:
            return self._foreign
        lent = self._lent() if self._lent is not None else None
        if lent is not None:
            return lent
        mask = ops.unpack_mask(self.bits, self.shape).to(self.dtype)
        if not _holds_numbers(mask):
            return mask
        tensor = Tensor._make_subclass(MaskTensor, mask)
        self.lend(tensor)
        return tensor

    def lend(self, tensor: MaskTensor) -> None:
        """Follow what is written to the tensor."""
        tensor.holder = self
        self._alias = tensor.plain()
        self._lent = weakref.ref(tensor, _Return(self))

    def apply(self, weight: Tensor) -> Tensor:
        """The weight where the mask is set, +0 elsewhere; differentiable in the weight."""
        if self._foreign is not None:
            return self._foreign.to(weight.dtype) * weight
        if self._alias is not None and watched():  # a tracer must not change this object
            return torch.where(self._alias != 0, weight, 0)
        return masked(weight, self.bits)

    def assign(self, mask: Tensor) -> None:
        """Replace the mask.

        Raises:
            ValueError: another shape, or values other than 0 and 1.
        """
        if tuple(mask.shape) != self.shape:
            raise ValueError(
                f"mask: the weight has shape {list(self.shape)}, the mask {list(mask.shape)}"
            )
        if self._lent is not None and mask is self._lent():  # a tracer puts back what it took
            self._foreign = None
            return
        if torch._C._functorch.is_functorch_wrapped_tensor(mask):
            self._foreign = mask
            return
        bits = pack(mask, checked=not self._bits.is_meta)  # memory of `to_empty` holds anything
        if not _holds_numbers(bits):
            self._foreign = mask
            return
        self._bits, self.dtype = bits, mask.dtype
        self._lent = self._alias = self._foreign = None

    def returned(self, lent: weakref.ReferenceType[MaskTensor]) -> None:
        """The tensor that was handed out is gone: keep what was written to it."""
        if lent is self._lent:
            self._lent = None
            self._repack()

    def copy(self) -> PackedMask:
        """The same mask for another module."""
        return PackedMask(self.bits, self.shape, self.dtype)

    def _repack(self) -> None:
        assert self._alias is not None
        with torch.inference_mode(False), torch.no_grad():
            bits = ops.pack_mask(self._alias != 0)
        # Python may let go of the tensor while something is traced with fake tensors, where
        # nothing can be computed; then it waits for the next reader.
        if _holds_numbers(bits):
            self._bits = bits
            if self._lent is None:
                self._alias = None

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedMask, (self.bits, self.shape, self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedMask:
        return self.copy()


class _Return:
    """Callback of the tensor; holds the mask weakly, so that it does not keep it alive."""

    def __init__(self, mask: PackedMask) -> None:
        self._mask = weakref.ref(mask)

    def __call__(self, lent: weakref.ReferenceType[MaskTensor]) -> None:
        mask = self._mask()
        if mask is not None and not sys.is_finalizing():  # the operations are gone before the masks
            mask.returned(lent)


class MaskedBuffers(dict[str, Any]):
    """The `_buffers` of a pruned module.

    It lists what torch's own pruning registers: the other buffers, and `weight_mask` as a tensor
    made from the bits. Beyond that it answers for `weight`, made from `weight_orig` and the bits,
    without listing it. What is assigned to `weight` stays until `refresh`.

    Args:
        parameters: the `_parameters` of the module.
        entries: buffers by name; those of class `PackedMask` are the masks.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> layer.weight_orig = layer.weight
    >>> del layer.weight
    >>> bits = torch.tensor([9], dtype=torch.uint8)
    >>> install(layer).hold("weight", PackedMask(bits, (2, 2), torch.int32))
    >>> layer.weight_mask.tolist(), [name for name, _ in layer.named_buffers()]
    ([[1, 0], [0, 1]], ['weight_mask'])
    >>> torch.equal(layer.weight, layer.weight_orig * torch.eye(2))
    True
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter | None], entries: Mapping[str, Any]
    ) -> None:
        super().__init__(entries)
        self.parameters = parameters
        self._assigned: dict[str, Any] = {}
        self._deleted: set[str] = set()

    # --- masks -----------------------------------------------------------------------------------

    def mask(self, name: str) -> PackedMask | None:
        """The mask of the parameter `name`, if it has one."""
        mask = super().get(f"{name}_mask")
        return mask if isinstance(mask, PackedMask) else None

    def hold(self, name: str, mask: PackedMask) -> None:
        """Put a mask in, or another in its place."""
        super().__setitem__(f"{name}_mask", mask)
        self.refresh(name)

    def refresh(self, name: str) -> None:
        """Forget what was assigned to `name`: it is made from the bits again."""
        if self._assigned or self._deleted:
            self._assigned.pop(name, None)
            self._deleted.discard(name)

    def makes(self, name: str) -> bool:
        """Whether `name` can be made here: a mask, and an original among the parameters."""
        original = self.parameters.get(f"{name}_orig")
        return original is not None and self.mask(name) is not None

    def entries(self) -> dict[str, Any]:
        """What is stored: tensors and packed masks."""
        return dict(zip(super().keys(), super().values(), strict=True))

    # --- the dict --------------------------------------------------------------------------------

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key) or key in self._assigned:
            return True
        return isinstance(key, str) and key not in self._deleted and self.makes(key)

    def __getitem__(self, key: str) -> Any:
        if super().__contains__(key):
            value = super().__getitem__(key)
            return value.dense() if isinstance(value, PackedMask) else value
        if key in self._assigned:
            return self._assigned[key]
        mask = self.mask(key)
        original = self.parameters.get(f"{key}_orig")
        if mask is None or original is None or key in self._deleted:
            raise KeyError(key)
        return mask.apply(original)

    def __setitem__(self, key: str, value: Any) -> None:
        held = super().get(key)
        if isinstance(held, PackedMask) and isinstance(value, Tensor):
            held.assign(value)
        elif not super().__contains__(key) and key in self:
            self._assigned[key] = value
        else:
            super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        if super().__contains__(key):
            super().__delitem__(key)
        elif key in self:
            self._assigned.pop(key, None)
            self._deleted.add(key)
        else:
            raise KeyError(key)

    def __iter__(self) -> Iterator[str]:  # makes dict(buffers) ask for every value
        return super().__iter__()

    # The dict's own would read or write what is stored instead of what it stands for.
    get = MutableMapping.get  # type: ignore[assignment]
    items = MutableMapping.items  # type: ignore[assignment]
    pop = MutableMapping.pop
    popitem = MutableMapping.popitem
    setdefault = MutableMapping.setdefault
    update = MutableMapping.update
    values = MutableMapping.values  # type: ignore[assignment]

    def copy(self) -> MaskedBuffers:
        """For a replica of the module, whose parameters are not in `_parameters`."""
        return MaskedBuffers({}, _fresh(self.entries()))

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskedBuffers, (self.parameters, self.entries())


def install(module: nn.Module) -> MaskedBuffers:
    """Give the module a dict that can hold masks, unless it has one."""
    found = module._buffers
    if isinstance(found, MaskedBuffers):
        found.parameters = module._parameters
        return found
    made = MaskedBuffers(module._parameters, found)
    module.__dict__["_buffers"] = made
    return made


def uninstall(module: nn.Module) -> None:
    """Give the module a plain dict again once it has no masks."""
    buffers = module._buffers
    if isinstance(buffers, MaskedBuffers):
        entries = buffers.entries()
        if not any(isinstance(value, PackedMask) for value in entries.values()):
            module.__dict__["_buffers"] = entries


def pack(mask: Tensor, *, checked: bool = True) -> Tensor:
    """The bits of a mask of ones and zeros, of any dtype.

    Args:
        mask: the mask.
        checked: refuse other values; else what is not 0 counts as 1.

    Raises:
        ValueError: other values.
    """
    with torch.inference_mode(False), torch.no_grad():
        kept = mask != 0
        checked = checked and _holds_numbers(kept) and not kept.is_meta
        if checked and mask.dtype != torch.bool and not kept.to(mask.dtype).equal(mask):
            raise ValueError("mask: holds values other than 0 and 1; pass mask != 0 for nonzeros")
        return ops.pack_mask(kept)


def _holds_numbers(tensor: Tensor) -> bool:
    """Whether it is a plain tensor: not a tracer's, nor one inside a functorch transform."""
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _fresh(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries with masks of their own, so that a change of one does not reach the other."""
    return {
        key: value.copy() if isinstance(value, PackedMask) else value
        for key, value in entries.items()
    }
