"""The last few weights of a PHEW mask, where no whole walk fits in what is missing."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from torch import Tensor

from paikern import ops
from paikern.pathgraph.walks import Walks


def fill_up(bits: Tensor, walks: Walks, drawn: Tensor, missing: int) -> tuple[int, int]:
    """Set up to `missing` more bits of the walks `drawn`.

    Returns how many, and how many of these may lie on no path.

    All bits set so far belong to whole walks. A weight of which the input unit is left and the
    output unit is reached by kept weights of the same layer then lies on a path as well: the first
    such weights in the order of the walks are set. Where they do not suffice, the first others
    follow: a walk that is cut.
    """
    if not bits.is_cpu:  # a bit at a time: on the host
        held = bits.cpu()
        counted = fill_up(held, walks, drawn.cpu(), missing)
        bits.copy_(held)
        return counted
    joints = _Joints(bits, walks)
    found: list[int] = []
    others: list[int] = []
    for bit in _new(bits, drawn):
        if len(found) == missing:
            break
        (found if joints.joins(bit) else others).append(bit)
    cut = others[: missing - len(found)]
    for bit in found + cut:
        bits[bit >> 3] |= 1 << (bit & 7)
    return len(found) + len(cut), len(cut)


def _new(bits: Tensor, drawn: Tensor) -> Iterator[int]:
    """Bits of the walks that are not set, in their order, each once."""
    for bit in dict.fromkeys(drawn.flatten().tolist()):
        if bit >= 0 and not int(bits[bit >> 3]) >> (bit & 7) & 1:
            yield bit


class _Joints:
    """The mask as it was, by weight step."""

    def __init__(self, bits: Tensor, walks: Walks) -> None:
        self.bits = bits.clone()
        rows = [row for row in walks.geometry.tolist() if row[5] >= 0]
        begins = [row[5] for row in rows]
        # What is used twice says nothing about the units of one use.
        self.steps = sorted(
            (row for row in rows if begins.count(row[5]) == 1), key=lambda row: row[5]
        )
        self.begins = [row[5] for row in self.steps]
        self.masks: dict[int, Tensor] = {}

    def joins(self, bit: int) -> bool:
        at = bisect.bisect_right(self.begins, bit) - 1
        if at < 0:
            return False
        rows, cols, taps, groups, _, begin = self.steps[at][:6]
        kernel = (bit - begin) // taps
        row, col = kernel // cols, kernel % cols
        if row >= rows:
            return False
        if at not in self.masks:
            self.masks[at] = self._mask(begin, rows, cols, taps)
        mask = self.masks[at]
        first = row // (rows // groups) * (rows // groups)
        return bool(mask[row].any()) and bool(mask[first : first + rows // groups, col].any())

    def _mask(self, begin: int, rows: int, cols: int, taps: int) -> Tensor:
        count = rows * cols * taps
        part = self.bits[begin // 8 : (begin + count + 7) // 8]
        skip = begin % 8
        flat = ops.unpack_mask(part, (skip + count,))[skip:]
        return flat.view(rows, cols, taps)
