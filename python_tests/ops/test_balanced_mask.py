from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paikern import ops
from paikern.backends import reference_balanced_mask, registry
from paikern.errors import NonFiniteScoreError
from paikern.ops.balanced_mask import KernelGrid
from python_tests.ops.balanced_cases import LAYOUTS, check, kernels_of, random_rows


@pytest.mark.parametrize(("shape", "groups", "transposed"), LAYOUTS, ids=str)
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_sums_and_equal_bits_on_both_backends(
    shape: tuple[int, ...], groups: int, transposed: bool, fraction: float
) -> None:
    grid = KernelGrid.of(shape, groups=groups, transposed=transposed)
    for seed in range(3):
        rows = random_rows(grid, seed, fraction)
        found = []
        for backend in ("cpu", "reference"):
            with registry.using(backend):
                found.append(
                    ops.balanced_mask(
                        rows, shape, groups=groups, transposed=transposed, seed=seed, stream=3
                    )
                )
        check(found[0], rows, grid, transposed)
        assert torch.equal(*found)


@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    positions=st.integers(1, 9),
    groups=st.integers(1, 3),
    transposed=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**31 - 1),
    cover=st.none() | st.integers(0, 12),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_any_rows(
    inputs: int,
    outputs: int,
    positions: int,
    groups: int,
    transposed: bool,
    seed: int,
    stream: int,
    cover: int | None,
    data: st.DataObject,
) -> None:
    first, second = (inputs, outputs) if transposed else (outputs, inputs)
    shape = (groups * first, second, positions)
    count = groups * inputs
    rows = torch.tensor(
        data.draw(st.lists(st.integers(0, outputs * positions), min_size=count, max_size=count))
    )
    found = []
    for backend in ("cpu", "reference"):
        with registry.using(backend):
            found.append(
                ops.balanced_mask(
                    rows,
                    shape,
                    groups=groups,
                    transposed=transposed,
                    cover=cover,
                    seed=seed,
                    stream=stream,
                )
            )
    check(found[0], rows, KernelGrid(groups, inputs, outputs, positions), transposed, cover)
    assert torch.equal(*found)


