"""Scores where few weights are kept: only those are computed, on both sides of the density.

Below 0.08 + 0.3 min(1, positions / 256) the kept weights are listed, from there on whole tiles are
made (`OuterMaps::choose` in csrc/cpu/path_outer.cpp). A plan moves rounding, not scores.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paikern import ops
from python_tests.ops.path_cases import DTYPES, Geometry, error, exact, ids, within
from python_tests.ops.test_path_conv_score import gradient

# Tiles of columns, of blocks of channels (at more positions than 1.5 rows), of lines of a plane
# (few channels a group), with strides and dilation, and a batch; more than 4,096 columns.
GEOMETRIES = (
    Geometry((5, 5), (3, 3), (1, 1), (1, 1), (1, 1), rows=20, channels=16, batch=1),
    Geometry((12, 12), (3, 3), (1, 1), (1, 1), (1, 1), rows=9, channels=24, batch=1),
    Geometry((16, 16), (3, 3), (1, 1), (1, 1), (1, 1), rows=8, channels=17, batch=1),
    Geometry((20, 20), (1, 1), (1, 1), (0, 0), (1, 1), rows=17, channels=33, batch=2),
    Geometry((13, 12), (3, 3), (2, 2), (1, 1), (1, 1), rows=33, channels=20, batch=1),
    Geometry((11, 11), (3, 2), (1, 2), (2, 0), (2, 3), groups=2, rows=12, channels=32),
    Geometry((9, 9), (3, 3), (1, 1), (1, 1), (1, 1), groups=8, rows=2, channels=2),
    Geometry((30,), (5,), (1,), (2,), (1,), rows=24, channels=16, batch=1),
    Geometry((3, 3, 3), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), rows=6, channels=160, batch=1),
)


def limit(geometry: Geometry) -> float:
    return 0.08 + 0.3 * min(1.0, geometry.batch * math.prod(geometry.out) / 256)


def mask_of(weight: Tensor, order: Tensor, kept: int) -> Tensor:
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[:kept]] = True
    return mask.view(weight.shape)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_scores_on_both_sides_of_the_density(geometry: Geometry, dtype: torch.dtype) -> None:
    weight, x, g = geometry.weight(dtype), geometry.x(), geometry.g()
    order, least = torch.randperm(weight.numel()), math.ceil(limit(geometry) * weight.numel())
    slope, torchs = gradient(geometry, x.double(), g.double()), gradient(geometry, x, g)
    found = []
    for kept in (least - 1, least, least // 2, 1):
        mask = mask_of(weight, order, kept)
        packed = ops.pack_mask(mask)
        for power in (1, 2):
            values = exact(weight, power, mask)
            score = ops.path_conv_score(
                weight, x, g, *geometry.args, power=power, mask=packed, pruned=-1.0
            )
            assert torch.equal(score[~mask], torch.full_like(score[~mask], -1.0))
            within(torch.where(mask, score, 0.0), values.float() * torchs, values * slope)
        found.append(torch.where(mask, score, 0.0))
    below, above = found[0], found[1]
    common = mask_of(weight, order, least - 1)
    assert error(below, torch.where(common, above, 0.0).double()) <= 1e-6


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_selections_on_both_sides_of_the_density(geometry: Geometry) -> None:
    """Scores that are made where a selection wants them are those that are stored."""
    weight, x, g = geometry.weight(), geometry.x(), geometry.g()
    order, least = torch.randperm(weight.numel()), math.ceil(limit(geometry) * weight.numel())
    for kept in (least - 1, least):
        packed = ops.pack_mask(mask_of(weight, order, kept))
        score = ops.path_conv_score(weight, x, g, *geometry.args, mask=packed, pruned=-1.0)
        for k in (1, kept // 2, kept):
            made = ops.topk_mask_factored(
                [weight], [x], [g], [0], k, masks=[packed], convs=[geometry.args]
            )
            assert torch.equal(made[0], ops.topk_mask(score, k)[0])


def test_kept_scores_have_the_same_bits_for_any_number_of_threads() -> None:
    geometry = Geometry((24, 24), (3, 3), (1, 1), (1, 1), (1, 1), rows=70, channels=64, batch=1)
    weight, x, g = geometry.weight(), geometry.x(), geometry.g()
    threads = torch.get_num_threads()
    for density in (0.02, 0.37, 0.39):
        packed = ops.pack_mask(torch.rand(weight.shape) < density)
        found = []
        try:
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                found.append(ops.path_conv_score(weight, x, g, *geometry.args, mask=packed))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(f, found[0]) for f in found)
