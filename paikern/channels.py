"""Channels kept or removed as a whole: their ranking, their masks, and their place in a mask file.

A mask by channels is a mask of weights like any other: a removed channel has no row in the weights
that make it and no column in those that read it. The masked network computes what the network
without these channels computes, whatever biases and norms say, because nobody reads what they leave
behind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paikern import ops
from paikern.budget import keep_count
from paikern.errors import MaskFormatError, NonFiniteScoreError
from paikern.pathgraph.channels import ChannelGroup, ChannelGroups
from paikern.pattern import Layout

Kept = dict[str, Tensor]
"""Group name -> bool `[size]`, True for the channels that stay."""

Shapes = Mapping[str, tuple[int, ...]]


def all_kept(groups: ChannelGroups) -> Kept:
    return {group.name: torch.ones(group.size, dtype=torch.bool) for group in groups}


def kept_of(groups: ChannelGroups, channels: Mapping[str, Tensor]) -> Kept:
    """What masks keep of each group, from their `MaskSet.channels`; all where they name none."""
    kept = all_kept(groups)
    for group in groups:
        for name in group.rows.keys() & channels.keys():
            kept[group.name][group.rows[name]] = channels[name]
    return kept


# --- ranking -------------------------------------------------------------------------------------


class Ranking:
    """The channels of all groups, those that stay in any case first, then the best first.

    Args:
        groups: of the model.
        scores: group name -> `[size]`, higher is kept; ties go to the lower group, then the lower
            channel.
        kept: the channels that may still be kept.
        local: rank a channel by the fraction of its group that is worse instead of by its score, so
            that every group loses the same fraction.
        least: the fraction of each group that stays in any case; at least one channel does.

    Raises:
        NonFiniteScoreError: NaN or infinite scores, the layer is named.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        scores: Mapping[str, Tensor],
        kept: Kept,
        *,
        local: bool = False,
        least: float = 0.0,
    ) -> None:
        self.groups = groups
        values, owners, channels, ranks, first, nodes = [], [], [], [], [], []
        for number, group in enumerate(groups):
            score = scores[group.name].to("cpu", torch.float64)
            alive = kept[group.name].nonzero().flatten()
            _check_finite(group, score[alive])
            best = alive[score[alive].argsort(descending=True, stable=True)]
            stay = max(1, math.ceil(least * group.size))
            rank = torch.arange(len(best))
            values.append((group.size - rank).double() / group.size if local else score[best])
            owners.append(torch.full_like(best, number))
            channels.append(best)
            ranks.append(rank)
            first.append(rank < stay)
            nodes.append(group.nodes[best])
        held, value = torch.cat(first), torch.cat(values)
        sizes = torch.tensor([0] + [group.size for group in groups]).cumsum(0)
        place = sizes[torch.cat(owners)] + torch.cat(channels)
        order = place.argsort()
        order = order[value[order].argsort(descending=True, stable=True)]
        order = torch.cat([order[held[order]], order[~held[order]]])
        self.held = int(held.sum())
        self.value, self.nodes = value[order], torch.cat(nodes)[order]
        self._owner, self._channel = torch.cat(owners)[order], torch.cat(channels)[order]
        self._rank, self._place = torch.cat(ranks)[order], place[order]

    def __len__(self) -> int:
        return len(self._owner)

    def first(self, count: int) -> Kept:
        """The best `count` channels, never fewer than stay in any case."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[: max(count, self.held)] = True
        return self._kept(chosen)

    def with_nodes(self, count: int) -> Kept:
        """The best channels with `count` outputs of weights.

        Where the next channel stands for more outputs than are left, or would leave a number that
        no others make up, worse ones take its place, so that the count is met wherever some choice
        of them can; else the next lower one that can be met.
        """
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[: self.held] = True
        left = count - int(self.nodes[: self.held].sum())
        free = self.nodes[self.held :].tolist()
        if left > 0 and free:
            chosen[self.held + torch.tensor(best_with_sum(free, left), dtype=torch.long)] = True
        return self._kept(chosen)

    def with_fraction(self, sparsity: float) -> Kept:
        """The best of each group: `n - floor(sparsity * n)` of its n channels."""
        counts = torch.tensor([keep_count(group.size, sparsity) for group in self.groups])
        chosen = self._rank < counts[self._owner]
        chosen[: self.held] = True
        return self._kept(chosen)

    def rescued(self, kept: Kept) -> list[str]:
        """Groups of which nothing would be left, were it not for what stays in any case."""
        chosen = torch.cat([kept[group.name] for group in self.groups])[self._place]
        free = chosen
        free[: self.held] = False
        lowest = self.value[free].min() if bool(free.any()) else torch.inf
        found = (self._rank == 0) & (self.value < lowest)
        return [self.groups.groups[g].name for g in self._owner[found].sort().values.tolist()]

    def with_weights(self, count: int, layouts: Mapping[str, Layout], shapes: Shapes) -> Kept:
        """As many of the best channels as leave at most `count` weights, found by bisection."""
        low, high = self.held, len(self) + 1  # `low` channels are few enough, `high` too many
        while high - low > 1:
            middle = (low + high) // 2
            found = kept_weights(self.groups, self.first(middle), layouts, shapes)
            low, high = (middle, high) if found <= count else (low, middle)
        return self.first(low)

    def _kept(self, chosen: Tensor) -> Kept:
        kept = {}
        for number, group in enumerate(self.groups):
            kept[group.name] = torch.zeros(group.size, dtype=torch.bool)
            kept[group.name][self._channel[chosen & (self._owner == number)]] = True
        return kept


def best_with_sum(sizes: Sequence[int], total: int) -> list[int]:
    """Places in `sizes`, the earliest first, whose sizes add up to `total`.

    Of all choices the one that is first in lexicographic order; where there is none, that of the
    next lower sum. Whatever fits is taken as long as the rest can still be made up: only the last
    few are weighed against each other, over ever more of them until the sum is met.

    Example:
        >>> best_with_sum([3, 3, 3, 2, 2], 7), best_with_sum([2, 2, 2], 5)
        ([0, 3, 4], [0, 1])
    """
    total = min(total, sum(sizes))
    total -= total % math.gcd(*sizes)
    taken, left = [], total
    for place, size in enumerate(sizes):
        if size <= left:
            taken.append(place)
            left -= size
    again = 0  # so many of the first choices are made anew
    while left and again < len(taken):
        again = min(len(taken), max(64, 4 * again))
        first = taken[: len(taken) - again]
        start = first[-1] + 1 if first else 0
        room = total - sum(sizes[place] for place in first)
        rest, met = _tail_with_sum(sizes, start, room)
        if met or again == len(taken):
            return first + rest
    return taken


def _tail_with_sum(sizes: Sequence[int], start: int, total: int) -> tuple[list[int], bool]:
    """The earliest places from `start` on with the highest sum up to `total`; whether it is met."""
    places: list[int] = []
    room: dict[int, int] = {}  # of each size no more than fit are of use
    for place in range(start, len(sizes)):
        size = sizes[place]
        if room.setdefault(size, total // size) > 0:
            room[size] -= 1
            places.append(place)
    reach, limit = [1], (1 << (total + 1)) - 1  # bit s: a sum of s can be made from here on
    for place in reversed(places):
        reach.append((reach[-1] | reach[-1] << sizes[place]) & limit)
    reach.reverse()
    left = reach[0].bit_length() - 1
    met, taken = left == total, []
    for place, after in zip(places, reach[1:], strict=True):
        if sizes[place] <= left and after >> (left - sizes[place]) & 1:
            taken.append(place)
            left -= sizes[place]
    return taken, met


def _check_finite(group: ChannelGroup, scores: Tensor) -> None:
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise NonFiniteScoreError(
            f"{group.name}: {bad} of {len(scores)} channel scores are NaN or infinite; use float32 "
            f"or a smaller loss, or leave the layer out with ignore=[{group.name!r}]"
        )


# --- masks of weights ----------------------------------------------------------------------------


def channel_sides(groups: ChannelGroups, kept: Kept) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weight -> which of its outputs, and which of its inputs stay."""
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for group in groups:
        stays = torch.cat([kept[group.name], torch.ones(1, dtype=torch.bool)])  # -1: no channel
        for name, channels in group.rows.items():
            rows[name] = stays[channels]
        for name, channels in group.columns.items():
            columns[name] = columns.get(name, torch.tensor(True)) & stays[channels]
    return rows, columns