def test_cover_gives_the_rest_to_the_same_outputs() -> None:
    rows = torch.tensor([3, 2, 3, 1, 3])
    bits = ops.balanced_mask(rows, (6, 5), cover=1)
    columns = ops.unpack_mask(bits, (6, 5)).sum(1)
    # 6 of 12 go once round; of the other 6, three rows give 1, 1 and 3 to the first favourites.
    assert sorted(columns.tolist(), reverse=True)[0] >= 3
    assert int(columns.min()) == 1
    none = ops.unpack_mask(ops.balanced_mask(rows, (6, 5), cover=0), (6, 5)).sum(1)
    assert sorted(none.tolist(), reverse=True) == [5, 4, 3, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_scores_take_the_largest_magnitudes_of_each_kernel(
    dtype: torch.dtype, transposed: bool
) -> None:
    shape = (6, 4, 3, 3)
    grid = KernelGrid.of(shape, transposed=transposed)
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(3).round().to(dtype)
    scores[0, 0, 0, 0] = math.inf
    rows = random_rows(grid, 2)
    found = []
    for backend in ("cpu", "reference"):
        with registry.using(backend):
            found.append(
                ops.balanced_mask(
                    rows, shape, transposed=transposed, seed=5, scores=scores.transpose(2, 3)
                )
            )
    assert torch.equal(*found)
    check(found[0], rows, grid, transposed)
    mask = ops.unpack_mask(found[0], (24, 9))
    values = scores.transpose(2, 3).reshape(24, 9).abs().double()
    for kept, magnitudes in zip(mask, values, strict=True):
        order = sorted(range(9), key=lambda j: (-float(magnitudes[j]), j))
        assert sorted(torch.nonzero(kept).flatten().tolist()) == sorted(order[: int(kept.sum())])


def test_which_columns_does_not_depend_on_scores() -> None:
    shape, rows = (8, 5, 3, 3), torch.tensor([3, 9, 20, 1, 0])
    grid = KernelGrid.of(shape)
    drawn = ops.balanced_mask(rows, shape, seed=4)
    ranked = ops.balanced_mask(rows, shape, seed=4, scores=torch.rand(shape))
    assert torch.equal(kernels_of(drawn, grid, False), kernels_of(ranked, grid, False))


def test_every_position_and_column_is_as_likely() -> None:
    """Chi-square over 4,000 seeds; 0.9999 quantiles of 8 and 5 degrees of freedom."""
    positions, columns = torch.zeros(9), torch.zeros(6)
    for seed in range(4000):
        mask = ops.unpack_mask(
            ops.balanced_mask(torch.tensor([2, 3]), (6, 2, 9), seed=seed), (6, 2, 9)
        )
        positions += mask.sum((0, 1))
        columns += mask[:, 0].any(1)
    for counts, limit in ((positions, 31.8), (columns, 25.7)):
        expected = counts.sum() / len(counts)
        assert float(((counts - expected) ** 2 / expected).sum()) < limit
    assert columns.sum() == 8000


def test_subsets_of_a_kernel_are_alike() -> None:
    """All 10 pairs of 5 positions, 4,000 kernels; 0.9999 quantile of 9 degrees of freedom."""
    bits = ops.balanced_mask(torch.full((4000,), 2), (1, 4000, 5), seed=9)
    mask = ops.unpack_mask(bits, (4000, 5)).double()
    pairs = torch.einsum("ki,kj->ij", mask, mask)
    counts = pairs[torch.triu(torch.ones(5, 5), 1).bool()]
    assert counts.sum() == 4000
    assert float(((counts - 400) ** 2 / 400).sum()) < 33.8


def test_seed_and_stream_change_the_mask() -> None:
    rows = torch.full((16,), 40)
    masks = [
        ops.balanced_mask(rows, (32, 16, 3, 3), seed=seed, stream=stream)
        for seed, stream in ((0, 0), (1, 0), (0, 1), (2**40, 0))
    ]
    for i, one in enumerate(masks):
        assert not any(torch.equal(one, other) for other in masks[:i])
    assert torch.equal(masks[0], ops.balanced_mask(rows, (32, 16, 3, 3)))


def test_philox_known_answers() -> None:
    """The test vectors of the paper's own distribution of the generator."""
    for word, key, expected in (
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        found = reference_balanced_mask.philox([torch.tensor(word)] * 4, key)
        assert [int(w) for w in found] == list(expected)


def test_threads_do_not_show() -> None:
    script = """
import sys, torch, hashlib
from paikern import ops
torch.set_num_threads(int(sys.argv[1]))
rows = torch.randint(0, 512 * 9, (300,), generator=torch.Generator().manual_seed(0))
bits = ops.balanced_mask(rows, (512, 300, 3, 3), seed=3, stream=2)
flat = ops.balanced_mask(rows, (9 * 512, 300), seed=3, stream=2)
print(hashlib.sha256(bits.numpy().tobytes() + flat.numpy().tobytes()).hexdigest())
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", script, str(threads)], capture_output=True, text=True, check=True
        ).stdout
        for threads in (1, 2, 3)
    }
    assert len(found) == 1


def test_nothing() -> None:
    none = torch.empty(0, dtype=torch.int64)
    for backend in ("cpu", "reference"):
        with registry.using(backend):
            assert ops.balanced_mask(none, (4, 0)).numel() == 0
            assert ops.balanced_mask(torch.zeros(3, dtype=torch.int64), (0, 3)).numel() == 0


def test_errors() -> None:
    rows = torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"rows must be in \[0, 3\].*got 1 to 4"):
        ops.balanced_mask(torch.tensor([1, 4]), (3, 2))
    with pytest.raises(ValueError, match=r"rows must be in .* got -1 to 1"):
        ops.balanced_mask(torch.tensor([1, -1]), (3, 2))
    with pytest.raises(ValueError, match=r"rows must be int64 \[3\] .* got torch.int64 \[2\]"):
        ops.balanced_mask(rows, (2, 3))
    with pytest.raises(ValueError, match=r"rows must be int64 .* got torch.int32"):
        ops.balanced_mask(rows.int(), (3, 2))
    with pytest.raises(ValueError, match="is no weight"):
        ops.balanced_mask(rows, (3,))
    with pytest.raises(ValueError, match="in 2 groups"):
        ops.balanced_mask(rows, (3, 2), groups=2)
    with pytest.raises(ValueError, match="cover must be >= 0, got -2"):
        ops.balanced_mask(rows, (3, 2), cover=-2)
    with pytest.raises(ValueError, match="stream -1 is out of range"):
        ops.balanced_mask(rows, (3, 2), stream=-1)
    with pytest.raises(ValueError, match=r"scores must have the shape \(3, 2\), got \(2, 3\)"):
        ops.balanced_mask(rows, (3, 2), scores=torch.rand(2, 3))
    scores = torch.rand(3, 2)
    scores[1, 1] = math.nan
    for backend in ("cpu", "reference"):
        with (
            registry.using(backend),
            pytest.raises(NonFiniteScoreError, match=r"fc\.weight.*NaN"),
        ):
            ops.balanced_mask(rows, (3, 2), scores=scores, name="fc.weight")
