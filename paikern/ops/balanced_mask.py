"""balanced_mask: how many weights each input keeps -> a random mask with even outputs, as bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paikern.ops._library import define, fake, run
from paikern.ops.topk_mask import check_names, check_scores, named_nan

define(
    "balanced_mask(Tensor rows, Tensor scores, int[] grid, bool transposed, int cover, int seed, "
    "int stream) -> Tensor"
)


@fake("balanced_mask")
def _shape(
    rows: Tensor,
    scores: Tensor,
    grid: Sequence[int],
    transposed: bool,
    cover: int,
    seed: int,
    stream: int,
) -> Tensor:
    return rows.new_empty((math.prod(grid) + 7) // 8, dtype=torch.uint8)


class KernelGrid(NamedTuple):
    """A weight as matrices of kernels: `groups` of them, each `inputs` x `outputs`.

    Example:
        >>> KernelGrid.of((8, 3, 5, 5), groups=2)
        KernelGrid(groups=2, inputs=3, outputs=4, positions=25)
    """

    groups: int
    inputs: int
    outputs: int
    positions: int

    @classmethod
    def of(cls, shape: Sequence[int], *, groups: int = 1, transposed: bool = False) -> KernelGrid:
        """The grid of a stored weight, `[out, in / groups, *kernel]`.

        A `transposed` one is stored `[in, out / groups, *kernel]`.
        """
        if len(shape) < 2 or groups < 1 or shape[0] % groups:
            raise ValueError(
                f"shape {tuple(shape)} is no weight [rows, columns, *kernel] in {groups} groups"
            )
        first, second = shape[0] // groups, shape[1]
        inputs, outputs = (first, second) if transposed else (second, first)
        return cls(groups, inputs, outputs, math.prod(shape[2:]))


def balanced_mask(
    rows: Tensor,
    shape: Sequence[int],
    *,
    groups: int = 1,
    transposed: bool = False,
    cover: int | None = None,
    seed: int = 0,
    stream: int = 0,
    scores: Tensor | None = None,
    name: str | None = None,
) -> Tensor:
    """A packed mask that keeps `rows[i]` of the weights of input i, spread as evenly as can be.

    Of the kernels of input i, one an output, each keeps `rows[i] // outputs` weights and
    `rows[i] % outputs` of them keep one more. Which ones is random, but the weights of an output,
    counted over all inputs of its group, differ by at most one between outputs.

    Args:
        rows: int64 `[inputs]`, or `[groups * inputs per group]`, each at most the number of weights
            of one input.
        shape: of the weight, `[out, in / groups, *kernel]`.
        groups: of a grouped convolution.
        transposed: the weight is stored `[in, out / groups, *kernel]`.
        cover: outputs are even up to so many weights only; what goes beyond is given to the same
            few of them.
        seed, stream: what is drawn depends on these two alone: 64 and 31 bits.
        scores: positions in a kernel go to the largest magnitudes, the lower index on ties;
            random without. Float, of the weight's shape. Infinities rank by value.
        name: of the weight, for errors.

    Returns:
        uint8 `[ceil(numel / 8)]`, on the device of `rows`; the same bits on every backend and for
        any number of threads.

    Raises:
        ValueError: row sums of another number or out of range, scores of another shape.
        NonFiniteScoreError: NaN scores.

    Source: the columns are dealt from random permutations (`docs/npb.md`); Philox4x32-10, Salmon et
    al., SC 2011.

    Example:
        >>> import torch
        >>> bits = balanced_mask(torch.tensor([2, 1, 1]), (4, 3))
        >>> mask = torch.ops.paikern.unpack_mask(bits, (4, 3))
        >>> mask.sum(0).tolist(), mask.sum(1).tolist()
        ([2, 1, 1], [1, 1, 1, 1])
    """
    grid = KernelGrid.of(shape, groups=groups, transposed=transposed)
    if rows.dtype != torch.int64 or tuple(rows.shape) != (grid.groups * grid.inputs,):
        raise ValueError(
            f"balanced_mask: rows must be int64 [{grid.groups * grid.inputs}] for the shape "
            f"{tuple(shape)} in {groups} groups, got {rows.dtype} {list(rows.shape)}"
        )
    most = grid.outputs * grid.positions
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) <= most:
        raise ValueError(
            f"balanced_mask: rows must be in [0, {most}], the weights of one input; "
            f"got {int(rows.min())} to {int(rows.max())}"
        )
    if cover is not None and cover < 0:
        raise ValueError(f"balanced_mask: cover must be >= 0, got {cover}")
    if not 0 <= stream < 2**31 or not -(2**63) <= seed < 2**64:
        raise ValueError(f"balanced_mask: seed {seed} or stream {stream} is out of range")
    if scores is None:
        values = torch.empty(0, device=rows.device)
    else:
        (values,) = check_scores("balanced_mask", scores)
        if tuple(values.shape) != tuple(shape):
            raise ValueError(
                f"balanced_mask: scores must have the shape {tuple(shape)}, "
                f"got {tuple(values.shape)}"
            )
    most_even = -1 if cover is None else cover
    names = None if name is None else [name]
    check_names("balanced_mask", names, 1)
    signed = seed - 2**64 if seed >= 2**63 else seed  # the schema knows signed integers only
    with named_nan(names):
        bits: Tensor = run(
            "balanced_mask",
            [rows, values],
            rows,
            values,
            list(grid),
            transposed,
            most_even,
            signed,
            stream,
        )
        return bits
