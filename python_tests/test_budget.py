"""Counts, layer budgets and schedules against golden lists and exact arithmetic."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paikern import zoo
from paikern.budget import (
    SCHEDULES,
    erk_densities,
    falling_budgets,
    keep_count,
    layer_budget,
    resolve_sparsity,
    schedule_counts,
    schedule_densities,
)
from paikern.errors import NonFiniteScoreError, PaikernError, SparsityError

# fmt: off
GOLDEN = {  # kept weights of the published ERK rule, module pre-order
    ("resnet20", 0.9): [425, *[646] * 6, 918, 1190, 512, *[1190] * 4, 1733, 2277, 1665,
                        *[2277] * 4, 640],
    ("vgg19_bn", 0.9): [1728, 24886, 36772, 48658, 72429, *[96200] * 3, 143743, *[191286] * 7,
                        51200],
    ("lenet300", 0.9): [18715, 6906, 1000],
    ("lenet300", 0.95): [9052, 3341, 919],
}
# fmt: on

sparsities = st.floats(0, 0.999, allow_nan=False) | st.sampled_from([0.0, 0.5, 0.9, 0.98, 0.99])
layer_lists = st.lists(
    st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple), min_size=1, max_size=8
)


def zoo_shapes(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = zoo.create(name)
    return {key: tuple(p.shape) for key, p in model.named_parameters() if p.ndim > 1}


# --- keep_count ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "sparsity", "kept"),
    [
        (10, 0.0, 10),
        (10, 0.5, 5),
        (11, 0.5, 6),
        (0, 0.5, 0),
        (1, 0.999, 1),
        (270_896, 0.9, 27_090),
        (270_896, 0.98, 5_418),
        (266_200, 0.95, 13_310),
        (20_070_080, 0.9, 2_007_008),
        (100, 0.29, 72),  # the double nearest to 0.29 * 100 is below 29
        (2**40, 0.75, 2**38),
    ],
)
def test_keep_count(n: int, sparsity: float, kept: int) -> None:
    assert keep_count(n, sparsity) == kept


@given(st.integers(0, 10**12), sparsities)
def test_keep_count_is_the_rounded_product(n: int, sparsity: float) -> None:
    kept = keep_count(n, sparsity)
    assert 0 <= kept <= n
    exact = n - Fraction(sparsity) * n
    assert abs(kept - exact) < 1 + Fraction(n, 2**52)


# --- resolve_sparsity ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "sparsity"),
    [
        ({"sparsity": 0.9}, 0.9),
        ({"sparsity": 0}, 0.0),
        ({"density": 0.25}, 0.75),
        ({"density": 1}, 0.0),
        ({"density": 1e-30}, math.nextafter(1.0, 0.0)),
        ({"compression": 1e30}, math.nextafter(1.0, 0.0)),
        ({"amount": 0.3}, 0.3),
        ({"amount": 0, "total": 10}, 0.0),
        ({"amount": 0, "total": 0}, 0.0),
        ({"compression": 10}, 0.9),
        ({"compression": 1}, 0.0),
        ({"compression": 1.25}, 0.19999999999999996),
    ],
)
def test_resolve_sparsity(kwargs: dict[str, float], sparsity: float) -> None:
    assert resolve_sparsity(**kwargs) == sparsity


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "exactly one of sparsity, density, amount, compression; got none"),
        ({"sparsity": 0.5, "density": 0.5}, "got sparsity=0.5 and density=0.5"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), the fraction removed; got 1.0$"),
        ({"sparsity": -0.1}, "sparsity must be .* got -0.1"),
        ({"sparsity": 90}, "for 90 % write 0.9"),
        ({"sparsity": math.nan}, "sparsity must be .* got nan"),
        ({"sparsity": math.inf}, "sparsity must be .* got inf$"),
        ({"density": 0}, r"density must be in \(0, 1\], the fraction kept; got 0"),
        ({"density": 1.5}, "density must be"),
        ({"density": math.nan}, "density must be"),
        ({"amount": 1.0}, "amount must be"),
        ({"amount": 5}, "amount=5 is a number of weights and needs total"),
        ({"amount": 10, "total": 10}, r"amount must be in \[0, 10\)"),
        ({"amount": -1, "total": 10}, r"amount must be in \[0, 10\)"),
        ({"compression": 0.5}, "compression must be a finite factor of at least 1"),
        ({"compression": math.inf}, "compression must be a finite"),
    ],
)
def test_resolve_sparsity_refuses(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(SparsityError, match=message) as caught:
        resolve_sparsity(**kwargs)
    assert isinstance(caught.value, (ValueError, PaikernError))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [True, "0.9", torch.tensor(0.9)])
def test_resolve_sparsity_wants_a_number(value: object) -> None:
    with pytest.raises(TypeError, match="sparsity must be a number"):
        resolve_sparsity(sparsity=value)


@given(st.integers(1, 10**9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))))
def test_integer_amount_removes_exactly_that_many(case: tuple[int, int]) -> None:
    total, amount = case
    assert keep_count(total, resolve_sparsity(amount=amount, total=total)) == total - amount


# --- ERK -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sparsity"), GOLDEN)
@pytest.mark.parametrize("variant", ["published", "npb"])
def test_erk_golden(name: str, sparsity: float, variant: str) -> None:
    counts = layer_budget(zoo_shapes(name), sparsity, "erk", variant=variant)
    assert counts == GOLDEN[name, sparsity]


@pytest.mark.parametrize(
    ("name", "total"), [("resnet20", 27_104), ("vgg19_bn", 2_007_018), ("lenet300", 26_621)]
)
def test_erk_golden_totals(name: str, total: int) -> None:
    assert sum(layer_budget(zoo_shapes(name), 0.9, "erk", variant="published")) == total


@pytest.mark.parametrize("name", ["resnet20", "vgg19_bn", "lenet300", "resnet50"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_erk_paper_is_exact_and_next_to_published(name: str, sparsity: float) -> None:
    shapes = zoo_shapes(name)
    paper = layer_budget(shapes, sparsity, "erk")
    published = layer_budget(shapes, sparsity, "erk", variant="published")
    assert sum(paper) == keep_count(sum(map(math.prod, shapes.values())), sparsity)
    assert all(-1 <= p - q <= 0 for p, q in zip(paper, published, strict=True))


def test_erk_paper_rounding_by_hand() -> None:
    # Equal shapes share 0.26 * 48 = 12.48 weights: 4.16 each. keep_count gives 13, and the three
    # fractions tie, so the first layer gets the odd weight.
    assert layer_budget([(4, 4)] * 3, 0.74, "erk") == [5, 4, 4]


def test_erk_lifts_tiny_quotas_to_one_and_takes_it_from_the_rest() -> None:
    # The big layer's quota is about 7.9, the small ones about 0.4 each.
    shapes = [(100, 100), (2, 1, 5), (2, 1, 5)]
    counts = layer_budget(shapes, 0.999, "erk")
    assert sum(counts) == keep_count(10_020, 0.999)
    assert min(counts) == 1


def test_erk_with_fewer_weights_than_layers() -> None:
    with pytest.raises(SparsityError, match="at least one weight in each of 3 layers"):
        layer_budget([(4, 4)] * 3, 0.97, "erk")


def test_erk_dense_cascade() -> None:
    # (2, 2) has raw 1; at density .5 its quota passes 1, then (4, 4)'s (raw .5) does in the rest.
    densities = erk_densities([(2, 2), (4, 4), (16, 16)], 0.4)
    assert densities[:2] == [1.0, 1.0]
    assert densities[2] == pytest.approx((0.4 * 276 - 20) / 256)


def test_erk_layers_of_equal_raw_turn_dense_together() -> None:
    densities = erk_densities([(2, 2), (2, 2), (64, 64)], 0.1)
    assert densities[0] == densities[1] == 1.0


def test_erk_dense_and_empty() -> None:
    assert erk_densities([(3, 4), (5, 6)], 1.0) == pytest.approx([1.0, 1.0])
    assert erk_densities([], 0.5) == []
    densities = erk_densities([(0, 4), (8, 8)], 0.5)
    assert densities == [1.0, 0.5]
    assert layer_budget([(0, 4), (8, 8)], 0.5, "erk") == [0, 32]


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_erk_density_range(density: float) -> None:
    with pytest.raises(SparsityError, match="density must be in"):
        erk_densities([(3, 4)], density)


@given(layer_lists, st.floats(0.001, 1))
def test_erk_density_properties(shapes: list[tuple[int, ...]], density: float) -> None:
    densities = erk_densities(shapes, density)
    sizes = [math.prod(shape) for shape in shapes]
    assert all(0 < d <= 1 for d in densities)
    kept = sum(d * n for d, n in zip(densities, sizes, strict=True))
    assert kept == pytest.approx(density * sum(sizes))
    free = [
        d / (sum(shape) / n) for d, shape, n in zip(densities, shapes, sizes, strict=True) if d < 1
    ]
    assert free == pytest.approx([free[0]] * len(free)) if free else True


@given(layer_lists, sparsities)
def test_erk_counts_properties(shapes: list[tuple[int, ...]], sparsity: float) -> None:
    sizes = [math.prod(shape) for shape in shapes]
    total = keep_count(sum(sizes), sparsity)
    for variant in ("published", "npb"):
        counts = layer_budget(shapes, sparsity, "erk", variant=variant)
        assert all(0 <= k <= n for k, n in zip(counts, sizes, strict=True))
        assert -1 <= sum(counts) - total + 1 <= len(shapes) + 1
    if total < len(shapes):
        with pytest.raises(SparsityError):
            layer_budget(shapes, sparsity, "erk")
    else:
        counts = layer_budget(shapes, sparsity, "erk")
        assert sum(counts) == total
        assert all(1 <= k <= n for k, n in zip(counts, sizes, strict=True))


# --- the other scopes ----------------------------------------------------------------------------


def test_global_and_local() -> None:
    shapes = {"a": (3, 3), "b": (5,), "c": (0, 2)}
    assert layer_budget(shapes, 0.5) == 7
    assert layer_budget(shapes, 0.5, "local") == [5, 3, 0]
    assert layer_budget(shapes, 0.5, "uniform") == [5, 3, 0]


@given(layer_lists, sparsities)
def test_local_rounding_bound(shapes: list[tuple[int, ...]], sparsity: float) -> None:
    extra = sum(layer_budget(shapes, sparsity, "local")) - layer_budget(shapes, sparsity)
    assert 0 <= extra < len(shapes)


@pytest.mark.parametrize("scope", ["global", "local", "uniform", "erk", "lamp"])
def test_sparsity_zero_keeps_everything(scope: str) -> None:
    scores = [torch.ones(3, 4), torch.zeros(2, 2)]
    budget = layer_budget([(3, 4), (2, 2)], 0.0, scope, scores=scores)
    assert budget == (16 if scope == "global" else [12, 4])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scope": "globl"}, "unknown scope 'globl'; did you mean 'global'"),
        ({"scope": "xyz"}, "known: global, local"),
        ({"scope": "erk", "variant": "papr"}, "unknown variant 'papr'; did you mean 'paper'"),
        ({"scope": "lamp"}, "pass scores="),
        ({"scope": "lamp", "scores": [torch.ones(2, 3)]}, "must have the shapes of the layers"),
        ({"scope": "lamp", "scores": [torch.ones(3, 2)] * 2}, "must have the shapes"),
    ],
)
def test_layer_budget_refuses(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_budget([(3, 2)], 0.5, **kwargs)


@pytest.mark.parametrize("scope", ["global", "local", "erk", "lamp"])
def test_layer_budget_checks_sparsity(scope: str) -> None:
    with pytest.raises(SparsityError, match="sparsity must be"):
        layer_budget([(3, 2)], 1.5, scope)


# --- LAMP ----------------------------------------------------------------------------------------


def brute_lamp(layers: list[list[int]], k: int) -> list[int]:
    """LAMP in exact fractions, one weight after the other."""
    ranked = []
    for layer, values in enumerate(layers):
        order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
        total = 0
        for rank, index in enumerate(order):
            square = values[index] ** 2
            total += square
            score = Fraction(square, total) if total else Fraction(0)
            ranked.append((-score, layer, rank))
    counts = [0] * len(layers)
    for _, layer, _ in sorted(ranked)[:k]:
        counts[layer] += 1
    return counts


def test_lamp_by_hand() -> None:
    # Layer a: 3, 2, 1 -> 1, 4/13, 1/14; layer b: 5, 5 -> 1, 1/2. Best three: 1, 1, 1/2.
    scores = {"b": torch.tensor([5.0, 5.0]), "a": torch.tensor([1.0, -3.0, 2.0])}
    shapes = {"a": (3,), "b": (2,)}
    assert layer_budget(shapes, 0.5, "lamp", scores=scores) == [1, 2]  # k = 3


@given(
    st.lists(st.lists(st.integers(-6, 6), min_size=0, max_size=12), min_size=1, max_size=5),
    sparsities,
)
def test_lamp_against_exact_fractions(layers: list[list[int]], sparsity: float) -> None:
    scores = [torch.tensor(values, dtype=torch.float32) for values in layers]
    shapes = [(len(values),) for values in layers]
    k = keep_count(sum(map(len, layers)), sparsity)
    # Powers of two make the division by the layer's maximum exact, so ties stay ties.
    scores = [(t.abs() > 3) * 4.0 + (t.abs() <= 3) * t.abs().clamp(max=1) for t in scores]
    exact = [[int(v) for v in t.tolist()] for t in scores]
    assert layer_budget(shapes, sparsity, "lamp", scores=scores) == brute_lamp(exact, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_lamp_is_invariant_to_layer_scale(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(40, 30, generator=generator).to(dtype) for _ in range(3)]
    shapes = [(40, 30)] * 3
    scaled = [t * factor for t, factor in zip(scores, (1.0, 8.0, 0.125), strict=True)]
    counts = layer_budget(shapes, 0.9, "lamp", scores=scores)
    assert counts == layer_budget(shapes, 0.9, "lamp", scores=scaled)
    assert sum(counts) == 360
    assert min(counts) > 50


def test_lamp_does_not_overflow() -> None:
    scores = [torch.tensor([1e300, 1e-300], dtype=torch.float64), torch.tensor([1.0, 1.0])]
    assert layer_budget([(2,), (2,)], 0.25, "lamp", scores=scores) == [1, 2]


def test_lamp_all_zero_gives_the_first_layers() -> None:
    assert layer_budget([(4,), (4,)], 0.25, "lamp", scores=[torch.zeros(4)] * 2) == [4, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_lamp_refuses_non_finite_by_name(bad: float) -> None:
    scores = {"a": torch.ones(3), "b": torch.tensor([1.0, bad])}
    with pytest.raises(NonFiniteScoreError, match="'b' has 1 NaN or infinite"):
        layer_budget({"a": (3,), "b": (2,)}, 0.5, "lamp", scores=scores)


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("exponential", [0.5, 0.25, 0.125, 0.0625]),
        ("linear", [0.765625, 0.53125, 0.296875, 0.0625]),
        ("cubic", [1 - 0.9375 * 37 / 64, 1 - 0.9375 * 7 / 8, 1 - 0.9375 * 63 / 64, 0.0625]),
        ("expinv", [1 - 0.9375**4, 1 - 0.9375**2, 1 - 0.9375 ** (4 / 3), 0.0625]),
    ],
)
def test_schedule_densities(kind: str, expected: list[float]) -> None:
    assert schedule_densities(0.0625, 4, kind) == pytest.approx(expected, rel=1e-14)


def test_published_sparsity_levels() -> None:
    levels = [36.00, 59.04, 73.79, 83.22, 89.26, 93.13, 95.60, 97.19, 98.20]
    densities = schedule_densities(0.8**18, 9)
    assert [round(100 * (1 - d), 2) for d in densities] == pytest.approx(levels, abs=0.011)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_one_round_is_the_target(kind: str) -> None:
    assert schedule_densities(0.1, 1, kind) == [0.1]
    assert schedule_counts(1000, 0.9, 1, kind) == [100]


@settings(max_examples=300)
@given(
    st.integers(0, 10**8),
    sparsities,
    st.integers(1, 200),
    st.sampled_from(["exponential", "linear", "cubic", "expinv"]),
)
def test_schedule_counts_properties(n: int, sparsity: float, rounds: int, kind: str) -> None:
    counts = schedule_counts(n, sparsity, rounds, kind)
    assert len(counts) == rounds
    assert counts[-1] == keep_count(n, sparsity)
    assert all(a >= b for a, b in itertools.pairwise(counts))
    assert counts[0] <= n
    densities = schedule_densities(1 - sparsity, rounds, kind)
    for count, density in zip(counts, densities, strict=True):
        assert abs(count - (n - int((1 - density) * n))) <= 1


def test_schedule_counts_resnet20() -> None:
    counts = schedule_counts(270_896, 0.98, 100)
    assert counts[0] == 270_896 - int((1 - 0.02**0.01) * 270_896)
    assert counts[-1] == 5_418
    assert len(set(counts)) == 100


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"density": 0.0, "rounds": 3}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5, "rounds": 3}, "density must be in"),
        ({"density": 0.5, "rounds": 0}, "rounds must be at least 1, got 0"),
        ({"density": 0.5, "rounds": -2}, "rounds must be at least 1, got -2"),
        ({"density": 0.5, "rounds": 2, "kind": "one-shot"}, "one round, got rounds=2"),
        ({"density": 0.5, "rounds": 2, "kind": "cubik"}, "did you mean 'cubic'"),
    ],
)
def test_schedule_refuses(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_densities(**kwargs)


@pytest.mark.parametrize("rounds", [2.0, True, "3"])
def test_rounds_must_be_an_integer(rounds: object) -> None:
    with pytest.raises(TypeError, match="rounds must be an integer"):
        schedule_densities(0.5, rounds)


def erk_rounds(shapes: list[tuple[int, int]], density: float, rounds: int) -> list[list[int]]:
    removed = [1.0 - d for d in schedule_densities(density, rounds)]
    budgets = [layer_budget(shapes, fraction, "erk") for fraction in removed]
    return [k for k in budgets if isinstance(k, list)]


def test_the_largest_fraction_of_erk_moves_between_rounds() -> None:
    """Why budgets are made to fall: some layer is given more than it had, somewhere in ten rounds.

    By hand: `[3, 5] -> [2, 4] -> [3, 1]` cannot take the first layer down to 2 if 3 are kept in the
    end, so the other one gives a weight in its place.
    """
    grown = 0
    for width in range(2, 14):
        budgets = erk_rounds([(width, 5), (3, width), (2, 3)], 0.1, 10)
        grown += any(
            b > a for x, y in itertools.pairwise(budgets) for a, b in zip(x, y, strict=True)
        )
    assert grown
    assert falling_budgets([[3, 5], [2, 4], [3, 1]]) == [[3, 5], [3, 3], [3, 1]]


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    density=st.floats(0.05, 0.9),
    rounds=st.integers(1, 12),
)
def test_falling_budgets_keep_totals_and_never_grow(
    sizes: list[int], density: float, rounds: int
) -> None:
    shapes = [(b, a) for a, b in itertools.pairwise(sizes)]
    if keep_count(sum(math.prod(s) for s in shapes), 1.0 - density) < len(shapes):
        return  # refused by erk
    budgets = erk_rounds(shapes, density, rounds)
    found = falling_budgets(budgets)
    assert [sum(counts) for counts in found] == [sum(counts) for counts in budgets]
    assert found[-1] == budgets[-1]
    for before, after in itertools.pairwise(found):
        assert all(a >= b for a, b in zip(before, after, strict=True))
    for counts in found:
        assert all(0 < k <= math.prod(s) for k, s in zip(counts, shapes, strict=True))


def test_budgets_that_fall_are_left_alone() -> None:
    assert falling_budgets([[9, 9], [4, 7], [1, 2]]) == [[9, 9], [4, 7], [1, 2]]
    assert falling_budgets([[2, 3]]) == [[2, 3]]
    assert falling_budgets([]) == []
