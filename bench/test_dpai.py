"""The DPaI step keeps its distance to the plain PyTorch step, and its masks.

OMP_NUM_THREADS=2 python -m pytest bench/test_dpai.py
"""

from __future__ import annotations

import pytest

from bench.run_dpai import compare_steps

#: Least speed-up on 2 cores of a machine that does nothing else.
FLOORS = {"resnet20": 8.0, "vgg19_bn": 10.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOORS)
def test_step_against_plain_pytorch(name: str) -> None:
    row = compare_steps(name)
    assert row["mask_agreement"] >= 0.999
    assert row["ratio"] >= FLOORS[name], row
