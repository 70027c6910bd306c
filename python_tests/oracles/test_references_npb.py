"""The plain NPB: its programs have the objective of the exact solver, its masks the budgets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import paikern as pk
from bench.references.npb import NotFinishedError, Program, npb, solve
from paikern import zoo
from paikern.budget import layer_budget
from paikern.scorers.npb_program import LayerProgram


def ours(program: Program) -> LayerProgram:
    return LayerProgram(
        program.paths[None], program.outputs, np.array([program.budget]),
        np.array([program.capacity]), np.array([program.least]), program.alpha, program.beta,
    )  # fmt: skip


def test_programs_have_our_objective() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        inputs, outputs, positions = (int(n) for n in rng.integers(1, (9, 9, 5)))
        b = int(rng.integers(1, inputs * outputs * positions + 1))
        capacity = int(rng.integers(-(-b // (inputs * outputs)), positions + 1))
        program = Program(
            rng.random(inputs) + 0.01, outputs, b, capacity, int(rng.integers(1, capacity + 1)),
            float(rng.random()), float(rng.random() * 2),
        )  # fmt: skip
        entries = solve(program)
        assert entries.min() >= 0
        assert entries.max() <= capacity
        assert entries.sum() <= b
        best = ours(program).solve().value[0]
        assert program.objective(entries) == pytest.approx(best, abs=1e-4 * max(abs(best), 1))


def test_resnet20() -> None:
    net, x = zoo.create("resnet20", image_size=16), (1, 3, 16, 16)
    before = {n: p.clone() for n, p in net.named_parameters()}
    seen: list[tuple[int, int]] = []
    masks = npb(net, x, 0.9, chunk_above=64 * 32, report=lambda *at: seen.append(at))
    shapes = {n: tuple(m.shape) for n, m in masks.items()}
    assert [int(m.sum()) for m in masks.values()] == layer_budget(shapes, 0.9, "erk")
    assert seen == [(i, 27) for i in range(1, 28)]
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    example = torch.ones(x)
    plain = pk.analyze(net, pk.MaskSet.from_bool(masks), example_inputs=example)
    found = pk.prune(net, "npb", sparsity=0.9, example_inputs=example, apply=False)
    top = pk.analyze(net, found, example_inputs=example)
    # The optima differ (HiGHS takes some vertex, ours has even outputs), their worth does not.
    assert plain.effective_nodes == top.effective_nodes == 794
    assert plain.effective_kernels == pytest.approx(top.effective_kernels, rel=0.01)
    assert plain.log_paths == pytest.approx(top.log_paths, abs=1.0)


def test_groups_and_pieces_share_the_budget() -> None:
    net = nn.Sequential(
        nn.Conv2d(6, 12, 3, groups=3), nn.Conv2d(12, 7, 1), nn.Flatten(), nn.Linear(7 * 4, 3)
    )
    masks = npb(net, (1, 6, 4, 4), 0.6, chunk=3, chunk_above=5)
    shapes = {n: tuple(m.shape) for n, m in masks.items()}
    assert [int(m.sum()) for m in masks.values()] == layer_budget(shapes, 0.6, "erk")
    assert not masks["1.weight"][6:].all()


def test_time_limit() -> None:
    net = nn.Sequential(nn.Conv2d(100, 100, 3), nn.Flatten(), nn.Linear(100, 4))
    with pytest.raises(NotFinishedError, match=r"not finished in 0.2 s: layer 1 of 2, 0\.weight"):
        npb(net, (1, 100, 3, 3), 0.9, time_limit=0.2)
    assert issubclass(NotFinishedError, TimeoutError)
    assert math.isinf(npb.__kwdefaults__["time_limit"])
