"""Biased random walks, one draw after the other in plain Python."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from paikern.backends.walk_blocks import column_block, row_block

_T = TypeVar("_T")
_INPUT, _WEIGHT, _JOINT, _OUTPUT = range(4)
_MASK = 2**32 - 1
_WINDOW = 1000


def _magnitudes(weight: Tensor, row: Sequence[int], weighting: int) -> Tensor:
    """float64 `[rows, cols, taps]`: |w| or w**2."""
    w = weight.detach().double().reshape(row[0], row[1], row[2])
    return w * w if weighting == 1 else w.abs()


def _shares(magnitudes: Tensor, weighting: int) -> Tensor:
    """float64 `[rows, cols]`: what a kernel weighs in a draw."""
    n = _in_order(magnitudes)[..., -1]
    return torch.where(n > 0, 1.0 / n, 0.0) if weighting == 2 else n


def _in_order(values: Tensor) -> Tensor:
    """Cumulated sums over the last dimension, one addition after the other."""
    sums = list(itertools.accumulate(values.unbind(-1)))
    return torch.stack(sums, -1)


def _table(shares: Tensor, block: int) -> Tensor:
    """`[lists, kernels]` -> `[lists, blocks]`: cumulated, relative to the total."""
    missing = -shares.shape[1] % block
    padded = torch.nn.functional.pad(shares, (0, missing)).unflatten(1, (-1, block))
    upto = _in_order(_in_order(padded)[..., -1])
    total = upto[:, -1:]
    return torch.where(total > 0, upto / total, 0.0).float()


def _by_column(shares: Tensor, groups: int) -> Tensor:
    """`[rows, cols]` -> `[groups * cols, rows / groups]`."""
    return shares.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def phew_tables(weights: Sequence[Tensor], geometry: Tensor, size: int, weighting: int) -> Tensor:
    tables = torch.empty(size, dtype=torch.float32)
    for weight, row in zip(weights, geometry.tolist(), strict=True):
        shares = _shares(_magnitudes(weight, row, weighting), weighting)
        columns = _by_column(shares, row[3])
        for begin, lists, block in (
            (row[6], shares, row_block(row[2])),
            (row[7], columns, column_block(row[2])),
        ):
            table = _table(lists, block).flatten()
            tables[begin : begin + len(table)] = table
    return tables


def _philox(counter: list[int], seed: int) -> list[int]:
    key = [seed & _MASK, seed >> 32]
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (right >> 32) ^ counter[1] ^ key[0],
            right & _MASK,
            (left >> 32) ^ counter[3] ^ key[1],
            left & _MASK,
        ]
        key = [(key[0] + 0x9E3779B9) & _MASK, (key[1] + 0xBB67AE85) & _MASK]
    return counter


class _Walker:
    """One walk after the other through a flattened walk graph."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        tables: Tensor,
        geometry: Tensor,
        graph: Sequence[Tensor],
        seed: int,
        weighting: int,
        whole: bool,
    ) -> None:
        self.nodes, self.slots, self.links, self.index, self.owner, self.starts = (
            t.tolist() for t in graph
        )
        self.geometry = geometry.tolist()
        self.tables = tables.tolist()
        self.magnitudes = [
            _magnitudes(w, row, weighting) for w, row in zip(weights, self.geometry, strict=True)
        ]
        self.shares = [_shares(m, weighting) for m in self.magnitudes]
        self.seed, self.weighting, self.whole = seed % 2**64, weighting, whole

    def walk(self, number: int) -> list[int]:
        forwards, turn = number % 2 == 0, number // 2
        if forwards:
            node, unit = self._place(self.starts[turn % len(self.starts)])
        else:
            node, unit = len(self.nodes) - 1, turn % self.nodes[-1][3]
        bits: list[int] = []
        for hop in itertools.count():
            kind, weight = self.nodes[node][:2]
            if kind == (_OUTPUT if forwards else _INPUT):
                return bits
            self.words = _philox([number & _MASK, number >> 32, hop, 0], self.seed)
            if not forwards and kind == _WEIGHT:
                unit, passed = self._through(weight, unit, forwards)
                bits += passed
                met = self._list(self.slots[self.nodes[node][6]][1], unit)
                if not met:
                    return []
                node, unit = self._place(self._one_of(met))
                continue
            if forwards:
                ways = [
                    (self.slots[slot][0], self._list(begin, unit))
                    for slot, begin in self.links[slice(*self.nodes[node][4:6])]
                ]
            else:
                slots = self.slots[slice(*self.nodes[node][6:8])]
                ways = [(node, self._list(begin, unit)) for _, begin in slots]
            ways = [way for way in ways if way[1]]
            if not ways:
                return []
            node, met = self._one_of(ways)
            unit = self._one_of(met)
            if not forwards:
                node, unit = self._place(unit)
            elif self.nodes[node][0] == _WEIGHT:
                unit, passed = self._through(self.nodes[node][1], unit, forwards)
                bits += passed
        raise AssertionError("a walk graph has no cycles")

    def _place(self, unit: int) -> tuple[int, int]:
        node = self.owner[unit]
        return node, unit - self.nodes[node][2]

    def _list(self, begin: int, unit: int) -> list[int]:
        return self.index[slice(*self.index[begin + unit : begin + unit + 2])]

    def _one_of(self, choices: list[_T]) -> _T:
        product = self.words[3] * len(choices)
        self.words[3] = product & _MASK
        return choices[product >> 32]

    def _through(self, weight: int, unit: int, forwards: bool) -> tuple[int, list[int]]:
        """The unit on the other side of a weight, and the bits passed."""
        rows, cols, taps, groups, transposed, base, by_row, by_col = self.geometry[weight]
        along_row = forwards == bool(transposed)
        group = unit // (rows // groups) if along_row else unit // cols
        if along_row:
            shares = self.shares[weight][unit].tolist()
            table, size = by_row, row_block(taps)
        else:
            shares = _by_column(self.shares[weight], groups)[unit].tolist()
            table, size = by_col, column_block(taps)
        blocks = -(-len(shares) // size)
        entries = self.tables[table + unit * blocks : table + (unit + 1) * blocks]
        drawn = self._kernel(shares, entries, size)
        row = unit if along_row else group * (rows // groups) + drawn
        col = drawn if along_row else unit % cols
        bits = [base + (row * cols + col) * taps + tap for tap in self._taps(weight, row, col)]
        other = group * cols + col if along_row else row
        return other, bits if base >= 0 else []

    def _kernel(self, shares: list[float], entries: list[float], size: int) -> int:
        u = ((self.words[0] << 21) | (self.words[1] >> 11)) * 2.0**-53
        if entries[-1] == 0:
            return int(u * len(shares))
        block = next(b for b, entry in enumerate(entries) if entry > u)
        below = entries[block - 1] if block else 0.0
        at = (u - below) / (entries[block] - below)
        upto = list(itertools.accumulate(shares[block * size : (block + 1) * size]))
        return block * size + _above(upto, at * upto[-1])

    def _taps(self, weight: int, row: int, col: int) -> list[int]:
        held = self.magnitudes[weight][row, col].tolist()
        if self.whole:
            return list(range(len(held)))
        u = self.words[2] * 2.0**-32
        upto = list(itertools.accumulate(held))
        return [_above(upto, u * upto[-1]) if upto[-1] > 0 else int(u * len(held))]


def _above(upto: list[float], aim: float) -> int:
    """The first above `aim`; where rounding leaves none, the first that reaches the last."""
    return next((j for j, sum_ in enumerate(upto) if sum_ > aim), upto.index(upto[-1]))


def phew_walks(
    weights: Sequence[Tensor],
    tables: Tensor,
    geometry: Tensor,
    graph: Sequence[Tensor],
    seed: int,
    first: int,
    count: int,
    width: int,
    weighting: int,
    whole: bool,
) -> Tensor:
    walker = _Walker(weights, tables, geometry, graph, seed, weighting, whole)
    walks = torch.full((count, width), -1)
    for number in range(count):
        bits = walker.walk(first + number)
        walks[number, : len(bits)] = torch.tensor(bits, dtype=torch.int64)
    return walks


def phew_keep_(
    bits: Tensor, state: Tensor, walks: Tensor, target: int, stall: int, exact: bool
) -> None:
    kept, walked, window_new, window_skipped, skipped, status = state.tolist()
    held = bits.tolist()
    status = 1 if kept >= target else status
    for walk in walks.tolist():
        if status:
            break
        fresh = [
            bit for bit in dict.fromkeys(walk) if bit >= 0 and not held[bit >> 3] >> (bit & 7) & 1
        ]
        if exact and len(fresh) > target - kept:
            skipped, window_skipped, fresh = skipped + 1, window_skipped + 1, []
        for bit in fresh:
            held[bit >> 3] |= 1 << (bit & 7)
        kept, walked, window_new = kept + len(fresh), walked + 1, window_new + len(fresh)
        if kept >= target:
            status = 1
        elif walked % _WINDOW == 0:
            if window_new < stall:
                status = 3 if window_skipped else 2
            window_new = window_skipped = 0
    bits.copy_(torch.tensor(held, dtype=torch.uint8))
    state.copy_(torch.tensor([kept, walked, window_new, window_skipped, skipped, status]))
