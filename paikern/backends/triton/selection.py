"""topk_mask, topk_mask_factored, topk_mask_product, kth_largest: passes over a table of tensors.

The host lays out the table, launches the passes (selection_kernels.py) one after the other and
looks once, at the end, whether a score was NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from paikern.backends import reference
from paikern.backends.errors import refuse_nan
from paikern.backends.triton.config import blocks, config, launch
from paikern.backends.triton.selection_kernels import (
    DENSE,
    FACTORED,
    FIELDS,
    PRODUCT,
    emit_kernel,
    histogram_kernel,
    threshold_kernel,
)
from paikern.errors import BackendError

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BLOCK = 1024  # chunks whose ties are summed at a time
_NO_BITS: Sequence[int] = ()


class _Row(NamedTuple):
    """A tensor of the table; what it points at is kept alive by its lists."""

    numel: int
    data: int
    code: int
    candidates: int = 0
    other: int = 0
    other_code: int = 0
    right: int = 0
    columns: int = 0
    exponent: int = 0


class _Passes(NamedTuple):
    """Digits (shift, width) from the top, and the key of infinity where exponents differ."""

    digits: tuple[tuple[int, int], ...]
    infinity: int


def _digits(exponents: Sequence[int], halves: bool) -> _Passes:
    if not any(exponents):
        # The lower half of a 16-bit score's key says nothing that the sign does not.
        digits = ((21, 11), (10, 11)) if halves else ((21, 11), (10, 11), (0, 10))
        return _Passes(digits, 0)
    infinity = (max(exponents) + 23 + 256) << 23
    count = blocks((2 * infinity).bit_length(), 11)
    return _Passes(tuple((11 * i, 11) for i in reversed(range(count))), infinity)


class _Selection:
    """One call: the table on the device, the passes, the threshold."""

    def __init__(
        self,
        like: Tensor,
        rows: Sequence[_Row],
        k: Sequence[int],
        bits: Sequence[int],
        passes: _Passes,
        *,
        mode: int,
        power: int = 1,
        absolute: bool = False,
    ) -> None:
        self.like, self.passes = like, passes
        rows_a_tile, self.tiles, self.warps = config().select
        chunks = [blocks(row.numel, 8 * rows_a_tile * self.tiles) for row in rows]
        firsts = [0, *itertools.accumulate(chunks)]
        one = len(k) == 1
        self.layers, self.rankings, self.chunks = len(rows), len(k), firsts[-1]
        fields = [
            (
                row.data, row.other, row.right, row.candidates, bit, row.numel, row.columns,
                0 if one else index, row.code, row.other_code, row.exponent, first,
            )
            for index, (row, bit, first) in enumerate(
                zip(rows, bits or [0] * len(rows), firsts, strict=False)
            )
        ]  # fmt: skip
        bounds = [0, firsts[-1]] if one else firsts
        whole = [*itertools.chain(*fields), *bounds, *itertools.chain(*((0, n) for n in k))]
        device = like.device
        held = torch.tensor(whole, dtype=torch.int64, device=device)
        end = FIELDS.value * self.layers
        self.table = held[:end]
        self.bounds = held[end : end + len(bounds)]
        self.state = held[end + len(bounds) :]  # [rankings, 2]
        self.counts = torch.zeros(self.rankings * 2048, dtype=torch.int64, device=device)
        self.nan = torch.zeros(self.layers, dtype=torch.int32, device=device)
        self.constants = {
            "LAYERS": triton.next_power_of_2(self.layers),
            "MODE": mode,
            "POWER": power,
            "ABSOLUTE": absolute,
            "SCALED": passes.infinity > 0,
            "ROWS": rows_a_tile,
            "TILES": self.tiles,
        }

    def find(self, ties: bool) -> None:
        """The threshold of every ranking; with `ties` also where its equals lie."""
        digits, device = self.passes.digits, self.like.device
        parts = torch.empty(
            self.chunks << digits[-1][1] if ties else 0, dtype=torch.int32, device=device
        )
        self.ties = torch.empty(self.chunks if ties else 0, dtype=torch.int64, device=device)
        for index, (shift, width) in enumerate(digits):
            last = ties and index == len(digits) - 1
            launch(
                histogram_kernel, (self.chunks,), self.like, self.table, self.layers, self.state,
                self.counts, parts, self.nan, self.passes.infinity, SHIFT=shift, DIGIT=width,
                FIRST=index == 0, LAST=last, warps=self.warps, **self.constants,
            )  # fmt: skip
            launch(
                threshold_kernel, (self.rankings,), self.like, self.state, self.counts, parts,
                self.bounds, self.ties, DIGIT=width, LAST=last, BLOCK=_BLOCK, warps=self.warps,
            )  # fmt: skip

    def emit(self) -> None:
        launch(
            emit_kernel, (self.chunks,), self.like, self.table, self.layers, self.state, self.ties,
            self.passes.infinity, SHIFT=self.passes.digits[-1][0], warps=self.warps,
            **self.constants,
        )  # fmt: skip

    def refuse_nan(self, operation: str) -> None:
        """The one wait for the device."""
        found = self.nan.tolist()
        refuse_nan(operation, found.index(1) if 1 in found else -1)


def held(tensor: Tensor) -> Tensor:
    """A contiguous tensor at an address that 16-byte loads may use."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.new_empty((t.numel() + 7) // 8, dtype=torch.uint8) for t in tensors]


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    """0 for an empty tensor, which may have any address."""
    return [t.data_ptr() if t.numel() else 0 for t in tensors]


