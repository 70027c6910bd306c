"""topk_mask: the exact mask of the k largest scores, as bits."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from paikern.backends.errors import NanInTensorError
from paikern.errors import NonFiniteScoreError
from paikern.ops._library import define, fake, of_gpu_array, run
from paikern.ops.unpack_mask import check_packed

define(
    "topk_mask(Tensor[] scores, int[] k, int[] exponents, bool absolute, Tensor[] masks, "
    "Tensor? memory) -> Tensor[]"
)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@fake("topk_mask")
def _shape(
    scores: Sequence[Tensor],
    k: Sequence[int],
    exponents: Sequence[int],
    absolute: bool,
    masks: Sequence[Tensor],
    memory: Tensor | None,
) -> list[Tensor]:
    bits = [s.new_empty((s.numel() + 7) // 8, dtype=torch.uint8) for s in scores]
    return bits if memory is None else [*bits, torch.empty_like(memory)]


def topk_mask(
    scores: Tensor | Sequence[Tensor],
    k: int | Sequence[int],
    *,
    exponents: Sequence[int] | None = None,
    absolute: bool = False,
    masks: Sequence[Tensor | None] | None = None,
    memory: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """Packed masks that keep exactly the k largest scores.

    The order is (score descending, global index ascending), the global index being the position in
    the list, then row-major: ties are broken the same way on every machine.

    Args:
        scores: a tensor or a list, float32, float16, bfloat16 or float64, any shapes. Signed
            values are compared.
        k: one number: that many over all tensors together. A list: that many in each.
        exponents: tensor l counts as `scores[l] * 2**exponents[l]`, exactly: nothing overflows or
            is rounded. Negative scores rank below the others, whatever the exponents.
        absolute: compare magnitudes.
        masks: packed masks of the candidates, or None each: other weights rank with -infinity, and
            NaN among them does not count.
        memory: float64 `[rankings, 2]` of NaN at first (one ranking, or one a tensor where k is a
            list), given again in every round of an iterative method: where the threshold was and
            how far it moved, which is where the next round looks first. It is updated in place.
            The masks do not depend on it. Left alone where exponents differ.
        names: of the tensors, for errors.

    Returns:
        One uint8 tensor `[ceil(numel / 8)]` for each tensor (see `pack_mask`).

    Raises:
        ValueError: k out of range, or lists of different length.
        NonFiniteScoreError: NaN, named. Infinities rank by value. -0 equals +0.

    Example:
        >>> import torch
        >>> topk_mask(torch.tensor([0.5, 2.0, 2.0, 1.0]), 1)
        [tensor([2], dtype=torch.uint8)]
    """
    tensors = check_scores("topk_mask", scores)
    counts = check_counts("topk_mask", k, [t.numel() for t in tensors])
    shifts = check_exponents("topk_mask", exponents, len(tensors))
    candidates = check_masks("topk_mask", masks, tensors)
    check_names("topk_mask", names, len(tensors))
    if memory is not None and (
        memory.shape != (len(counts), 2)
        or memory.dtype != torch.float64
        or not memory.is_contiguous()
    ):
        raise ValueError(
            f"topk_mask: memory must be a contiguous float64 tensor of shape ({len(counts)}, 2), "
            f"got {memory.dtype} {tuple(memory.shape)}"
        )
    if not tensors:
        return []
    with named_nan(names):
        held = [*tensors, *candidates] if memory is None else [*tensors, *candidates, memory]
        made = run("topk_mask", held, tensors, counts, shifts, absolute, candidates, memory)
    if memory is not None:
        memory.copy_(made.pop())
    return made


def check_scores(operation: str, scores: Tensor | Sequence[Tensor]) -> list[Tensor]:
    scores = of_gpu_array(scores)
    tensors = [scores] if isinstance(scores, Tensor) else [of_gpu_array(s) for s in scores]
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{operation}: scores must be a tensor or a list of tensors, got "
                f"{type(tensor).__name__} at {index}; wrap arrays with torch.from_numpy"
            )
        if tensor.dtype not in _FLOATS:
            raise TypeError(
                f"{operation}: scores[{index}] must be a float tensor, got {tensor.dtype}"
            )
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"{operation}: scores[{index}] must be dense, got {tensor.layout}; use to_dense()"
            )
    return tensors


def check_counts(operation: str, k: int | Sequence[int], sizes: Sequence[int]) -> list[int]:
    """One count over everything, or one for each tensor."""
    one = as_integer(k)
    if one is not None:
        total = sum(sizes)
        if not 0 <= one <= total:
            raise ValueError(f"{operation}: k must be in [0, {total}], got {one}")
        return [one]
    counts = as_integers(k)
    if counts is None:
        raise TypeError(
            f"{operation}: k must be an integer, or a list of one for each tensor, got {k!r}"
        )
    if len(counts) != len(sizes):
        raise ValueError(f"{operation}: {len(counts)} values of k for {len(sizes)} tensors")
    for index, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        if not 0 <= count <= size:
            raise ValueError(f"{operation}: k[{index}] must be in [0, {size}], got {count}")
    return counts


def as_integer(value: object) -> int | None:
    """A Python, NumPy or torch integer; None for anything else."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def as_integers(values: object) -> list[int] | None:
    if isinstance(values, str) or not isinstance(values, Iterable):
        return None
    found = [as_integer(value) for value in values]
    return None if None in found else found  # type: ignore[return-value]


def check_exponents(operation: str, exponents: Sequence[int] | None, count: int) -> list[int]:
    """The exponents above the lowest: only differences matter."""
    if exponents is None:
        return []
    shifts = as_integers(exponents)
    if shifts is None:
        raise TypeError(f"{operation}: exponents must be integers, got {exponents!r}")
    if shifts and len(shifts) != count:
        raise ValueError(f"{operation}: {len(shifts)} exponents for {count} tensors")
    lowest = min(shifts, default=0)
    if shifts and max(shifts) - lowest > 1_000_000:
        raise ValueError(f"{operation}: exponents differ by more than 1000000: {shifts}")
    return [shift - lowest for shift in shifts]


def check_masks(
    operation: str, masks: Sequence[Tensor | None] | None, tensors: Sequence[Tensor]
) -> list[Tensor]:
    """The masks with an empty tensor for None; nothing where there is none at all."""
    if masks is None or all(m is None for m in masks):
        return []
    if len(masks) != len(tensors):
        raise ValueError(f"{operation}: {len(masks)} masks for {len(tensors)} tensors")
    held = [of_gpu_array(mask) for mask in masks]
    for mask, tensor in zip(held, tensors, strict=True):
        if mask is not None:
            check_packed(operation, mask, tensor.numel())
    none = torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
    return [none if m is None else m for m in held]


def check_names(operation: str, names: Sequence[str] | None, count: int) -> None:
    if names is not None and len(names) != count:
        raise ValueError(f"{operation}: {len(names)} names for {count} tensors")


class named_nan:  # noqa: N801, a context manager; as a generator it took 1 us of a call of 15
    """Put the parameter's name into what a backend says about NaN."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self.names = names

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.names is not None and isinstance(error, NanInTensorError):
            raise NonFiniteScoreError(
                f"{error.operation}: the scores of {self.names[error.index]} hold NaN, which has "
                "no rank"
            ) from None
