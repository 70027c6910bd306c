"""Structured masks are the same, bit for bit, on every instruction set and number of threads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from paikern import ops
from paikern.backends import registry
from python_tests.ops.pattern_cases import laid_out
from python_tests.ops.selection_cases import DTYPES, make_scores

ROOT = Path(__file__).parents[2]
SHAPES = ((130, 1040), (90, 33, 5, 5), (7, 20_003))


def digest(threads: int) -> str:
    """Over masks and means of every type, orientation, and kind of block."""
    torch.set_num_threads(threads)
    found = hashlib.sha256()
    for shape in SHAPES:
        for dtype in DTYPES:
            generator = np.random.default_rng(8)
            size = int(np.prod(shape))
            flat = make_scores(generator, size, "ties", dtype, "contiguous").reshape(shape)
            plain = make_scores(generator, size, "plain", dtype, "contiguous").reshape(shape)
            for layout in ("contiguous", "transposed", "channels_last"):
                scores = laid_out(flat, layout)
                for n, m in ((1, 2), (2, 4), (4, 8), (3, 16), (2, 5), (9, 30)):
                    for dim in (0, 1):
                        (bits,) = ops.nm_mask(scores, n, m, dims=dim, absolute=True)
                        found.update(bits.numpy().tobytes())
                for block in ((16, 16), (1, 10**9), (10**9, 1), (3, 25)):
                    means = ops.block_means(laid_out(plain, layout), block)
                    found.update(means.numpy().tobytes())
                    kept = ops.topk_mask(means, means.numel() // 2)[0]
                    found.update(ops.expand_blocks(kept, shape, block).numpy().tobytes())
    a, g = torch.rand(1040), torch.rand(130)
    for dtype in DTYPES[:3]:
        weight = torch.randn(130, 1040, generator=torch.Generator().manual_seed(1)).to(dtype)
        candidates = ops.topk_mask(weight, 70_000)[0]
        (bits,) = ops.nm_mask_factored([weight], [a], [g], 2, 4, power=2, masks=[candidates])
        found.update(bits.numpy().tobytes())
        means = ops.block_means_factored(weight, a, g, (16, 16), mask=candidates)
        found.update(means.numpy().tobytes())
    return found.hexdigest()


CODE = """
import torch
from paikern.backends import cpu
from python_tests.ops.test_pattern_isa import digest
torch.manual_seed(0); one = digest(1)
torch.manual_seed(0); two = digest(2)
print(cpu.isa(), one, two)
"""


@pytest.fixture(scope="module")
def expected_digest() -> str:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    try:
        with registry.using("reference"):
            return digest(threads)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_structured_masks_on_each_instruction_set_and_thread_count(
    isa: str, expected_digest: str
) -> None:
    environment = {**os.environ, "PAIKERN_CPU_ISA": isa, "OMP_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    used, one, two = run.stdout.split()
    if used != isa:
        pytest.skip(f"this CPU has no {isa}: ran {used}")
    assert one == two == expected_digest


def test_structured_masks_are_the_same_every_time() -> None:
    scores = torch.randn(300, 1000).round(decimals=1)
    wanted = ops.nm_mask(scores, 2, 4)[0], ops.block_means(scores, (16, 16))
    for _ in range(100):
        assert torch.equal(ops.nm_mask(scores, 2, 4)[0], wanted[0])
        assert torch.equal(ops.block_means(scores, (16, 16)), wanted[1])