def channel_entries(groups: ChannelGroups, kept: Kept) -> dict[str, Tensor]:
    """Path of a batch norm -> which of its entries stay; several groups may share one."""
    entries: dict[str, Tensor] = {}
    for group in groups:
        stays = torch.cat([kept[group.name], torch.ones(1, dtype=torch.bool)])
        for path, channels in group.norms.items():
            entries[path] = entries.get(path, torch.tensor(True)) & stays[channels]
    return entries


def _ends(
    shape: tuple[int, ...], layout: Layout, rows: Tensor | None, columns: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What stays of a weight's outputs and inputs, bool `[groups, of each]`."""
    groups = layout.groups
    outputs = shape[1] * groups if layout.transposed else shape[0]
    inputs = shape[0] if layout.transposed else shape[1] * groups
    rows = torch.ones(outputs, dtype=torch.bool) if rows is None else rows
    columns = torch.ones(inputs, dtype=torch.bool) if columns is None else columns
    return rows.view(groups, -1), columns.view(groups, -1)


def weight_mask(
    shape: tuple[int, ...], layout: Layout, rows: Tensor | None, columns: Tensor | None
) -> Tensor:
    """The mask of one weight, bool of its shape, from what stays of its outputs and inputs."""
    out, into = _ends(shape, layout, rows, columns)
    if layout.transposed:
        out, into = into, out
    # [groups, a, b]: the first dimension of the weight goes through all groups, the second counts
    # within one.
    mask = (out.unsqueeze(2) & into.unsqueeze(1)).flatten(0, 1)
    return mask.view(*mask.shape, *(1,) * (len(shape) - 2)).expand(shape)


def empty_outputs(mask: Tensor, layout: Layout, gone: Tensor) -> bool:
    """Whether the outputs `gone`, bool `[out]`, have no weight in a mask of a weight's shape."""
    if gone.numel() != (mask.shape[1] * layout.groups if layout.transposed else mask.shape[0]):
        return False
    allowed = weight_mask(tuple(mask.shape), layout, ~gone, None)
    return not bool((mask & ~allowed).any())


def channel_masks(
    groups: ChannelGroups, kept: Kept, layouts: Mapping[str, Layout], shapes: Shapes
) -> dict[str, Tensor]:
    """The packed masks of all weights in `shapes`."""
    rows, columns = channel_sides(groups, kept)
    return {
        name: ops.pack_mask(weight_mask(shape, layouts[name], rows.get(name), columns.get(name)))
        for name, shape in shapes.items()
    }


def kept_weights(
    groups: ChannelGroups, kept: Kept, layouts: Mapping[str, Layout], shapes: Shapes
) -> int:
    """How many weights the masks keep, without making them."""
    rows, columns = channel_sides(groups, kept)
    total = 0
    for name, shape in shapes.items():
        out, into = _ends(shape, layouts[name], rows.get(name), columns.get(name))
        total += math.prod(shape[2:]) * int((out.sum(1) * into.sum(1)).sum())
    return total


# --- in a mask file ------------------------------------------------------------------------------


def encoded(groups: ChannelGroups, kept: Kept) -> dict[str, list[Any]]:
    """Weight -> [number of outputs, the kept ones as bits in hexadecimal]."""
    rows, _ = channel_sides(groups, kept)
    return {
        name: [len(mask), bytes(ops.pack_mask(mask).tolist()).hex()] for name, mask in rows.items()
    }


def decoded(stored: Any) -> dict[str, Tensor]:
    """What `encoded` wrote, as bool `[outputs]`.

    Raises:
        MaskFormatError: it is something else.
    """
    if not isinstance(stored, Mapping):
        raise MaskFormatError("channels: the header holds no channels by name; save the masks anew")
    found = {}
    for name, entry in stored.items():
        try:
            count, text = entry
            bits = torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
            found[name] = ops.unpack_mask(bits, (count,))
        except (TypeError, ValueError, RuntimeError) as error:
            raise MaskFormatError(
                f"channels: the entry of {name!r} is damaged; save the masks anew"
            ) from error
    return found
