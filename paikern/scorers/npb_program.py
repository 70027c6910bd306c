"""The layer program of node-path balancing, solved exactly.

The program. Row i of X is an input, column o an output, X[i, o] the weights kept in kernel (o, i),
0 <= X <= K, sum X <= b; pos(x) = max(x, 0):

    A = [I + O - sum_i pos(t - sum_o X) - sum_o pos(t - sum_i X)] / (I + O)      nodes
    B = sum P_i X / longest                                                       paths
    C = [b - sum pos(1 - X)] / b                                                  kernels
    maximise  alpha A + (1 - alpha) B + beta C

`longest` is the largest possible sum P_i X of b weights. Source: Pham et al., NeurIPS 2023.

Why row sums are enough. Let r_i be the sum of row i and T that of all. For any X

    sum_o min(t, sum_i X) <= min(t O, T)     and     entries > 0 in row i <= min(O, r_i).

Both hold with equality at once, whatever the r_i <= O K: deal the weights of row 0, 1, ... to the
columns 0, 1, ..., O - 1, 0, 1, ..., every row going on where the last one stopped. A row then meets
min(O, r_i) columns, no entry exceeds ceil(r_i / O) <= K, and the column sums differ by at most 1:
they are all >= t, or all <= t, and then sum_o min(t, .) = T. (`paikern.ops.balanced_mask` takes the
columns in a random order, new in every lap, which changes none of the three.) So the optimum is

    const + max  sum_i f_i(r_i) + alpha / (I + O) min(t O, T),     0 <= r_i <= O K,  T <= b
    f_i(r) = (1 - alpha) P_i / longest r + alpha / (I + O) min(t, r) + beta / b min(O, r)

Each f_i is concave with three linear pieces, and none falls, so T = b (or all there is) and the b
best units win: sort the 3 I slopes and fill. That is O(I log I) instead of an integer program of
I O variables, and it is the optimum of that program.

Caps. Bounds on row sums shorten the pieces; column sums are even, so a bound on them bounds T by O
times that.

Proof to hand. The slope of the last unit is the multiplier mu of T <= b, and by weak duality

    const + sum_i max_r (f_i(r) - mu r) + max_T (alpha / (I + O) min(t O, T) + mu T)

bounds every solution from above, for any mu >= 0. `bound` evaluates that without looking at the
solution; it equals `value` up to rounding, for layers of any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = "npt.NDArray[np.float64]"
Counts: TypeAlias = "npt.NDArray[np.int64]"


@dataclass(frozen=True)
class Solution:
    """Row sums `[G, I]`, and for each group the objective and an upper bound on it, `[G]`."""

    rows: Counts
    value: Floats
    bound: Floats

    def summary(self) -> dict[str, float]:
        """What is reported of a layer: means over its groups."""
        return {"objective": float(self.value.mean()), "bound": float(self.bound.mean())}


@dataclass(frozen=True)
class LayerProgram:
    """The programs of one layer, one a group of a grouped convolution.

    Args:
        paths: P, incoming paths, float64 `[G, I]`, >= 0, not all 0 in a group; only ratios count.
        outputs: O, of a group.
        budget: b, int64 `[G]`, from 1 to I O K.
        capacity: K, int64 `[G]`.
        least: t, int64 `[G]`, from 1 to K.
        alpha, beta: weights of nodes and kernels, alpha in [0, 1], beta >= 0.
        row_cap, column_cap: int64 `[G]`, bounds on the sums of rows and columns.
        published_longest: where b < O K the published program takes all paths for `longest`.
    """

    paths: Floats
    outputs: int
    budget: Counts
    capacity: Counts
    least: Counts
    alpha: float
    beta: float
    row_cap: Counts | None = None
    column_cap: Counts | None = None
    published_longest: bool = False

    @property
    def inputs(self) -> int:
        return self.paths.shape[1]

    @property
    def total(self) -> Counts:
        """T, the weights that are placed: the budget unless the caps leave less room."""
        room = np.minimum(self.budget, self.inputs * self._most)
        if self.column_cap is not None:
            room = np.minimum(room, self.outputs * self.column_cap)
        return room

    @property
    def longest(self) -> Floats:
        """The denominator of B, `[G]`."""
        full = self.outputs * self.capacity
        ordered = -np.sort(-self.paths, axis=1)
        sums = np.concatenate([np.zeros((len(ordered), 1)), np.cumsum(ordered, axis=1)], axis=1)
        rows, rest = self.budget // full, self.budget % full
        whole = np.minimum(rows, self.inputs)
        if self.published_longest:
            whole = np.where(rows == 0, self.inputs, whole)
        following = np.concatenate([ordered, np.zeros((len(ordered), 1))], axis=1)
        every = np.arange(len(ordered))
        at = np.minimum(rows, self.inputs)
        found: Floats = full * sums[every, whole] + rest * following[every, at]
        return found

    def solve(self) -> Solution:
        """The best row sums; rows that are equally good share what is left among them evenly.

        Where it cannot be shared evenly, the lower rows get one more.
        """
        slopes, widths = self._pieces()
        flat, wide = slopes.reshape(len(slopes), -1), widths.reshape(len(widths), -1)
        order = np.argsort(-flat, axis=1, kind="stable")
        filled = np.cumsum(np.take_along_axis(wide, order, 1), axis=1)
        total = self.total
        last = np.minimum((filled < total[:, None]).sum(1), flat.shape[1] - 1)
        every = np.arange(len(flat))
        price = flat[every, order[every, last]]  # mu, [G]
        rows = (widths * (slopes > price[:, None, None])).sum(2)
        room = (widths * (slopes == price[:, None, None])).sum(2)
        left = total - rows.sum(1)
        for group in np.flatnonzero(left > 0):
            rows[group] += _share(room[group], int(left[group]))
        return Solution(rows, self.value(rows), self.bound(price))

    def value(self, rows: Counts) -> Floats:
        """The objective of row sums `[G, I]` that are dealt evenly, `[G]`."""
        least, total = self.least, rows.sum(1)
        covered = np.minimum(rows, least[:, None]).sum(1) + np.minimum(least * self.outputs, total)
        paths = (self.paths * rows).sum(1) / self.longest
        kernels = np.minimum(rows, self.outputs).sum(1) / self.budget
        found: Floats = (
            self._constant + self._node * covered + (1.0 - self.alpha) * paths + self.beta * kernels
        )
        return found

    def bound(self, price: Floats) -> Floats:
        """No solution is better than this, whatever the `price` >= 0 of a unit, `[G]`."""
        slopes, widths = self._pieces()
        surplus = (widths * np.maximum(slopes - price[:, None, None], 0.0)).sum((1, 2))
        columns = self._node * np.minimum(self.least * self.outputs, self.total)
        found: Floats = self._constant + surplus + columns + price * self.total
        return found

    @property
    def _node(self) -> float:
        return self.alpha / (self.inputs + self.outputs)

    @property
    def _constant(self) -> Floats:
        """alpha A + beta C of nothing kept."""
        kernels = self.beta * (1.0 - self.inputs * self.outputs / self.budget)
        found: Floats = (
            self.alpha - self._node * self.least * (self.inputs + self.outputs) + kernels
        )
        return found

    @property
    def _most(self) -> Counts:
        most = self.outputs * self.capacity
        return most if self.row_cap is None else np.minimum(most, self.row_cap)

    def _pieces(self) -> tuple[Floats, Counts]:
        """Slopes and lengths of the pieces of every f_i, `[G, I, 3]`, falling."""
        groups, inputs = self.paths.shape
        path = (1.0 - self.alpha) * self.paths / self.longest[:, None]  # [G, I]
        kernel = (self.beta / self.budget)[:, None]
        first = np.minimum(self.least, self.outputs)
        second = np.maximum(self.least, self.outputs)
        middle = np.where(self.least[:, None] < self.outputs, kernel, self._node)
        slopes = np.stack([path + (self._node + kernel), path + middle, path], axis=2)
        ends = np.minimum(np.stack([first, second, self._most], axis=1), self._most[:, None])
        lengths = np.diff(np.concatenate([np.zeros((groups, 1), np.int64), ends], axis=1), axis=1)
        return slopes, np.broadcast_to(lengths[:, None, :], (groups, inputs, 3))


def _share(room: Counts, left: int) -> Counts:
    """`left` units over rows with some `room`: as even as it allows, lower rows first."""
    ordered = np.sort(room)
    before = np.cumsum(ordered) - ordered
    rows = len(room) - np.arange(len(room))
    full = int(np.searchsorted(before + ordered * rows, left, side="right"))
    if full == len(room):
        return room
    level = (left - int(before[full])) // int(rows[full])
    taken: Counts = np.minimum(room, level)
    taken[np.flatnonzero(room > level)[: left - int(taken.sum())]] += 1
    return taken
