"""PackedWeight: the kept values of a weight and where they belong."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paikern.ops.pack_mask import pack_mask
from paikern.ops.positions import MOST_KEPT, _check_panel, list_positions, transpose_positions
from paikern.ops.scatter_kept import gather_kept, scatter_kept
from paikern.ops.unpack_mask import check_packed, count_kept, unpack_mask
from paikern.sparse import _weightfile
from paikern.sparse._keys import dense_key, writes_dense_keys

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = ("auto", "index", "bitmap")
# Panels of 4096 columns for 64 rows of x are 1 MB: half of the L2 that newer server cores have.
# Narrower ones lose more than they gain: at 4096 x 4096 and batch 256, panels of 1024 took 5 % less
# time at density 0.1 and 12 % more at 0.01, panels of 256 1 % less and 2.1 times as long.
PANEL = 4096
# Above half kept, bits: 16 bits a kept weight would outgrow a dense weight of halves.
INDEX_DENSITY = 0.5


class PackedWeight(nn.Module):
    """A weight of which only the kept values are stored.

    Attributes:
        values: Parameter `[nnz]`, the kept values in row-major order, that of the bits of the mask.
        shape: that of the dense weight, `[out, in]` or `[out, in / groups, *kernel]`.
        rows, columns: of the matrix that the operations see, `[out, in]` or
            `[out, in / groups * kernel]`.

    Positions are 16-bit columns (`format="index"`, 2 bytes a kept weight) or packed bits
    (`"bitmap"`, 1/8 byte a weight); "auto" takes columns up to density 0.5. Columns serve the
    kernels as they are; bits are turned into columns for the length of each call, which is for
    memory and not for speed. The positions of the transposed weight, which the gradient for x
    needs, are made when first used and kept: 6 bytes a kept weight. Positions are no buffers: they
    are the same on every rank, so that nothing is broadcast, and a state dict holds the mask.

    The mask never changes, so pruned weights stay zero however the values are trained; only
    `load_state_dict` moves it. The values are read when they are used: change them in place, or
    through an optimizer.

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
        shape: Sequence[int],
        *,
        format: str = "auto",
        panel: int = PANEL,
    ) -> None:
        """`from_dense` is the usual way; this one takes what a file or another packed weight has.

        Args:
            values: `[nnz]`, float32, bfloat16, float16 or float64; a Parameter is taken as it is.
            mask: packed bits of `shape` with `nnz` of them set, row-major, see `pack_mask`.
            shape: `(out, in)` or `(out, in / groups, *kernel)`.
            format: "auto", "index" or "bitmap".
            panel: columns that the kernels go through at a time, a power of two up to 65,536.

        Raises:
            ValueError, TypeError: values and mask that do not fit, NaN in the values, another
            format, panel or dtype.
        """
        super().__init__()
        _check_panel("PackedWeight", panel)
        if format not in FORMATS:
            raise ValueError(f"PackedWeight: format must be one of {FORMATS}, got {format!r}")
        whole = isinstance(shape, Sequence) and all(isinstance(n, int) for n in shape)
        if not whole or len(shape) < 2 or min(shape) < 0:
            raise ValueError(f"PackedWeight: shape must be (out, in, *kernel), got {shape!r}")
        _check_tensors("PackedWeight", values=values, mask=mask)
        if values.dtype not in DTYPES or values.dim() != 1:
            raise TypeError(
                f"PackedWeight: values must be a 1-D tensor of float32, bfloat16, float16 or "
                f"float64, got {values.dtype} with shape {tuple(values.shape)}"
            )
        if bool(torch.isnan(values.detach()).any()):
            raise ValueError("PackedWeight: values hold NaN; replace it before packing")
        self.shape = torch.Size(shape)
        self.rows, self.columns = self.shape[0], self.shape[1:].numel()
        self.panel = panel
        dense = format == "auto" and values.numel() > INDEX_DENSITY * self.shape.numel()
        self.format = "bitmap" if dense else ("index" if format == "auto" else format)
        self.values = values if isinstance(values, nn.Parameter) else nn.Parameter(values)
        self._transposed: tuple[Tensor, Tensor, Tensor] | None = None
        self._where: tuple[Any, ...] | None = None
        self._place(mask.to(values.device))

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor, *, format: str = "auto", panel: int = PANEL
    ) -> PackedWeight:
        """Pack the values of `weight` where `mask` is set.

        Args:
            weight: `[out, in]` or `[out, in / groups, *kernel]`, float32, bfloat16, float16 or
                float64, any strides; left as it is.
            mask: bool of the same shape, or its packed bits (uint8). What lies under a 0 is never
                looked at.
            format, panel: see the class.

        Returns:
            A packed weight on the device of `weight`. Its values require a gradient unless `weight`
            is a Parameter that does not.

        Raises:
            ValueError: a mask of another shape or device, NaN in a kept value (infinity passes),
            2**31 kept weights or more. TypeError: another dtype, a sparse tensor or none at all.
        """
        _check_tensors("PackedWeight.from_dense", weight=weight, mask=mask)
        _check_panel("PackedWeight.from_dense", panel)
        if weight.dim() < 2:
            raise ValueError(
                "PackedWeight.from_dense: weight must be [out, in] or [out, in, *kernel], got "
                f"{tuple(weight.shape)}"
            )
        if weight.is_meta:
            raise ValueError(
                "PackedWeight.from_dense: weight is on the meta device; load its values first"
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
        bits = _bits(weight, mask)
        kept = count_kept(bits)
        if kept > MOST_KEPT:
            raise ValueError(
                f"PackedWeight.from_dense: {kept} weights are kept, at most {MOST_KEPT} "
                "can be; split the weight by rows"
            )
        matrix = weight.detach().reshape(weight.shape[0], weight.shape[1:].numel())
        rows, columns = matrix.shape
        places = list_positions(bits, kept, rows, columns, panel)
        values = gather_kept(matrix, *places, rows, columns, panel, kept)
        if bool(torch.isnan(values).any()):
            found = torch.isnan(weight.detach()) & unpack_mask(bits, weight.shape)
            at = found.nonzero()[0].tolist()
            raise ValueError(
                f"PackedWeight.from_dense: weight holds NaN at {at}, which the mask keeps"
            )
        trained = weight.requires_grad or not isinstance(weight, nn.Parameter)
        parameter = nn.Parameter(values, requires_grad=trained)
        return cls(parameter, bits, weight.shape, format=format, panel=panel)

    # --- what it is ------------------------------------------------------------------------------

    @property
    def nnz(self) -> int:
        """How many weights are kept: what the positions say, whatever stands in `values`."""
        return self._nnz

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

    def size(self) -> torch.Size:
        return self.shape

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        """Of the dense weight; `nnz` are kept."""
        return self.shape.numel()

    def extra_repr(self) -> str:
        return (
            f"{list(self.shape)}, nnz={self.nnz} ({self.density:.1%}), {self.format}, {self.dtype}"
        )

    def to_dense(self) -> Tensor:
        """The dense weight, zeros where nothing is kept; differentiable in the values.

        Example:
            >>> kept = torch.tensor([[True, False, True]])
            >>> packed = PackedWeight.from_dense(torch.ones(1, 3), kept)
            >>> packed.to_dense().tolist()
            [[1.0, 0.0, 1.0]]
        """
        return self.scatter(self.values)

    def scatter(self, values: Tensor) -> Tensor:
        """A dense tensor of `shape` that holds `values` `[nnz]` where this weight is kept."""
        return scatter_kept(values, *self._places()).view(self.shape)

    def gather(self, dense: Tensor) -> Tensor:
        """The values that a dense tensor of the same shape has where this weight is kept.

        Args:
            dense: of `shape`, any dtype and strides.

        Returns:
            `[nnz]`, the dtype of `dense`; differentiable.

        Raises:
            ValueError: a tensor of another shape.
        """
        _check_tensors("PackedWeight.gather", dense=dense)
        if dense.shape != self.shape:
            raise ValueError(
                f"PackedWeight.gather: dense must have the shape {tuple(self.shape)}, got "
                f"{tuple(dense.shape)}"
            )
        return gather_kept(dense.reshape(self.rows, self.columns), *self._places())

    def packed_mask(self) -> Tensor:
        """The mask as packed bits, `[ceil(numel / 8)]`, uint8; a copy, also in a state dict."""
        if self.format == "bitmap":
            # Who averages a state dict in place would move the bits, and the starts would not fit.
            return self.positions.clone()
        if self.positions.is_meta:
            return self.positions.new_empty((self.shape.numel() + 7) // 8, dtype=torch.uint8)
        kept = torch.ones(self.nnz, dtype=torch.bool, device=self.positions.device)
        return pack_mask(scatter_kept(kept, *self._places()))

    def _places(self) -> tuple[Tensor, Tensor, int, int, int, int]:
        """The positions as `scatter_kept` takes them."""
        if self.positions.is_meta and not self.values.is_meta:
            raise _without_content(self.device)
        return self.positions, self.starts, self.rows, self.columns, self.panel, self.nnz

    # --- for the operations ----------------------------------------------------------------------

    def where(self, *, transposed: bool) -> tuple[Any, ...]:
        """The positions as `torch.ops.paikern.masked_linear` takes them."""
        if transposed and self._transposed is None and self.format == "index":
            self._transpose()
        # A module looks up its tensors slowly: 2.4 us less a call. A compiler has them anyway, and
        # would compile again for an attribute that changed.
        known = None if torch.compiler.is_compiling() else self._where
        if known is not None and (known[2] is None) == (self._transposed is None):
            return known
        if self.positions.device != self.values.device:
            raise _without_content(self.device)
        back = self._transposed or (None, None, None)
        sizes = (self.rows, self.columns, self.panel, self.nnz)
        found = (self.positions, self.starts, *back, *sizes)
        if not torch.compiler.is_compiling():
            self._where = found
        return found

    def _place(self, mask: Tensor) -> None:
        """Sets the positions from packed bits, of which as many as there are values are set."""
        rows, columns = self.rows, self.columns
        check_packed("PackedWeight", mask, rows * columns)
        bits = _clean(mask, rows * columns)
        kept = count_kept(bits)
        if kept != self.values.numel():
            raise ValueError(
                f"PackedWeight: the mask keeps {kept} weights, {self.values.numel()} values given"
            )
        positions, starts = list_positions(bits, kept, rows, columns, self.panel)
        self.positions = bits if self.format == "bitmap" else positions
        self.starts = starts
        self._nnz = kept
        self._where = None
        if self._transposed is not None:
            self._transpose()

    def _transpose(self) -> None:
        # Kept for later calls: what inference mode makes, no training may use.
        with torch.inference_mode(False):
            self._transposed = transpose_positions(
                self.positions, self.starts, self.rows, self.columns, self.panel
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Positions follow the values to another device; nothing else may happen to them."""
        super()._apply(fn, recurse)
        device = self.values.device
        if device != self.positions.device and not self.positions.is_meta:
            self.positions, self.starts = self.positions.to(device), self.starts.to(device)
            if self._transposed is not None:
                t_positions, t_starts, t_source = self._transposed
                self._transposed = t_positions.to(device), t_starts.to(device), t_source.to(device)
        self._where = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickles do without what can be made again."""
        had = self._transposed is not None
        return {**self.__dict__, "_transposed": None, "_where": None, "_had": had}

    def __setstate__(self, state: dict[str, Any]) -> None:
        had = state.pop("_had")
        super().__setstate__(state)
        if had:  # again, and now: a graph compiled of a copy should not see it appear
            self._transpose()

    # --- state dicts -----------------------------------------------------------------------------

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if writes_dense_keys():
            dense = self.to_dense()
            destination[dense_key(prefix)] = dense if keep_vars else dense.detach()
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
        """Takes `values` and `mask`; a mask of as many weights elsewhere moves the positions.

        Without a mask, which is then missing, the values are taken to be those kept here.

        A dense weight is for the module around it to pack: its key does not begin with `prefix`.
        """
        found = {key: state_dict.get(prefix + key) for key in ("values", "mask")}
        missing_keys += [prefix + key for key, value in found.items() if value is None]
        if strict:
            own = {prefix + key for key in found}
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in own]
        values, mask = found["values"], found["mask"]
        if values is None:
            return
        if not isinstance(values, Tensor) or not isinstance(mask, (Tensor, type(None))):
            kinds = f"{type(values).__name__} and {type(mask).__name__}"
            error_msgs.append(f"{prefix}values and mask must be tensors, got {kinds}")
            return
        if values.shape != self.values.shape:
            error_msgs.append(
                f"{prefix}values: {tuple(values.shape)} in the state dict, "
                f"{tuple(self.values.shape)} here; pack the weight with the mask it was saved with"
            )
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        device = values.device if assign else self.values.device
        try:
            # A model that resumes has these positions already, and those transposed.
            known = self.positions.device == device and not self.positions.is_meta
            # Values alone, of a checkpoint of parameters, are those of the positions that are here.
            if mask is None and not known:
                raise _without_content(device)
            if mask is not None and not (
                known and torch.equal(mask.to(device), self.packed_mask())
            ):
                self._place(mask.to(device))
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}mask: {error}")
            return
        if assign:
            trained = self.values.requires_grad
            self.values = nn.Parameter(values.detach(), requires_grad=trained)
        else:
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
        packed = cls(torch.zeros_like(values), mask, shape, format=format)
        packed.values.data = values  # as they were saved, NaN included
        return packed


def _without_content(device: torch.device) -> ValueError:
    return ValueError(
        f"PackedWeight: the values are on {device} and the positions, without content, on the meta "
        "device; load a state dict with values and mask"
    )


def _check_tensors(name: str, **given: Any) -> None:
    for argument, tensor in given.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            layout = getattr(tensor, "layout", None)
            found = type(tensor).__name__ if layout is None else f"one of {layout}"
            raise TypeError(f"{name}: {argument} must be a dense torch.Tensor, got {found}")


def _clean(mask: Tensor, numel: int) -> Tensor:
    """A copy of packed bits for `numel` weights, what is spare zero."""
    bits = mask[: (numel + 7) // 8].clone()
    if numel % 8:
        bits[-1] &= (1 << numel % 8) - 1
    return bits


def _bits(weight: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.uint8:
        check_packed("PackedWeight.from_dense", mask, weight.numel())
        if mask.numel() != (weight.numel() + 7) // 8:
            raise ValueError(
                f"PackedWeight.from_dense: a packed mask for shape {tuple(weight.shape)} has "
                f"{(weight.numel() + 7) // 8} bytes, got {mask.numel()}"
            )
        return _clean(mask, weight.numel())
    if mask.dtype != torch.bool:
        raise TypeError(
            f"PackedWeight.from_dense: mask must be bool or packed bits (uint8), got {mask.dtype}"
        )
    if mask.shape != weight.shape:
        raise ValueError(
            f"PackedWeight.from_dense: mask must have the shape {tuple(weight.shape)} of the "
            f"weight, got {tuple(mask.shape)}"
        )
    return pack_mask(mask)
