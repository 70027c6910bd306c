"""PackedWeight: the kept values of a weight and where they belong."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from paikern.ops.pack_mask import pack_mask
from paikern.ops.positions import MOST_KEPT, list_positions, transpose_positions
from paikern.ops.scatter_kept import scatter_kept
from paikern.ops.unpack_mask import check_packed, count_kept, unpack_mask
from paikern.sparse import _weightfile

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = ("auto", "index", "bitmap")
# Panels of 4096 columns for 64 rows of x are 1 MB: half of the L2 that newer server cores have.
# Narrower ones lose more than they gain: at 4096 x 4096 and batch 256, panels of 1024 took 5 % less
# time at density 0.1 and 12 % more at 0.01, panels of 256 1 % less and 2.1 times as long.
PANEL = 4096
# Above half kept, bits: 16 bits a kept weight would outgrow a dense weight of halves.
INDEX_DENSITY = 0.5

_dense_keys: ContextVar[bool] = ContextVar("paikern_dense_keys", default=False)


@contextlib.contextmanager
def dense_keys() -> Iterator[None]:
    """Within the block, `state_dict` of packed weights holds the dense weight under its own key.

    A packed weight that is the submodule `weight` of `fc` is then `fc.weight`, as it was before it
    was packed, not `fc.weight.values` and `fc.weight.mask`. Loading takes either without asking.

    Example:
        >>> import torch
        >>> net = torch.nn.Module()
        >>> net.weight = PackedWeight.from_dense(torch.ones(1, 2), torch.tensor([[True, False]]))
        >>> list(net.state_dict())
        ['weight.values', 'weight.mask']
        >>> with dense_keys():
        ...     list(net.state_dict().items())
        [('weight', tensor([[1., 0.]]))]
    """
    token = _dense_keys.set(True)
    try:
        yield
    finally:
        _dense_keys.reset(token)


def pack_keys(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of the dense model as one that `model`, with packed weights, can load.

    Args:
        model: has packed weights somewhere.
        state_dict: may hold a dense weight `[out, in]` for each of them, see `dense_keys`.

    Returns:
        A copy in which each such weight has become the values that the model keeps and its mask.
        What the dense weight holds elsewhere is dropped.

    Raises:
        ValueError: a dense weight of another shape.

    Example:
        >>> import torch
        >>> net = torch.nn.Module()
        >>> net.weight = PackedWeight.from_dense(torch.ones(1, 2), torch.tensor([[True, False]]))
        >>> net.load_state_dict(pack_keys(net, {"weight": torch.tensor([[5.0, 6.0]])}))
        <All keys matched successfully>
        >>> net.weight.to_dense().tolist()
        [[5.0, 0.0]]
    """
    found = dict(state_dict)
    for name, module in model.named_modules():
        key = _dense_key(name + "." if name else "")
        if not isinstance(module, PackedWeight) or key not in found:
            continue
        dense, mask = found.pop(key), module.packed_mask()
        if dense.shape != module.shape:
            raise ValueError(
                f"pack_keys: {key} has shape {tuple(dense.shape)} in the state dict, "
                f"{tuple(module.shape)} in the model"
            )
        prefix = name + "." if name else ""
        found[prefix + "mask"] = mask
        found[prefix + "values"] = dense[unpack_mask(mask, module.shape).to(dense.device)]
    return found


