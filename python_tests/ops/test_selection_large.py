"""Selection among more than 2^31 scores, checked bit for bit in chunks.

4.3 GB of scores in float16, and below 12 GB for all of it; each test runs in a process of its own,
whose peak memory is asserted too.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from paikern import ops

ROOT = Path(__file__).parents[2]
SIZE = 2**31 + 1024
CHUNK = 2**24  # a multiple of 8: no two chunks share a byte of the mask
MOST_MEMORY = 12 * 10**9


def chunks(scores: Sequence[Tensor], masks: Sequence[Tensor]) -> Iterator[tuple[Tensor, bytes]]:
    """Stretches of the scores with their bytes of the masks, in global order."""
    for tensor, bits in zip(scores, masks, strict=True):
        assert bits.numel() == (tensor.numel() + 7) // 8
        for start in range(0, tensor.numel(), CHUNK):
            part = tensor[start : start + CHUNK]
            yield part, bits[start // 8 : (start + part.numel() + 7) // 8].numpy().tobytes()


def check(scores: Sequence[Tensor], masks: Sequence[Tensor], k: int) -> float:
    """The masks keep all above the k-th largest score, and the first of those equal to it."""
    threshold = ops.kth_largest(scores, k)
    above = equal = 0
    for part, _ in chunks(scores, masks):
        above += int((part > threshold).sum())
        equal += int((part == threshold).sum())
    assert above < k <= above + equal
    ties = k - above
    for part, bits in chunks(scores, masks):
        kept = (part > threshold).numpy()
        tied = np.flatnonzero((part == threshold).numpy())[:ties]
        kept[tied] = True
        ties -= tied.size
        assert bits == np.packbits(kept, bitorder="little").tobytes()
    assert ties == 0
    return threshold


def filled(size: int) -> Tensor:
    """Magnitudes in float16 without a temporary of that size: a stretch repeated, each time
    from another place, so that equal scores lie far apart."""
    scores = torch.empty(size, dtype=torch.float16)
    stretch = torch.randn(CHUNK + 4096, generator=torch.Generator().manual_seed(0)).abs().half()
    for index, start in enumerate(range(0, size, CHUNK)):
        part = scores[start : start + CHUNK]
        part.copy_(stretch[index * 7 : index * 7 + part.numel()])
    return scores


def one_tensor() -> None:
    scores = filled(SIZE)
    scores[2**31 :] = 100.0 + torch.arange(1024).half() / 8  # the largest, behind 2^31
    assert check([scores], ops.topk_mask(scores, 500), 500) >= 100.0
    for k in (SIZE // 10, 2**31 + 1000):
        check([scores], ops.topk_mask(scores, k), k)
    scores.fill_(0.5)
    check([scores], ops.topk_mask(scores, 2**31 + 5), 2**31 + 5)


def several_tensors() -> None:
    """One rank over tensors that pass 2^31 together; the same memory serves for all of them."""
    part = filled(2**29 + 1000)
    scores = [part, part[: 2**29 + 8], part[1:], part.reshape(-1, 8), part[:777]]
    total = sum(s.numel() for s in scores)
    assert total > 2**31 > max(s.numel() for s in scores)
    flat = [s.reshape(-1) for s in scores]
    for k in (total // 3, 2**31 + 50):
        check(flat, ops.topk_mask(scores, k), k)
    counts = [s.numel() // 5 for s in scores]
    for tensor, bits, count in zip(flat, ops.topk_mask(scores, counts), counts, strict=True):
        check([tensor], [bits], count)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one_tensor", "several_tensors"])
def test_selection_beyond_two_to_the_31(case: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "python_tests.ops.test_selection_large", case],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    print(f"peak {peak / 1e9:.2f} GB")
    assert peak < MOST_MEMORY


if __name__ == "__main__":
    {"one_tensor": one_tensor, "several_tensors": several_tensors}[sys.argv[1]]()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
