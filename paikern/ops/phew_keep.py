"""phew_keep_: set the bits of walks in their order until a budget is met."""

from __future__ import annotations

import torch
from torch import Tensor

from paikern.ops._library import define, fake, run

STATE = ("kept", "walks", "window_new", "window_skipped", "skipped", "status")
WALKING, FULL, STALLED, TOO_LONG = range(4)

define(
    "phew_keep_(Tensor(a!) bits, Tensor(b!) state, Tensor walks, int target, int stall, "
    "bool exact) -> ()"
)


@fake("phew_keep_")
def _shape(*args: object) -> None:
    return None


def phew_keep_(
    bits: Tensor, state: Tensor, walks: Tensor, *, target: int, stall: int = 1, exact: bool = True
) -> None:
    """Set the bits of `walks`, row by row, until `target` are set.

    With `exact`, a walk whose new bits are more than are missing is skipped, so that all bits
    belong to whole walks. Where 1000 walks, counted from a multiple of 1000, bring fewer than
    `stall` new bits, nothing more is kept: either walks repeat themselves (status 2) or those that
    do not are too long for what is missing (status 3).

    Args:
        bits: uint8, as `pack_mask` orders them; written.
        state: int64 `[6]`, written: kept (the bits already set), walks, new bits and skipped walks
            since the last multiple of 1000, skipped walks, status (0 going on, 1 full, 2, 3).
            Start with zeros but `kept`.
        walks: int64 `[count, width]` from `phew_walks`.
        target: bits to keep.
        stall: see above.
        exact: False keeps all of the walk that reaches `target`.

    Raises:
        ValueError: other dtypes or shapes, or a bit outside of `bits`.

    Source: specification of PHEW, sections 5 and 7.

    Example:
        >>> import torch
        >>> bits, state = torch.zeros(1, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
        >>> phew_keep_(bits, state, torch.tensor([[0, 3], [3, 5], [0, 1]]), target=3)
        >>> bits.tolist(), state.tolist()
        ([41], [3, 2, 3, 0, 0, 1])
    """
    if bits.dtype != torch.uint8 or bits.dim() != 1 or not bits.is_contiguous():
        raise ValueError(f"phew_keep_: bits must be contiguous uint8 [n], got {bits.dtype}")
    if state.dtype != torch.int64 or state.shape != (len(STATE),) or not state.is_contiguous():
        raise ValueError(f"phew_keep_: state must be int64 [{len(STATE)}]")
    if walks.dtype != torch.int64 or walks.dim() != 2:
        raise ValueError(f"phew_keep_: walks must be int64 [count, width], got {walks.dtype}")
    if walks.numel() and int(walks.amax()) >= 8 * bits.numel():
        raise ValueError(
            f"phew_keep_: walks hold bit {int(walks.amax())}, bits has {8 * bits.numel()}"
        )
    run("phew_keep_", [bits, state, walks], bits, state, walks, target, stall, exact)