class PackedWeight(nn.Module):
    """A 2-D weight of which only the kept values are stored.

    Attributes:
        values: Parameter `[nnz]`, the kept values in row-major order, that of the bits of the mask.
        shape: `[out, in]` of the dense weight.

    Positions are 16-bit columns (`format="index"`, 2 bytes a kept weight) or packed bits
    (`"bitmap"`, 1/8 byte a weight); "auto" takes columns up to density 0.5. Columns serve the
    kernels as they are; bits are turned into columns for the length of each call, which is for
    memory and not for speed. The positions of the transposed weight, which the gradient for x
    needs, are made when first used and kept: 6 bytes a kept weight.

    The mask never changes, so pruned weights stay zero however the values are trained. The values
    are read when they are used: change them in place, or through an optimizer.

    Example:
        >>> w = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
        >>> packed = PackedWeight.from_dense(w, w.abs() >= 1)
        >>> packed.values.tolist(), packed.nnz, packed.density
        ([1.0, -2.0, 3.0, -1.0], 4, 0.6666666666666666)
        >>> packed.to_dense().tolist()
        [[1.0, -2.0, 0.0], [0.0, 3.0, -1.0]]
    """

    values: nn.Parameter
    positions: Tensor
    starts: Tensor

    def __init__(
        self,
        values: Tensor,
        mask: Tensor,
        shape: tuple[int, int],
        *,
        format: str = "auto",
        panel: int = PANEL,
    ) -> None:
        """`from_dense` is the usual way; this one takes what a file or another packed weight has.

        Args:
            values: `[nnz]`, float32, bfloat16, float16 or float64; a Parameter is taken as it is.
            mask: packed bits of `shape` with `nnz` of them set, row-major, see `pack_mask`.
            shape: `(out, in)`.
            format: "auto", "index" or "bitmap".
            panel: columns that the kernels go through at a time, a power of two up to 65,536.

        Raises:
            ValueError, TypeError: values and mask that do not fit, another format or dtype.
        """
        super().__init__()
        if format not in FORMATS:
            raise ValueError(f"PackedWeight: format must be one of {FORMATS}, got {format!r}")
        if len(shape) != 2 or min(shape) < 0:
            raise ValueError(f"PackedWeight: shape must be (out, in), got {tuple(shape)}")
        if values.dtype not in DTYPES or values.dim() != 1:
            raise TypeError(
                f"PackedWeight: values must be a 1-D tensor of float32, bfloat16, float16 or "
                f"float64, got {values.dtype} with shape {tuple(values.shape)}"
            )
        self.shape = torch.Size(shape)
        self.panel = panel
        numel = shape[0] * shape[1]
        dense = format == "auto" and values.numel() > INDEX_DENSITY * numel
        self.format = "bitmap" if dense else ("index" if format == "auto" else format)
        self.values = values if isinstance(values, nn.Parameter) else nn.Parameter(values)
        self._transposed: tuple[Tensor, Tensor, Tensor] | None = None
        self._where: tuple[Any, ...] | None = None
        self.register_buffer("positions", torch.empty(0), persistent=False)
        self.register_buffer("starts", torch.empty(0), persistent=False)
        self._place(mask.to(values.device))

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor, *, format: str = "auto", panel: int = PANEL
    ) -> PackedWeight:
        """Pack the values of `weight` where `mask` is set.

        Args:
            weight: `[out, in]`, float32, bfloat16, float16 or float64, any strides; left as it is.
            mask: bool of the same shape, or its packed bits (uint8). What lies under a 0 is never
                looked at.
            format, panel: see the class.

        Returns:
            A packed weight on the device of `weight`. Its values require a gradient unless `weight`
            is a Parameter that does not.

        Raises:
            ValueError: a mask of another shape or device, NaN in a kept value (infinity passes),
            2**31 kept weights or more. TypeError: another dtype.
        """
        if weight.dim() != 2:
            raise ValueError(
                f"PackedWeight.from_dense: weight must be [out, in], got {tuple(weight.shape)}"
            )
        if weight.dtype not in DTYPES:
            raise TypeError(
                "PackedWeight.from_dense: weight must be float32, bfloat16, float16 or float64, "
                f"got {weight.dtype}"
            )
        if mask.device != weight.device:
            raise ValueError(
                f"PackedWeight.from_dense: weight is on {weight.device} and mask on "
                f"{mask.device}; move them to one device"
            )
        kept = _bool_mask(weight, mask)
        values = weight.detach()[kept]
        if values.numel() > MOST_KEPT:
            raise ValueError(
                f"PackedWeight.from_dense: {values.numel()} weights are kept, at most {MOST_KEPT} "
                "can be; split the weight by rows"
            )
        if bool(torch.isnan(values).any()):
            at = (torch.isnan(weight.detach()) & kept).nonzero()[0].tolist()
            raise ValueError(
                f"PackedWeight.from_dense: weight holds NaN at {at}, which the mask keeps"
            )
        trained = weight.requires_grad or not isinstance(weight, nn.Parameter)
        parameter = nn.Parameter(values, requires_grad=trained)
        rows, columns = weight.shape
        return cls(parameter, pack_mask(kept), (rows, columns), format=format, panel=panel)

    # --- what it is ------------------------------------------------------------------------------

    @property
    def nnz(self) -> int:
        """How many weights are kept."""
        return self.values.numel()

    @property
    def density(self) -> float:
        """The fraction kept; 0 for a weight of no elements."""
        return self.nnz / max(1, self.shape.numel())

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of the values and positions, those of the transposed weight too once they exist."""
        held = (self.values, self.positions, self.starts, *(self._transposed or ()))
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def extra_repr(self) -> str:
        return (
            f"{list(self.shape)}, nnz={self.nnz} ({self.density:.1%}), {self.format}, {self.dtype}"
        )

    def to_dense(self) -> Tensor:
        """`[out, in]`, zeros where nothing is kept; differentiable in the values.

        Example:
            >>> kept = torch.tensor([[True, False, True]])
            >>> packed = PackedWeight.from_dense(torch.ones(1, 3), kept)
            >>> packed.to_dense().tolist()
            [[1.0, 0.0, 1.0]]
        """
        sizes = (*self.shape, self.panel, self.nnz)
        return scatter_kept(self.values, self.positions, self.starts, *sizes)

    def packed_mask(self) -> Tensor:
        """The mask as packed bits, `[ceil(out * in / 8)]`, uint8."""
        if self.format == "bitmap":
            return self.positions
        rows, columns = self.shape
        panels = -(-columns // self.panel)
        cells = torch.arange(rows * panels, device=self.starts.device)
        cell = torch.repeat_interleave(cells, self.starts.diff().long())
        row = cell // max(panels, 1)
        base = (cell - row * panels) * self.panel >> 16 << 16  # positions are modulo 65,536
        kept = torch.zeros(rows * columns, dtype=torch.bool, device=self.starts.device)
        kept[row * columns + base + (self.positions.long() & 0xFFFF)] = True
        return pack_mask(kept)

    # --- for the operations ----------------------------------------------------------------------

    def where(self, *, transposed: bool) -> tuple[Any, ...]:
        """The positions as `torch.ops.paikern.masked_linear` takes them."""
        if transposed and self._transposed is None and self.format == "index":
            rows, columns = self.shape
            self._transposed = transpose_positions(
                self.positions, self.starts, rows, columns, self.panel
            )
        # A module looks up its tensors slowly: 2.4 us less a call. A compiler has them anyway, and
        # would compile again for an attribute that changed.
        known = None if torch.compiler.is_compiling() else self._where
        if known is not None and (known[2] is None) == (self._transposed is None):
            return known
        back = self._transposed or (None, None, None)
        found = (self.positions, self.starts, *back, *self.shape, self.panel, self.nnz)
        if not torch.compiler.is_compiling():
            self._where = found
        return found

    def _place(self, mask: Tensor) -> None:
        """Sets the positions from packed bits, of which as many as there are values are set."""
        rows, columns = self.shape
        check_packed("PackedWeight", mask, rows * columns)
        bits = pack_mask(unpack_mask(mask, (rows * columns,)))  # spare bits become zero
        kept = count_kept(bits)
        if kept != self.values.numel():
            raise ValueError(
                f"PackedWeight: the mask keeps {kept} weights, {self.values.numel()} values given"
            )
        positions, starts = list_positions(bits, kept, rows, columns, self.panel)
        self.positions = bits if self.format == "bitmap" else positions
        self.starts = starts
        self._transposed = self._where = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        self._transposed = self._where = None  # made again where the positions have gone
        return super()._apply(fn, recurse)

    # --- state dicts -----------------------------------------------------------------------------

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if _dense_keys.get():
            dense = self.to_dense()
            destination[_dense_key(prefix)] = dense if keep_vars else dense.detach()
            return
        destination[prefix + "values"] = self.values if keep_vars else self.values.detach()
        destination[prefix + "mask"] = self.packed_mask()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes `values` and `mask`; a mask of as many weights elsewhere moves the positions."""
        found = {key: state_dict.get(prefix + key) for key in ("values", "mask")}
        missing_keys += [prefix + key for key, value in found.items() if value is None]
        if strict:
            own = {prefix + key for key in found}
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in own]
        values, mask = found["values"], found["mask"]
        if values is None or mask is None:
            return
        if values.shape != self.values.shape:
            error_msgs.append(
                f"{prefix}values: {tuple(values.shape)} in the state dict, "
                f"{tuple(self.values.shape)} here; pack the weight with the mask it was saved with"
            )
            return
        try:
            self._place(mask.to(self.values.device))
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}mask: {error}")
            return
        with torch.no_grad():
            self.values.copy_(values)

    # --- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the entries `values` and `mask` (packed bits).

        Atomic: whoever reads `path` sees the old file or the whole new one.

        Raises:
            OSError: as the file system says; `path` is then as it was.
        """
        _weightfile.write(path, self.values.detach(), self.packed_mask(), tuple(self.shape))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        format: str = "auto",
        max_bytes: int = _weightfile.MAX_DATA_BYTES,
    ) -> PackedWeight:
        """Read what `save` wrote, on the CPU. Nothing is executed and every length is checked
        before memory is taken for it.

        Raises:
            MaskFormatError: whatever is wrong with the path or the file.
        """
        values, mask, shape = _weightfile.read(path, max_bytes)
        return cls(values, mask, shape, format=format)


def _dense_key(prefix: str) -> str:
    return prefix[:-1] if prefix else "weight"


def _bool_mask(weight: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.uint8:
        check_packed("PackedWeight.from_dense", mask, weight.numel())
        if mask.numel() != (weight.numel() + 7) // 8:
            raise ValueError(
                f"PackedWeight.from_dense: a packed mask for shape {tuple(weight.shape)} has "
                f"{(weight.numel() + 7) // 8} bytes, got {mask.numel()}"
            )
        return unpack_mask(mask, weight.shape)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"PackedWeight.from_dense: mask must be bool or packed bits (uint8), got {mask.dtype}"
        )
    if mask.shape != weight.shape:
        raise ValueError(
            f"PackedWeight.from_dense: mask must have the shape {tuple(weight.shape)} of the "
            f"weight, got {tuple(mask.shape)}"
        )
    return mask
