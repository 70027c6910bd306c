"""PHEW: keep the weights that random walks pass which prefer large magnitudes.

n[o, i] = sum |W[o, i]| of a kernel; forwards P(o | i) = n[o, i] / sum_o' n[o', i], backwards
P(i | o) = n[o, i] / sum_i' n[o, i'], and an element of the kernel by its share of n. Walks start at
the inputs and the outputs in turn and are drawn until enough weights were passed. Data, gradients,
norms and biases take no part.

Source: Patil and Dovrolis 2021 (arXiv:2010.11354), "PHEW: constructing sparse networks that learn
fast and generalize well without training data".
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor

from paikern import ops
from paikern.backends.walk_blocks import table_blocks
from paikern.errors import SparsityError
from paikern.masks import MaskSet
from paikern.ops.phew_keep import STALLED, STATE, WALKING
from paikern.ops.phew_tables import WEIGHTINGS
from paikern.ops.unpack_mask import count_kept
from paikern.pathgraph.units import WalkGraph, walk_graph
from paikern.pathgraph.walks import Walks, flattened
from paikern.scorers.base import MaskBuilder, Report, Run, register_scorer
from paikern.scorers.phew_fill import fill_up
from paikern.scorers.phew_published import published_walk_graph
from paikern.scorers.phew_reach import reachable_weights

# Walks at a time: enough for every thread, and few enough to be interrupted and to report.
_FEWEST, _MOST = 256, 8192
_FILL = 1000  # walks that may fill the budget up where none fits as a whole
_ENTRIES = 2**22  # of the array that holds the walks of a batch
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: neighbouring counts give unlike keys


@register_scorer("phew")
class PHEW(MaskBuilder):
    """Biased random walks through the units of the network, in both directions.

    Options:
        kernel_conserved: a walk keeps whole kernels instead of single elements of them.
        identity_skips: walks may take the shortcuts of residual blocks that have no weight.
        exact: keep exactly the budget: a walk with more new weights than are missing is skipped,
            and if 1000 walks go by like that, single weights of the next ones fill it up: such as
            join units of kept walks. False keeps the whole walk that reaches the budget.
        stall: new weights that 1000 walks have to bring; fewer are an error (0: never).
        weighting: "abs"; "square" takes w**2 for |w|; "inverse" draws units by 1 / n.
        grow_from: masks to extend (a `MaskSet`, or name -> bool tensor); all their weights stay.
    """

    kernel_conserved: bool = False
    identity_skips: bool = False
    exact: bool = True
    stall: int = 1
    weighting: str = "abs"
    grow_from: Mapping[str, Tensor] | None = None

    summary = "random walks biased to large weights, in both directions, until enough are kept"
    source = "Patil and Dovrolis 2021"
    cost = "one read of the weights, and walks"
    weakness = "an error where walks find no new weights; no path on an eighth-width VGG-16 at 99 %"
    needs_inputs = True
    variants = ("paper", "published")
    unit: ClassVar[str] = "weight"

    def __post_init__(self) -> None:
        for name in ("kernel_conserved", "identity_skips", "exact"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        whole = isinstance(self.stall, Integral) and not isinstance(self.stall, bool)
        if not whole or not 0 <= self.stall < 2**31:
            raise ValueError(f"stall must be an integer of 0 or more, got {self.stall!r}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(
                f"weighting must be one of {', '.join(WEIGHTINGS)}, got {self.weighting!r}"
            )
        grown = self.grow_from
        if grown is not None and not (
            isinstance(grown, MaskSet)
            or (isinstance(grown, Mapping) and all(map(_is_mask, grown.values())))
        ):
            raise ValueError(
                "grow_from must be a MaskSet, or a dict of parameter names and bool tensors, got "
                f"{type(grown).__name__}"
            )

    def planned_units(self, run: Run, kept: int | list[int]) -> int:
        return _budget(kept)

    def build(
        self, run: Run, kept: int | list[int], report: Report = lambda done, values: None
    ) -> dict[str, Tensor]:
        target = _budget(kept)
        if run.variant == "published" and self.identity_skips:
            raise ValueError("identity_skips: the published program has none; use variant='paper'")
        graph = self._graph(run)
        walks = flattened(graph, run.state, run.shapes, whole=self.kernel_conserved)
        tables = ops.phew_tables(
            walks.weights, walks.geometry, walks.table_size, weighting=self.weighting
        )
        _note_zeros(run, graph, walks, tables)
        bits = self._start(run, walks)
        state = walks.geometry.new_zeros(len(STATE))
        begin = 0 if self.grow_from is None else count_kept(bits)
        state[0] = begin
        if begin > target:
            raise SparsityError(
                f"grow_from: its masks keep {begin} weights, more than the {target} asked for"
            )
        exact = self.exact and run.variant == "paper"
        seed = run.seed + (_GOLDEN * begin if self.grow_from is not None else 0)
        while True:
            before = state.tolist()
            number = _batch(before, begin, target, walks.width)
            drawn = self._draw(walks, tables, seed, before[1], number)
            ops.phew_keep_(bits, state, drawn, target=target, stall=self.stall, exact=exact)
            now = dict(zip(STATE, state.tolist(), strict=True))
            report(
                min(now["kept"], target),
                {"density": now["kept"] / _total(run), "walks": now["walks"]}
                | ({"skipped": now["skipped"]} if exact else {}),
            )
            if now["status"] != WALKING:
                break
        if now["status"] == STALLED:
            raise self._stalled(run, graph, now, target)
        if missing := max(0, target - now["kept"]):
            drawn = self._draw(walks, tables, seed, now["walks"], _FILL)
            found, cut = fill_up(bits, walks, drawn, missing)
            if found < missing:
                raise self._stalled(run, graph, now, target)
            if cut:
                run.notes.append(
                    f"phew: no walk had few enough new weights to end on {target}; {cut} "
                    "of those kept belong to a walk that was cut and may lie on no path "
                    "(exact=False keeps whole walks)"
                )
            report(target, {"density": target / _total(run), "walks": now["walks"]})
        return {
            name: bits[first : first + size].clone() for name, (first, size) in walks.parts.items()
        }

    def _draw(self, walks: Walks, tables: Tensor, seed: int, first: int, count: int) -> Tensor:
        return ops.phew_walks(
            walks.weights, tables, walks.geometry, walks.graph, seed=seed, first=first,
            count=count, width=walks.width, weighting=self.weighting, whole=self.kernel_conserved,
        )  # fmt: skip

    def _graph(self, run: Run) -> WalkGraph:
        if run.variant == "published":
            return published_walk_graph(run.model, run.state, run.shapes)
        return walk_graph(run.graph, run.state, identity_skips=self.identity_skips)

    def _start(self, run: Run, walks: Walks) -> Tensor:
        """The bits to begin with: none, or those of `grow_from`."""
        bits = walks.geometry.new_zeros(walks.nbytes, dtype=torch.uint8)
        if self.grow_from is None:
            return bits
        unknown = [name for name in self.grow_from if name not in walks.parts]
        if unknown:
            raise ValueError(f"grow_from: the model prunes no {unknown[0]!r}")
        for name, mask in self.grow_from.items():
            if tuple(mask.shape) != tuple(run.shapes[name]):
                raise ValueError(
                    f"grow_from: the mask of {name} is {list(mask.shape)}, the weight "
                    f"{list(run.shapes[name])}"
                )
            first, size = walks.parts[name]
            bits[first : first + size] = (
                self.grow_from.packed(name)
                if isinstance(self.grow_from, MaskSet)
                else ops.pack_mask(mask)
            ).to(bits.device)
        return bits

    def _stalled(
        self, run: Run, graph: WalkGraph, now: Mapping[str, int], target: int
    ) -> SparsityError:
        reach = reachable_weights(graph, run.state, run.shapes, whole=self.kernel_conserved)
        total = _total(run)
        return SparsityError(
            f"phew: 1000 walks brought fewer than stall={self.stall} new weights: {now['kept']} of "
            f"{target} are kept (density {now['kept'] / total:.4g}) after {now['walks']} walks, "
            f"which can reach {reach} of {total} weights; ask for a higher sparsity, or lower stall"
        )


def _budget(kept: int | list[int]) -> int:
    if isinstance(kept, int):
        return kept
    raise ValueError(
        "scope: phew walks through all layers and keeps one number of weights; use scope='global'"
    )


def _is_mask(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _total(run: Run) -> int:
    return sum(torch.Size(shape).numel() for shape in run.shapes.values())


def _batch(state: list[int], begin: int, target: int, width: int) -> int:
    """Walks of the next batch: about as many as the budget still needs."""
    kept, walked = state[:2]
    gain = max(1e-3, (kept - begin) / walked) if walked else float(width)
    wanted = int(1.1 * (target - kept) / gain)
    return max(1, min(max(wanted, _FEWEST), _MOST, _ENTRIES // width))


def _note_zeros(run: Run, graph: WalkGraph, walks: Walks, tables: Tensor) -> None:
    """Say where draws are uniform for want of magnitude."""
    found = []
    steps = [node.step for node in graph.nodes if node.step is not None]
    for rows, cols, taps, groups, _, _, by_row, by_col in walks.geometry.tolist():
        across, down = table_blocks(rows, cols, taps, groups)
        ends = (
            tables[by_row : by_row + rows * across].view(-1, across)[:, -1],
            tables[by_col : by_col + groups * cols * down].view(-1, down)[:, -1],
        )
        found.append(torch.stack([(end == 0).any() for end in ends]).any())
    zeros = torch.stack(found).tolist() if found else []  # read once: each look waits for a GPU
    names = [step.parameter for step, zero in zip(steps, zeros, strict=True) if zero]
    if names:
        run.notes.append(
            "phew: units without a weight other than zero, from which walks go on uniformly, in "
            + ", ".join(dict.fromkeys(names))
        )
