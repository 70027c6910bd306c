"""scope="row": every output keeps the same number of its inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paikern import ops
from paikern.pattern import Layout
from paikern.scores import Dense, Factored, Scores

Shape = tuple[int, ...]


def check_rows(scope: str, rule: str, shapes: Mapping[str, Shape]) -> None:
    """Refuse what rows have no meaning for."""
    if scope != "row":
        return
    if rule != "exact":
        raise ValueError(
            f"selection='{rule}' has no meaning with scope='row'; use selection='exact'"
        )
    for name, shape in shapes.items():
        if len(shape) < 2:
            raise ValueError(
                f"scope='row' needs weights [out, in, ...], but '{name}' has the shape {shape}"
            )


def select_rows(scores: Scores, counts: Sequence[int]) -> dict[str, Tensor]:
    """The packed masks that keep `counts[l] / outputs` of the inputs of every output of layer l.

    A row is everything that one output is computed from: the inputs of its group, at all kernel
    positions. Ties go to the lower index. No score is compared with one of another row.

    Args:
        scores: of all layers.
        counts: weights kept in each layer, a multiple of its number of outputs.

    Raises:
        NonFiniteScoreError: NaN scores, named by parameter.

    Example:
        >>> import torch
        >>> scores = Scores({"w": Dense(torch.tensor([[1.0, 2.0], [9.0, 8.0]]))}, {"w": (2, 2)})
        >>> ops.unpack_mask(select_rows(scores, [2])["w"], (2, 2))
        tensor([[False,  True],
                [ True, False]])
    """
    return {name: _rows(scores, name, count) for name, count in zip(scores, counts, strict=True)}


def _rows(scores: Scores, name: str, count: int) -> Tensor:
    entry, shape, layout = scores[name], scores.shapes[name], scores.layouts[name]
    if count == 0:
        return ops.pack_mask(torch.zeros(shape, dtype=torch.bool))
    rows = layout.outputs(shape)
    kept, length = count // rows, math.prod(shape) // rows
    along = 0 if layout.transposed else 1
    plain = not layout.transposed or (len(shape) == 2 and layout.groups == 1)
    if plain and isinstance(entry, Factored) and entry.conv is None and entry.a.dim() == 1:
        (packed,) = ops.nm_mask_factored(
            [entry.weight],
            [entry.a],
            [entry.g],
            kept,
            length,
            power=entry.power,
            dims=along,
            masks=[entry.mask],
            names=[name],
        )
        return packed
    dense = entry if isinstance(entry, Dense) else entry.dense(-1.0)
    values = dense.values.reshape(shape)
    if plain:
        matrix = values.flatten(1)
        (packed,) = ops.nm_mask(
            [matrix], kept, length, dims=along, absolute=dense.absolute, names=[name]
        )
        return packed
    turned = _outputs_first(values, layout)
    (packed,) = ops.nm_mask(
        [turned.reshape(rows, length)], kept, length, absolute=dense.absolute, names=[name]
    )
    bits = ops.unpack_mask(packed, tuple(turned.shape))
    return ops.pack_mask(bits.transpose(1, 2).reshape(shape))


def _outputs_first(values: Tensor, layout: Layout) -> Tensor:
    """`[in, out / groups, *kernel]` -> `[groups, out / groups, in / groups, *kernel]`."""
    groups = layout.groups
    return values.unflatten(0, (groups, values.shape[0] // groups)).transpose(1, 2)
