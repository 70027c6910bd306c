"""Scores -> packed masks of a structured pattern, and whether masks have one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paikern import budget, ops
from paikern.errors import SparsityError
from paikern.pattern import NM, Blocks, Layout, Pattern
from paikern.scores import Dense, Factored, Product, Scores

Shape = tuple[int, ...]


def target_sparsity(
    pattern: Pattern | None,
    *,
    sparsity: float | None = None,
    density: float | None = None,
    amount: float | int | None = None,
    compression: float | None = None,
    total: int | None = None,
) -> float:
    """The fraction to remove; n:m implies it, so that it may be left out but not differ.

    Raises:
        SparsityError: none or several given, out of range, or another than that of the pattern.
    """
    given = {
        "sparsity": sparsity, "density": density, "amount": amount, "compression": compression
    }  # fmt: skip
    named = {name: value for name, value in given.items() if value is not None}
    if isinstance(pattern, NM) and not named:
        return pattern.sparsity
    fraction = budget.resolve_sparsity(**given, total=total)
    if isinstance(pattern, NM) and abs(fraction - pattern.sparsity) > 1e-6:
        name, value = next(iter(named.items()))
        raise SparsityError(
            f"{name}={value} and pattern='{pattern}' do not fit: the pattern removes "
            f"{pattern.sparsity:g} of the weights; leave {name} out"
        )
    return fraction


def check_pattern(
    pattern: Pattern | None, shapes: Mapping[str, Shape], scope: str, rule: str
) -> None:
    """Refuse layers, scopes and rules that a pattern has no meaning for."""
    if pattern is None:
        return
    if rule != "exact":
        raise ValueError(
            f"selection='{rule}' is a rule for single weights; with pattern='{pattern}' use "
            "selection='exact'"
        )
    if isinstance(pattern, Blocks) and scope == "row":
        raise ValueError(
            f"scope='row' keeps single inputs of every output; with pattern='{pattern}' use "
            "scope='local'"
        )
    for name, shape in shapes.items():
        if len(shape) < 2:
            raise ValueError(
                f"pattern='{pattern}' needs weights [out, in, ...], but '{name}' has the shape "
                f"{tuple(shape)}"
            )
    if isinstance(pattern, NM) and scope in ("erk", "lamp"):
        raise ValueError(
            f"scope='{scope}': pattern='{pattern}' fixes what every layer keeps; leave scope out"
        )


def left_dense(
    pattern: Pattern | None, shapes: Mapping[str, Shape], layouts: Mapping[str, Layout]
) -> str | None:
    """What to tell about layers that cannot take the pattern."""
    if not isinstance(pattern, NM):
        return None
    small = [n for n, shape in shapes.items() if not pattern.fits(shape, layouts[n])]
    if not small:
        return None
    shown = ", ".join(f"{n} ({pattern.inputs(shapes[n], layouts[n])})" for n in small[:5])
    more = f" and {len(small) - 5} more" if len(small) > 5 else ""
    return (
        f"pattern='{pattern}' needs {pattern.m} inputs and leaves layers with fewer dense: "
        f"{shown}{more}; ignore= them to silence this"
    )


def select_structured(
    scores: Scores, counts: int | Sequence[int], pattern: Pattern
) -> dict[str, Tensor]:
    """The packed masks of the best groups or blocks.

    n:m ignores `counts`. Blocks: those of the highest mean score are kept until they hold the
    number of weights, over all layers or in each; so at least that many are kept, by less than one
    block more, and exactly that many where blocks of one size divide it. Ties go to the lower
    block (layer order, then row-major).

    Raises:
        NonFiniteScoreError: NaN scores, named by parameter.
    """
    if isinstance(pattern, NM):
        return _select_groups(scores, pattern)
    if isinstance(counts, int):
        return _select_blocks(scores, list(scores), counts, pattern)
    packed: dict[str, Tensor] = {}
    for name, count in zip(scores, counts, strict=True):
        packed |= _select_blocks(scores, [name], count, pattern)
    return packed


def _select_groups(scores: Scores, pattern: NM) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    dense: dict[bool, dict[str, tuple[Tensor, int]]] = {False: {}, True: {}}
    factored: dict[int, dict[str, Factored]] = {1: {}, 2: {}}
    for name, entry in scores.items():
        shape, layout = scores.shapes[name], scores.layouts[name]
        if not pattern.fits(shape, layout):
            packed[name] = _all_kept(math.prod(shape))
        elif isinstance(entry, Dense):
            dense[entry.absolute][name] = _grouped(entry.values, pattern, shape, layout)
        elif isinstance(entry, Factored) and _rank_one(entry) and entry.weight.dim() == len(shape):
            factored[entry.power][name] = entry
        else:  # from maps, or groups across the taps: one layer at a time, gone before the next
            values, dim = _grouped(entry.dense(-1.0).values.view(shape), pattern, shape, layout)
            (packed[name],) = ops.nm_mask(values, pattern.n, pattern.m, dims=dim, names=[name])
    for absolute, group in dense.items():
        bits = ops.nm_mask(
            [values for values, _ in group.values()],
            pattern.n,
            pattern.m,
            dims=[dim for _, dim in group.values()],
            absolute=absolute,
            names=list(group),
        )
        packed.update(zip(group, bits, strict=True))
    for power, entries in factored.items():
        bits = ops.nm_mask_factored(
            [e.weight for e in entries.values()],
            [e.a for e in entries.values()],
            [e.g for e in entries.values()],
            pattern.n,
            pattern.m,
            power=power,
            dims=[0 if scores.layouts[name].transposed else 1 for name in entries],
            masks=[e.mask for e in entries.values()],
            names=list(entries),
        )
        packed.update(zip(entries, bits, strict=True))
    return {name: packed[name] for name in scores}


def _rank_one(entry: Factored) -> bool:
    return entry.conv is None and entry.a.dim() == 1


def _grouped(values: Tensor, pattern: NM, shape: Shape, layout: Layout) -> tuple[Tensor, int]:
    """The scores in a shape whose groups run along one dimension, and that dimension."""
    view, dim = pattern.grouped(shape, layout)
    return (values if view == shape else values.unflatten(0, view[:2])), dim


def _all_kept(numel: int) -> Tensor:
    bits = torch.full(((numel + 7) // 8,), 255, dtype=torch.uint8)
    if numel % 8:
        bits[-1] = (1 << numel % 8) - 1
    return bits


class _Layer(NamedTuple):
    """A layer as blocks: their means, and how many weights each holds."""

    shape: Shape
    block: tuple[int, int]
    means: Tensor
    exponent: int

    @property
    def heights(self) -> Tensor:
        return _lengths(self.shape[0], self.block[0])

    @property
    def widths(self) -> Tensor:
        return _lengths(math.prod(self.shape[1:]), self.block[1])

    def size(self) -> int | None:
        """Weights of a block where all have the same number."""
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        whole = rows % self.block[0] == 0 and columns % self.block[1] == 0
        return self.block[0] * self.block[1] if whole else None

    def weights(self, packed: Tensor) -> int:
        """Weights in the blocks of a mask."""
        kept = ops.unpack_mask(packed, self.means.shape)
        if (size := self.size()) is not None:
            return size * int(kept.sum())
        return int(self.heights @ (kept.double() @ self.widths))  # exact below 2**53


def _lengths(total: int, block: int) -> Tensor:
    starts = torch.arange(0, total, block)
    return (total - starts).clamp(max=block).double()


def _select_blocks(
    scores: Scores, names: Sequence[str], count: int, pattern: Blocks
) -> dict[str, Tensor]:
    layers = [_layer(scores, name, pattern) for name in names]

    def best(k: int) -> list[Tensor]:
        return ops.topk_mask(
            [layer.means for layer in layers],
            k,
            exponents=[layer.exponent for layer in layers],
            names=list(names),
        )

    def weights(packed: Sequence[Tensor]) -> int:
        return sum(layer.weights(bits) for layer, bits in zip(layers, packed, strict=True))

    sizes = {layer.size() for layer in layers if layer.means.numel()}
    total = sum(layer.means.numel() for layer in layers)
    only = next(iter(sizes)) if len(sizes) == 1 else None
    if only is not None or count == 0:
        chosen = best(-(-count // only) if only else 0)
    else:  # the more blocks, the more weights: the fewest that reach the number, by halving
        low = -(-count // max(layer.block[0] * layer.block[1] for layer in layers))
        high, chosen = total, best(total)
        while low < high:
            middle = (low + high) // 2
            packed = best(middle)
            if weights(packed) >= count:
                high, chosen = middle, packed
            else:
                low = middle + 1
    return {
        name: ops.expand_blocks(bits, layer.shape, layer.block)
        for name, layer, bits in zip(names, layers, chosen, strict=True)
    }


def _layer(scores: Scores, name: str, pattern: Blocks) -> _Layer:
    shape, entry = scores.shapes[name], scores[name]
    block = pattern.block(shape, scores.layouts[name])
    if isinstance(entry, Dense):
        means = ops.block_means(entry.values, block, absolute=entry.absolute, name=name)
    elif isinstance(entry, Product) or not _rank_one(entry):  # one layer at a time
        means = ops.block_means(entry.dense(-1.0).values, block, name=name)
    else:
        means = ops.block_means_factored(
            entry.weight, entry.a, entry.g, block, power=entry.power, mask=entry.mask, name=name
        )
    return _Layer(shape, block, means, entry.exponent)


def kept_range(
    pattern: Pattern,
    shapes: Mapping[str, Shape],
    layouts: Mapping[str, Layout],
    sparsity: float,
    scope: str,
) -> tuple[int, int]:
    """The fewest and the most weights that a selection of this pattern may keep."""
    laid = {name: layouts.get(name, Layout()) for name in shapes}
    if isinstance(pattern, NM):
        kept = sum(pattern.kept(shape, laid[name]) for name, shape in shapes.items())
        return kept, kept
    local = scope in ("local", "uniform")  # rounded layer by layer
    counts = budget.layer_budget(shapes, sparsity, scope if local else "global")
    sizes = [math.prod(pattern.block(shape, laid[name])) for name, shape in shapes.items()]
    if isinstance(counts, int):
        # ERK and LAMP keep this number in parts, each of them filled up to a block.
        parts = max(sizes) if scope == "global" else sum(sizes)
        return counts, counts + parts - (1 if scope == "global" else len(sizes))
    return sum(counts), sum(counts) + sum(sizes) - len(sizes)


def deviations(
    masks: Mapping[str, Tensor], pattern: Pattern, layouts: Mapping[str, Layout]
) -> list[str]:
    """The parameters whose masks do not have the pattern: a group with more than its share, a
    block that is neither whole nor empty. `masks` are bool."""
    return [
        name
        for name, mask in masks.items()
        if mask.numel() and not _has_pattern(mask, pattern, layouts.get(name, Layout()))
    ]


def _has_pattern(mask: Tensor, pattern: Pattern, layout: Layout) -> bool:
    shape = tuple(mask.shape)
    if isinstance(pattern, NM):
        if not pattern.fits(shape, layout):
            return True
        view, dim = pattern.grouped(shape, layout)
        rows = mask.reshape(view).movedim(dim, -1)
        whole = rows.shape[-1] // pattern.m * pattern.m
        most = int(rows[..., :whole].unflatten(-1, (-1, pattern.m)).sum(-1).max())
        rest = rows[..., whole:]
        return most <= pattern.n and int(rest.sum(-1).max()) <= pattern.kept_of(rest.shape[-1])
    block = pattern.block(shape, layout)
    blocks = ops.block_means(mask.float(), block)
    return bool(((blocks == 0) | (blocks == 1)).all())
