"""The exact layer program against HiGHS, the LP bound, its definition and its own certificate."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paikern import ops
from paikern.scorers.npb_program import LayerProgram
from python_tests.scorers.npb_milp import highs, value_of


def program(
    paths: object,
    outputs: int,
    budget: int,
    *,
    capacity: int = 1,
    least: int = 1,
    alpha: float = 0.01,
    beta: float = 1.0,
    row_cap: int | None = None,
    column_cap: int | None = None,
) -> LayerProgram:
    def one(n: int | None) -> np.ndarray | None:
        return None if n is None else np.array([n])

    return LayerProgram(
        np.atleast_2d(np.asarray(paths, float)),
        outputs,
        np.array([budget]),
        np.array([capacity]),
        np.array([least]),
        alpha,
        beta,
        one(row_cap),
        one(column_cap),
    )


def entries_of(found: LayerProgram, rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """The kernels that `balanced_mask` makes of row sums, `[inputs, outputs]`."""
    shape = (found.outputs, found.inputs, int(found.capacity[0]))
    bits = ops.balanced_mask(torch.from_numpy(rows[0].copy()), shape, seed=seed)
    return ops.unpack_mask(bits, shape).sum(2).T.numpy()


def random_program(rng: np.random.Generator, caps: bool = False) -> LayerProgram:
    inputs, outputs, positions = (int(n) for n in rng.integers(1, (7, 7, 4)))
    b = int(rng.integers(1, inputs * outputs * positions + 1))
    needed = -(-b // (inputs * outputs))
    capacity = int(rng.integers(needed, positions + 1))
    paths = rng.choice([rng.integers(0, 5, inputs).astype(float), rng.random(inputs)])
    paths[rng.integers(inputs)] += 1.0
    return program(
        paths,
        outputs,
        b,
        capacity=capacity,
        least=int(rng.integers(1, capacity + 1)),
        alpha=float(rng.choice([0.0, 0.01, 0.5, 0.99, 1.0, rng.random()])),
        beta=float(rng.choice([0.0, 0.001, 1.0, 2.0, rng.random()])),
        row_cap=int(rng.integers(1, outputs * capacity + 1)) if caps else None,
        column_cap=int(rng.integers(1, inputs * capacity + 1)) if caps else None,
    )


def test_worked_example_and_its_crossover() -> None:
    """Row 0 whole is worth .75 alpha + 1 - alpha, the diagonal alpha + 2/3 (1 - alpha)."""
    for alpha, rows, value in ((0.5, [2, 0], 0.875), (0.75, [1, 1], 0.75 + 0.5 / 3)):
        found = program([3, 1], 2, 2, alpha=alpha, beta=0.0).solve()
        assert found.rows.tolist() == [rows]
        assert found.value[0] == pytest.approx(value, abs=1e-12)
    below, above = 4 / 7 - 1e-9, 4 / 7 + 1e-9
    assert program([3, 1], 2, 2, alpha=below, beta=0.0).solve().rows.tolist() == [[2, 0]]
    assert program([3, 1], 2, 2, alpha=above, beta=0.0).solve().rows.tolist() == [[1, 1]]


@pytest.mark.parametrize("caps", [False, True])
def test_equals_highs_on_random_programs(caps: bool) -> None:
    rng = np.random.default_rng(7 + caps)
    ratios = []
    for number in range(120):
        small = random_program(rng, caps)
        found = small.solve()
        assert found.rows.sum() == small.total[0] <= small.budget[0]
        value = value_of(small, entries_of(small, found.rows, number))
        assert value == pytest.approx(found.value[0], abs=1e-12)
        assert found.bound[0] == pytest.approx(value, abs=1e-12)
        best = highs(small)
        # Programs with a large penalty on empty kernels have a negative optimum.
        ratios.append((value - best) / max(abs(best), 1.0))
    assert min(ratios) > -1e-6
    assert max(ratios) < 1e-6


@pytest.mark.parametrize(
    ("alpha", "beta"),
    list(itertools.product((0.0, 0.01, 0.5, 0.99, 1.0), (0.0, 0.001, 1.0, 2.0))),
)
def test_equals_highs_over_the_grid(alpha: float, beta: float) -> None:
    """Densities and kernel sizes of real layers, scaled down: 6 programs a point, 120 in all."""
    rng = np.random.default_rng(3)
    for density, positions in itertools.product((0.05, 0.3, 0.7), (1, 9)):
        inputs, outputs = 6, 8
        b = max(1, int(density * inputs * outputs * positions))
        capacity = max(-(-b // (inputs * outputs)), min(5, positions))
        grid = program(
            rng.lognormal(0, 1, inputs), outputs, b, capacity=capacity, alpha=alpha, beta=beta
        )
        found, best = grid.solve(), highs(grid)
        value = value_of(grid, entries_of(grid, found.rows))
        assert abs(value - best) <= 1e-6 * max(abs(best), 1.0)


@pytest.mark.parametrize(
    ("inputs", "outputs", "positions", "density"), [(128, 256, 9, 0.1), (64, 512, 1, 0.02)]
)
def test_large_layers_reach_the_lp_bound(
    inputs: int, outputs: int, positions: int, density: float
) -> None:
    rng = np.random.default_rng(5)
    b = int(density * inputs * outputs * positions)
    large = program(rng.lognormal(0, 2, inputs), outputs, b, capacity=positions, alpha=0.3)
    found = large.solve()
    value = value_of(large, entries_of(large, found.rows))
    relaxed = highs(large, integer=False)
    assert value == pytest.approx(relaxed, abs=1e-7)
    assert found.bound[0] == pytest.approx(value, abs=1e-9)


@given(seed=st.integers(0, 2**32 - 1), caps=st.booleans(), scale=st.floats(1e-30, 1e30))
@settings(max_examples=200, deadline=None)
def test_certificate_scale_and_neighbours(seed: int, caps: bool, scale: float) -> None:
    rng = np.random.default_rng(seed)
    small = random_program(rng, caps)
    found = small.solve()
    assert (found.rows >= 0).all()
    assert found.bound[0] == pytest.approx(found.value[0], abs=1e-9)
    # Any price is a bound, and no other row sums are better.
    assert small.bound(np.array([rng.random()]))[0] >= found.value[0] - 1e-9
    rows = found.rows.copy()
    source, target = rng.integers(small.inputs, size=2)
    most = small.outputs * small.capacity[0]
    if small.row_cap is not None:
        most = min(most, small.row_cap[0])
    if rows[0, source] > 0 and rows[0, target] < most:
        rows[0, source] -= 1
        rows[0, target] += 1
        assert small.value(rows)[0] <= found.value[0] + 1e-12
    scaled = LayerProgram(**{**vars(small), "paths": small.paths * scale}).solve()
    assert scaled.value[0] == pytest.approx(found.value[0], abs=1e-9)


@pytest.mark.parametrize("b", [1, 3, 5, 8, 30])
def test_extremes_of_alpha(b: int) -> None:
    paths = [5.0, 1.0, 4.0, 2.0, 3.0]
    nodes = program(paths, 6, b, alpha=1.0, beta=0.0)
    entries = entries_of(nodes, nodes.solve().rows)
    assert (entries.sum(1) > 0).sum() + (entries.sum(0) > 0).sum() == min(5, b) + min(6, b)
    only = program(paths, 6, b, alpha=0.0, beta=0.0)
    found = only.solve()
    assert found.value[0] == pytest.approx(1.0, abs=1e-12)
    full, rest = divmod(b, 6)
    expected = np.zeros(5, int)
    expected[[0, 2, 4, 3, 1][:full]] = 6
    if rest:
        expected[[0, 2, 4, 3, 1][full]] = rest
    assert found.rows[0].tolist() == expected.tolist()


def test_equal_rows_share_evenly_and_the_lower_get_more() -> None:
    found = program([1, 1, 1, 1], 4, 6, capacity=9).solve()
    assert found.rows.tolist() == [[2, 2, 1, 1]]
    assert program([2, 1, 1], 4, 7, beta=0.0).solve().rows.tolist() == [[4, 2, 1]]


def test_groups_are_programs_of_their_own() -> None:
    rng = np.random.default_rng(0)
    paths, budget = rng.random((3, 5)), np.array([4, 5, 9])
    capacity, least = np.array([1, 2, 2]), np.array([1, 1, 2])
    together = LayerProgram(paths, 4, budget, capacity, least, 0.2, 0.5).solve()
    for g in range(3):
        alone = program(
            paths[g], 4, int(budget[g]), capacity=int(capacity[g]), least=int(least[g]),
            alpha=0.2, beta=0.5,
        ).solve()  # fmt: skip
        assert together.rows[g].tolist() == alone.rows[0].tolist()
        assert together.value[g] == alone.value[0]


def test_published_longest_takes_all_paths_of_a_small_budget() -> None:
    small = program([3.0, 1.0, 2.0], 4, 3, alpha=0.0, beta=0.0)
    assert small.longest.tolist() == [9.0]
    published = LayerProgram(**{**vars(small), "published_longest": True})
    assert published.longest.tolist() == [4 * 6.0 + 9.0]
    full = program([3.0, 1.0, 2.0], 4, 12, alpha=0.0, beta=0.0)
    assert full.longest.tolist() == [24.0]
    assert LayerProgram(**{**vars(full), "published_longest": True}).longest.tolist() == [24.0]
