"""The reference backend of balanced_mask: laps dealt one after the other, Philox in int64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.backends.errors import refuse_nan

_WORD = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Philox4x32-10 of four broadcast int64 tensors of 32-bit words.

    A product that overflows int64 has the bits of the unsigned one.
    """
    a, b, c, d = torch.broadcast_tensors(*counter)
    low, high = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (
            ((y >> 32) & _WORD) ^ b ^ low,
            y & _WORD,
            ((x >> 32) & _WORD) ^ d ^ high,
            x & _WORD,
        )
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return [a, b, c, d]


def _draw(number: int, first: Tensor, second: Tensor, tag: int, seed: int) -> Tensor:
    """The `number`-th word of a stream that counts in the third word."""
    block, last = torch.tensor(number // 4), torch.tensor(tag)
    return philox((first, second, block, last), seed)[number % 4]


def balanced_mask(
    rows: Tensor,
    scores: Tensor,
    grid: Sequence[int],
    transposed: bool,
    cover: int,
    seed: int,
    stream: int,
) -> Tensor:
    from paikern.backends import reference

    groups, inputs, outputs, positions = grid
    given = rows.cpu().reshape(groups, inputs)
    counts = torch.zeros(groups, inputs, outputs, dtype=torch.int64)
    if outputs:
        counts += (given // outputs)[:, :, None]
        for group in range(groups):
            covered = int((given[group] // outputs).sum())
            laps = None if cover < 0 else max(cover - covered, 0)
            rest = given[group] % outputs
            for i, columns in enumerate(_deal(rest, outputs, laps, group, seed, stream)):
                counts[group, i, columns] += 1
    stored = counts if transposed else counts.transpose(1, 2)
    per_kernel = stored.flatten()
    if scores.numel():
        mask = _best(scores.detach().cpu().double().reshape(-1, positions).abs(), per_kernel)
    else:
        mask = _random(per_kernel, positions, seed, stream)
    return reference.pack_mask(mask).to(rows.device)


def _deal(
    rest: Tensor, outputs: int, most: int | None, group: int, seed: int, stream: int
) -> list[Tensor]:
    """The columns of each row, from laps of all columns, none twice in a row.

    After `most` laps rows take the columns that come first in one last permutation.
    """
    total = int(rest.sum())
    laps = (total + outputs - 1) // outputs
    laps = laps if most is None else min(laps, most)
    last = torch.tensor([*range(laps), _WORD])
    order = _permutations(last, outputs, group, seed, stream).tolist()
    flat, favourites = [column for lap in order[:-1] for column in lap], order[-1]
    found, begin = [], 0
    for count in rest.tolist():
        end, border = begin + count, (begin // outputs + 1) * outputs
        row = flat[begin:end]
        if end > len(flat):
            row += [column for column in favourites if column not in row][: count - len(row)]
        elif end > border:
            held, later = set(flat[begin:border]), end
            for k in range(border, end):
                if flat[k] in held:
                    while flat[later] in held:
                        later += 1
                    flat[k], flat[later] = flat[later], flat[k]
            row = flat[begin:end]
        found.append(torch.tensor(row, dtype=torch.int64))
        begin = end
    return found


def _permutations(laps: Tensor, outputs: int, group: int, seed: int, stream: int) -> Tensor:
    order = torch.arange(outputs).repeat(len(laps), 1)  # [laps, outputs]
    every = torch.arange(len(laps))
    for number, last in enumerate(range(outputs - 1, 0, -1)):
        word = _draw(number, laps, torch.tensor(group), 2 * stream, seed)
        other = (word * (last + 1)) >> 32
        held = order[every, other]
        order[every, other] = order[:, last].clone()
        order[:, last] = held
    return order


def _random(counts: Tensor, positions: int, seed: int, stream: int) -> Tensor:
    """Bool `[kernels, positions]`: Floyd's subsets, the j-th draw below j + 1, or j if taken."""
    mask = (counts == positions)[:, None].repeat(1, positions)
    some = torch.nonzero((counts > 0) & (counts < positions)).flatten()
    for number in range(int(counts[some].max()) if some.numel() else 0):
        some = some[counts[some] > number]
        word = _draw(number, some & _WORD, some >> 32, 2 * stream + 1, seed)
        j = positions - counts[some] + number
        drawn = (word * (j + 1)) >> 32
        mask[some, torch.where(mask[some, drawn], j, drawn)] = True
    return mask


def _best(magnitudes: Tensor, counts: Tensor) -> Tensor:
    refuse_nan("balanced_mask", 0 if bool(torch.isnan(magnitudes).any()) else -1)
    order = torch.sort(magnitudes, dim=1, descending=True, stable=True).indices
    kept = torch.arange(magnitudes.shape[1]) < counts[:, None]
    return torch.zeros_like(kept).scatter_(1, order, kept)
