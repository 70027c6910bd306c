"""Which backend is asked first, by operation, device and size: the one table of automatic choices.

A rule holds from `at_least` elements of the first tensor on; the last one that fits counts, and
rules of an operation overrule those of its device. A
backend that is not usable, or has no kernel for the operation or its dtype, passes to the next in
the order. `backend=` and `PAIKERN_BACKEND` overrule the table.

Each rule says what it rests on: a file under bench/results, or that nothing was measured yet, in
which case the order is that of the fewest launches and bytes. `make gpu-check` measures the
backends of a GPU side by side.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

__all__ = ["RULES", "Rule", "order", "size_class"]


class Rule(NamedTuple):
    device: str
    operation: str  # "" for every operation
    at_least: int
    order: tuple[str, ...]
    measured: str


RULES = (
    # bench/results/selection.json and paths.json: the native kernels win from the smallest sizes.
    Rule("cpu", "", 0, ("cpu", "reference"), "bench/results/paths.json"),
    Rule("cuda", "", 0, ("cuda", "triton", "cuda_jit", "reference"), "not yet measured"),
)


@functools.cache
def _fitting(operation: str, device: str) -> tuple[Rule, ...]:
    """The rules of an operation, or where it has none those of its device; small before large."""
    rules = [rule for rule in RULES if rule.device == device]
    own = [rule for rule in rules if rule.operation == operation]
    return tuple(sorted(own or [r for r in rules if not r.operation], key=lambda r: r.at_least))


def size_class(operation: str, device: str, numel: int) -> int:
    """Which of the rules fits, as a small number that callers may remember answers by."""
    rules = _fitting(operation, device)
    at = len(rules) - 1
    while at > 0 and numel < rules[at].at_least:
        at -= 1
    return at


def order(operation: str, device: str, size: int = 0) -> tuple[str, ...]:
    """The backends to ask, first to last, by `size_class`. A device without rules: the reference.

    Example:
        >>> order("topk_mask", "cuda")
        ('cuda', 'triton', 'cuda_jit', 'reference')
    """
    rules = _fitting(operation, device)
    return rules[size].order if rules else ("reference",)
