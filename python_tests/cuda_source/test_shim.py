"""The shim refuses what a GPU would hang on, and an AddressSanitizer build finds stray accesses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from python_tests.cuda_source import shim

pytestmark = pytest.mark.cuda_source
SELECT = """
import torch
from paikern import ops
from paikern.backends import cuda
from paikern.backends.cuda_layers import dense
from paikern.backends.cuda_launch import provided
from paikern.backends.cuda_select import SelectionPlan
from python_tests.cuda_source import shim

with provided(shim.OnCpu(shim.build(sanitize=True))):
    {body}
"""
GOOD = """
    for sizes in ([0, 1, 31, 33], [8191], [8193, 1000], [20_000, 7]):
        scores = [torch.randn(n).round(decimals=1) for n in sizes]
        for k in (1, sum(sizes) // 3):
            found = cuda.topk_mask(scores, [k], [], False, [], None)
            assert all(map(torch.equal, found, ops.topk_mask(scores, k)))
        halves = [s.bfloat16() for s in scores]
        masks = [ops.pack_mask(s > -1) for s in scores]
        k = [s.numel() // 2 for s in scores]
        cuda.topk_mask(halves, k, [], True, masks, None)
        cuda.topk_mask_product(scores, halves, masks, k)
    for rows, columns in ((1, 1), (33, 31), (3, 3001)):
        w, a, g = torch.randn(rows, columns).half(), torch.rand(columns), torch.rand(rows)
        kept = ops.pack_mask(w > -1)
        cuda.topk_mask_factored([w], [a], [g], [kept], [0], [w.numel() // 2], 2, [])
        cuda.nm_mask_factored([w], [a], [g], [kept], 2, 4, [1], 1)
        cuda.nm_mask([w, w.double()], 3, 7, [0, 1], True)
        blocks = cuda.block_means_factored(w, a, g, kept, (3, 20), 1)
        cuda.expand_blocks(ops.pack_mask(blocks > 0), w.shape, (3, 20))
        cuda.apply_mask_(w, kept)
    w, x, g = torch.randn(4, 3, 3, 3), torch.rand(2, 3, 5, 7), torch.rand(2, 4, 3, 7)
    cuda.topk_mask_factored([w], [x], [g], [], [0], [50], 1, [2, 1, 1, 1, 1, 1, 1])
    print("equal")
"""
BAD = """
    scores = torch.empty(8193)[:8192].clone()
    (layer,) = dense([scores], (), False)
    plan = SelectionPlan([layer._replace(bits=torch.empty(1020).byte())], [9])
    plan.launch()
"""


def sanitized(body: str) -> subprocess.CompletedProcess[str]:
    library = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return subprocess.run(
        [sys.executable, "-c", SELECT.format(body=body.strip())],
        cwd=shim.ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": library,
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "PYTHONPATH": str(shim.ROOT),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )


def test_the_shim_refuses_what_would_hang(tmp_path: Path, on_cpu: shim.OnCpu) -> None:
    program = tmp_path / "check"
    source = Path(__file__).with_name("refusals.cpp")
    command = ["g++", "-std=c++20", "-O1", *shim.WARNINGS, f"-I{shim.ROOT / 'csrc/testing'}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "ok", done.stdout + done.stderr


@pytest.mark.slow
def test_kernels_touch_nothing_else() -> None:
    done = sanitized(GOOD)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


@pytest.mark.slow
def test_a_stray_write_is_named() -> None:
    done = sanitized(BAD)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "pk_store_word" in done.stderr