def _halves(tensors: Sequence[Tensor]) -> bool:
    return all(t.dtype in (torch.float16, torch.bfloat16) for t in tensors)


def _float64(tensors: Sequence[Tensor]) -> bool:
    return any(t.dtype == torch.float64 for t in tensors)


def _masks(masks: Sequence[Tensor], count: int) -> tuple[list[Tensor], list[int]]:
    kept = [m.contiguous() for m in masks]
    return kept, _addresses(kept) or [0] * count


def topk_mask(
    scores: Sequence[Tensor],
    k: Sequence[int],
    exponents: Sequence[int],
    absolute: bool,
    masks: Sequence[Tensor],
    memory: Tensor | None,
) -> list[Tensor]:
    # `memory` alone is float64 in every call that has it, so that `takes` leaves scores to here.
    if _float64(scores):
        return reference.topk_mask(scores, k, exponents, absolute, masks, memory)
    values, bits = [held(s) for s in scores], _bits(scores)
    _kept, candidates = _masks(masks, len(scores))
    shifts = list(exponents) or [0] * len(scores)
    rows = [
        _Row(v.numel(), v.data_ptr(), _CODES[v.dtype], c, exponent=e)
        for v, c, e in zip(values, candidates, shifts, strict=True)
    ]
    selection = _Selection(
        scores[0], rows, k, _addresses(bits), _digits(shifts, _halves(values)),
        mode=DENSE.value, absolute=absolute,
    )  # fmt: skip
    selection.find(ties=True)
    selection.emit()
    selection.refuse_nan("topk_mask")
    return bits if memory is None else [*bits, memory.clone()]


def topk_mask_product(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    masks: Sequence[Tensor],
    k: Sequence[int],
) -> list[Tensor]:
    left, right = [held(w) for w in weights], [held(g) for g in gradients]
    bits = _bits(weights)
    _kept, candidates = _masks(masks, len(weights))
    rows = [
        _Row(w.numel(), w.data_ptr(), _CODES[w.dtype], c, g.data_ptr(), _CODES[g.dtype])
        for w, g, c in zip(left, right, candidates, strict=True)
    ]
    selection = _Selection(
        weights[0], rows, k, _addresses(bits), _digits((), False), mode=PRODUCT.value
    )
    selection.find(ties=True)
    selection.emit()
    selection.refuse_nan("topk_mask_product")
    return bits


def topk_mask_factored(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    masks: Sequence[Tensor],
    exponents: Sequence[int],
    k: Sequence[int],
    power: int,
    convs: Sequence[int],
) -> list[Tensor]:
    """Vectors are multiplied in every pass; scores of maps are made once, one float32 a weight."""
    bits, shapes = _bits(weights), iter(convs)
    _kept, candidates = _masks(masks, len(weights))
    rows: list[_Row] = []
    alive: list[Tensor] = []
    for w, x, y, c, e in zip(weights, a, g, candidates, exponents, strict=True):
        if x.dim() == 1:
            _check_width(w)
            values, left, right = held(w), held(x.float()), held(y.float())
            rows.append(
                _Row(
                    w.numel(), values.data_ptr(), _CODES[w.dtype], c, left.data_ptr(),
                    right=right.data_ptr(), columns=w.shape[1], exponent=e,
                )
            )  # fmt: skip
            alive += [values, left, right]
        else:
            scores = held(_map_score(w, x, y, power, shapes))
            rows.append(_Row(w.numel(), scores.data_ptr(), 0, c, exponent=e))
            alive.append(scores)
    selection = _Selection(
        weights[0], rows, k, _addresses(bits), _digits(exponents, False), mode=FACTORED.value,
        power=power,
    )  # fmt: skip
    selection.find(ties=True)
    selection.emit()
    selection.refuse_nan("topk_mask_factored")
    return bits


def _check_width(weight: Tensor) -> None:
    if weight.shape[1] >= 2**30:
        raise BackendError(
            f"the triton backend ranks rows of fewer than 2**30 weights, got {weight.shape[1]}; "
            "use backend='reference'"
        )


def _map_score(weight: Tensor, x: Tensor, g: Tensor, power: int, shapes: object) -> Tensor:
    from paikern.backends.triton.products import path_conv_score, path_score

    if weight.dim() == 2:
        return path_score(weight, x, g, power, None, 0.0)
    axes, left = weight.dim() - 2, iter(shapes)  # type: ignore[call-overload]
    stride, padding, dilation = (list(itertools.islice(left, axes)) for _ in range(3))
    return path_conv_score(weight, x, g, stride, padding, dilation, next(left), power, None, 0.0)


def kth_largest(scores: Sequence[Tensor], k: int) -> Tensor:
    values = [held(s) for s in scores]
    rows = [_Row(v.numel(), v.data_ptr(), _CODES[v.dtype]) for v in values]
    selection = _Selection(scores[0], rows, [k], _NO_BITS, _digits((), False), mode=DENSE.value)
    selection.find(ties=False)
    selection.refuse_nan("kth_largest")
    key = selection.state[0]
    word = torch.where(key >= 2**31, key - 2**31, -1 - key)  # the bits of the float, signed
    return word.to(torch.int32).view(torch.float32).double()
