"""The native f and g of PX: a program of integers, tensors -> addresses (csrc/cpu/gated.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern import _C

Map = tuple[int, int, int]
Step = tuple[int, ...]
#: step, theta, packed mask or None, and scale and shift `[rows]` of f
Weight = tuple[int, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class GatedProgram:
    """Maps (channels, h, w), steps of 15 integers and the map that is the output.

    A step is (kind, in, out, add or -1, gate, pool_gate, groups, kernel * 2, stride * 2,
    padding * 2, dilation * 2), kind 0 weight, 1 elementwise, 2 mean, 3 max pool, 4 reshape.
    """

    def __init__(self, maps: Sequence[Map], steps: Sequence[Step], output: int) -> None:
        self._program = _C.GatedProgram(maps, steps, output)
        channels, h, w = maps[output]
        self._outputs = channels * h * w

    def load(self, weights: Sequence[Weight]) -> None:
        """The weights of some steps under their packed masks, with the scale and shift of f."""
        held: list[Tensor] = []  # until all are read

        def address(tensor: Tensor | None) -> int:
            if tensor is None:
                return 0
            held.append(tensor.contiguous())
            return held[-1].data_ptr()

        rows = []
        for step, theta, mask, scale, shift in weights:
            w, s, t = (None if x is None else x.float() for x in (theta, scale, shift))
            rows.append((step, address(w), address(mask), address(s), address(t)))
        self._program.load(rows)

    def run(self, x: Tensor) -> tuple[Tensor, int, Tensor]:
        """`sum_n g(x_n**2)` in float64 and its exponent, and f `[n, outputs]`."""
        held = x.float().contiguous()
        total = torch.empty(self._outputs, dtype=torch.float64)
        f = torch.empty(len(x), self._outputs)
        exponent = self._program.run(held.data_ptr(), len(x), total.data_ptr(), f.data_ptr())
        return total, exponent, f


def gated_program(maps: Sequence[Map], steps: Sequence[Step], output: int) -> GatedProgram:
    return GatedProgram(maps, steps, output)
