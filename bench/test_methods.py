"""Whole pruning runs under pytest-benchmark: `pytest bench/test_methods.py`.

The same runs as in `python -m bench`, in one process, without time limits: for work on one method.
`--benchmark-compare` of pytest-benchmark sets a run beside an earlier one.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.comparison_cases import METHODS, OURS, REFERENCE, Effort, prepared, quality, run

EFFORT = Effort(dpai_steps=30, synflow_rounds=30)
SPARSITY = 0.9


@pytest.mark.parametrize("who", [OURS, REFERENCE])
@pytest.mark.parametrize("name", ["lenet300", "resnet20"])
@pytest.mark.parametrize("method", METHODS)
def test_whole_run(benchmark: BenchmarkFixture, method: str, name: str, who: str) -> None:
    subject = prepared(name)
    benchmark.group = f"{method} {name}"

    def act() -> object:
        return run(who, method, name, subject, SPARSITY, EFFORT, lambda *_: None)

    masks = benchmark.pedantic(act, rounds=3, warmup_rounds=1)
    found = quality(subject, masks)
    assert found.kept == pytest.approx(subject.weights * (1 - SPARSITY), rel=0.01)
    assert found.log_paths is not None


@pytest.mark.parametrize("name", ["vgg19_bn", "resnet18@64"])
@pytest.mark.parametrize("method", METHODS)
def test_larger_networks(benchmark: BenchmarkFixture, method: str, name: str) -> None:
    subject = prepared(name)
    benchmark.group = f"{method} {name}"

    def act() -> object:
        return run(OURS, method, name, subject, SPARSITY, EFFORT, lambda *_: None)

    masks = benchmark.pedantic(act, rounds=2, warmup_rounds=1)
    assert quality(subject, masks).log_paths is not None
