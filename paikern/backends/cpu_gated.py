"""The native f and g of PX: a program of integers, tensors -> addresses (csrc/cpu/gated.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern import _C

Map = tuple[int, int, int]
Step = tuple[int, ...]


class GatedProgram:
    """Maps (channels, h, w), steps of 15 integers and the map that is the output.

    A step is (kind, in, out, add or -1, gate, pool_gate, groups, kernel * 2, stride * 2,
    padding * 2, dilation * 2), kind 0 weight, 1 elementwise, 2 mean, 3 max pool, 4 reshape.
    """

    def __init__(self, maps: Sequence[Map], steps: Sequence[Step], output: int) -> None:
        self._program = _C.GatedProgram(maps, steps, output)
        channels, h, w = maps[output]
        self._outputs = channels * h * w

    def load(
        self, step: int, theta: Tensor | None, mask: Tensor | None,
        scale: Tensor | None, shift: Tensor | None,
    ) -> None:  # fmt: skip
        """The weight of a step under its packed mask, and the scale and shift of f `[rows]`."""
        held = [None if t is None else t.float().contiguous() for t in (theta, scale, shift)]
        bits = None if mask is None else mask.contiguous()
        w, s, t = (0 if x is None else x.data_ptr() for x in held)
        self._program.load(step, w, 0 if bits is None else bits.data_ptr(), s, t)

    def run(self, x: Tensor) -> tuple[Tensor, int, Tensor]:
        """`sum_n g(x_n**2)` in float64 and its exponent, and f `[n, outputs]`."""
        held = x.float().contiguous()
        total = torch.empty(self._outputs, dtype=torch.float64)
        f = torch.empty(len(x), self._outputs)
        exponent = self._program.run(held.data_ptr(), len(x), total.data_ptr(), f.data_ptr())
        return total, exponent, f


def gated_program(maps: Sequence[Map], steps: Sequence[Step], output: int) -> GatedProgram:
    return GatedProgram(maps, steps, output)
