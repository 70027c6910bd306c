"""Every instruction set against the definition, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import torch
from paikern.backends import cpu
print(cpu.isa())
from python_tests.ops.path_cases import DTYPES, FEW, GEOMETRIES, Geometry, exact
from python_tests.ops import test_dpai_step as dpai
from python_tests.ops import test_path_backward as backward
from python_tests.ops import test_path_conv_backward as conv_backward
from python_tests.ops import test_path_conv_forward as conv_forward
from python_tests.ops import test_path_conv_kept as kept
from python_tests.ops import test_path_conv_score as conv_score
from python_tests.ops import test_path_forward as forward
from python_tests.ops import test_path_score as score
from python_tests.ops import test_path_sweep as sweep
torch.manual_seed(0)
for shape in ((31, 33), (257, 130)):
    for batch in (1, 3, 17):
        for density in (None, 0.1):
            forward.test_path_forward_equals_the_definition(shape, batch, density)
            backward.test_path_backward_equals_the_definition(shape, batch, density)
            for dtype in DTYPES:
                score.test_path_score_equals_the_definition(dtype, shape, batch, density)
    for dtype in DTYPES:
        for density in (None, 0.5):
            sweep.test_path_sweep_equals_the_definition(shape, dtype, density, ties=True)
for geometry in GEOMETRIES:
    for dtype in DTYPES:
        for density in (None, 0.1):
            for check in (conv_forward.check, conv_backward.check, conv_score.check):
                check(geometry, dtype, density, 1)
    for adam in (False, True):
        for transposed in (False, True):
            dpai.test_dpai_step_convolution_equals_the_reference(adam, geometry, transposed)
dpai.test_dpai_step_linear_equals_the_reference(True, (31, 33), 7, True)
for geometry in FEW:
    for dtype in DTYPES:
        for density in (None, 0.01, 0.1):
            for check in (conv_forward.check, conv_backward.check, conv_score.check):
                check(geometry, dtype, density, 1)
for geometry in kept.GEOMETRIES:
    kept.test_scores_on_both_sides_of_the_density(geometry, DTYPES[0])
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_path_kernels_of_each_instruction_set(isa: str) -> None:
    environment = {**os.environ, "PAIKERN_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    if run.stdout.strip() != isa:
        pytest.skip(f"this CPU has no {isa}: ran {run.stdout.strip()}")
