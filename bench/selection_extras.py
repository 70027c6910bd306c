"""What is timed beside the grid of the selection benchmark: layers, types, strides, factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import selection_contenders as who
from bench.references.nth_element import read_bytes
from bench.selection_contenders import Contender, contenders_for, measure
from bench.selection_data import BEYOND_INT32, kept_count, make_scores, repeated_scores, rows_of
from bench.timing import Row
from paikern import ops, zoo
from paikern.prunable import prunable_parameters

KEEP = 0.1
SIZE = 10_000_000
SIDES = (2500, 4000)  # of a matrix of SIZE


def cell(op: str, size: int, threads: int, **more: Any) -> dict[str, Any]:
    """What a row says about the work, whoever does it."""
    torch.set_num_threads(threads)
    usual = {"distribution": "normal", "keep": KEEP, "dtype": "float32", "layout": "contiguous"}
    return {"op": op, "size": size, "threads": threads, **usual, **more}


def timed(
    work: dict[str, Any], ours: Callable[[], object], rivals: dict[str, Callable[[], object]]
) -> list[Row]:
    """Time paikern against the rivals, and return a row for each of these."""
    contenders = {who.OURS: Contender(ours)}
    contenders |= {name: Contender(action) for name, action in rivals.items()}
    return rows_of(work, measure(contenders))


def kth(scores: Tensor, k: int) -> object:
    return torch.kthvalue(scores, scores.numel() - k + 1)


def resnet20(threads: int) -> list[Row]:
    """The layers of a ResNet-20 in one call, 20 and two shortcuts: a k each, one k over all."""
    model = zoo.create("resnet20", seed=0)
    weights = dict(model.named_parameters())
    layers = [weights[name].detach().abs().flatten() for name in prunable_parameters(model)]
    counts = [kept_count(s.numel(), KEEP) for s in layers]
    size = sum(s.numel() for s in layers)
    k = kept_count(size, KEEP)
    about = {"distribution": f"{len(layers)} layers of ResNet-20"}

    def each(function: Callable[[Tensor, int], object]) -> Callable[[], object]:
        return lambda: [function(s, n) for s, n in zip(layers, counts, strict=True)]

    def partition(scores: Tensor, k: int) -> object:
        return np.partition(scores.numpy(), scores.numel() - k)

    return [
        *timed(
            cell("topk_mask", size, threads, layout="a k each", **about),
            lambda: ops.topk_mask(layers, counts),
            {
                "torch.kthvalue of each": each(kth),
                "torch.topk of each": each(torch.topk),
                "np.partition of each": each(partition),
            },
        ),
        *timed(
            cell("topk_mask", size, threads, layout="one k over all", **about),
            lambda: ops.topk_mask(layers, k),
            {
                "torch.cat, torch.kthvalue": lambda: kth(torch.cat(layers), k),
                "torch.cat, torch.topk": lambda: torch.topk(torch.cat(layers), k),
                "torch.cat, np.partition": lambda: partition(torch.cat(layers), k),
            },
        ),
    ]


def dtypes(threads: int) -> list[Row]:
    """The types other than float32."""
    rows = []
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        scores = make_scores("normal", SIZE, dtype)
        k = kept_count(SIZE, KEEP)
        names = [who.TOPK, who.KTHVALUE, *who.FLOORS]
        if dtype != torch.bfloat16:  # NumPy has no such type
            names.append(who.PARTITION)
        work = cell("topk_mask", SIZE, threads, dtype=str(dtype).removeprefix("torch."))
        rows += rows_of(work, measure(contenders_for(scores, k, names)))
    return rows


def strides(threads: int) -> list[Row]:
    """A matrix read along its columns; the others need it copied first."""
    scores = make_scores("normal", SIZE).reshape(SIDES).T
    k = kept_count(SIZE, KEEP)
    return timed(
        cell("topk_mask", SIZE, threads, layout="transposed"),
        lambda: ops.topk_mask(scores, k),
        {
            "flatten, torch.kthvalue": lambda: kth(scores.flatten(), k),
            "flatten, torch.topk": lambda: torch.topk(scores.flatten(), k),
            "flatten, np.partition": lambda: np.partition(scores.flatten().numpy(), SIZE - k),
            who.READ: lambda: read_bytes(scores.T, threads),
        },
    )


def magnitudes(threads: int) -> list[Row]:
    """Signed weights ranked by magnitude; the others need the magnitudes made first."""
    signed = make_scores("normal", SIZE)
    signed[::2].neg_()
    k = kept_count(SIZE, KEEP)
    return timed(
        cell("topk_mask", SIZE, threads, layout="absolute=True"),
        lambda: ops.topk_mask(signed, k, absolute=True),
        {
            "abs, torch.kthvalue": lambda: kth(signed.abs(), k),
            "abs, torch.topk": lambda: torch.topk(signed.abs(), k),
            "abs, np.partition": lambda: np.partition(np.abs(signed.numpy()), SIZE - k),
            who.READ: lambda: read_bytes(signed, threads),
        },
    )


def factored(threads: int) -> list[Row]:
    """|w|^p * a * g without the scores; the others need them made first."""
    rows, columns = SIDES
    generator = torch.Generator().manual_seed(0)
    weight = make_scores("normal", SIZE).reshape(SIDES)
    a, g = torch.rand(columns, generator=generator), torch.rand(rows, generator=generator)
    k = kept_count(SIZE, KEEP)

    def compared(power: int) -> list[Row]:
        def scores() -> Tensor:
            powered = weight.abs() if power == 1 else weight * weight
            return ((powered * a) * g[:, None]).flatten()

        return timed(
            cell("topk_mask_factored", SIZE, threads, distribution=f"abs(normal)^{power} a g"),
            lambda: ops.topk_mask_factored([weight], [a], [g], [0], k, power=power),
            {
                "scores, torch.kthvalue": lambda: kth(scores(), k),
                "scores, np.partition": lambda: np.partition(scores().numpy(), SIZE - k),
                "scores, topk_mask": lambda: ops.topk_mask(scores(), k),
                who.READ: lambda: read_bytes(weight, threads),
            },
        )

    return [*compared(1), *compared(2)]


def kth_largest(threads: int) -> list[Row]:
    """The threshold alone."""
    scores = make_scores("normal", SIZE)
    k = kept_count(SIZE, KEEP)
    return timed(
        cell("kth_largest", SIZE, threads),
        lambda: ops.kth_largest(scores, k),
        {
            who.KTHVALUE: lambda: kth(scores, k),
            who.PARTITION: lambda: np.partition(scores.numpy(), SIZE - k),
            who.READ: lambda: read_bytes(scores, threads),
        },
    )


EXTRAS: dict[str, Callable[[int], list[Row]]] = {
    "ResNet-20": resnet20,
    "dtypes": dtypes,
    "strides": strides,
    "magnitudes": magnitudes,
    "factored": factored,
    "kth_largest": kth_largest,
}


def beyond_int32(threads: int) -> list[Row]:
    """More than 2^31 scores: how long, and whether exactly k are kept."""
    scores = repeated_scores(BEYOND_INT32)
    k = kept_count(BEYOND_INT32, KEEP)
    (bits,) = ops.topk_mask(scores, k)
    kept = int(np.bitwise_count(bits.numpy()).sum(dtype=np.int64))
    return timed(
        cell("topk_mask", BEYOND_INT32, threads, dtype="float16", wanted=k, kept=kept),
        lambda: ops.topk_mask(scores, k),
        {who.READ: lambda: read_bytes(scores, threads)},
    )
