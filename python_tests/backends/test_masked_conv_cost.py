"""The cost table of packed convolutions: what it must say whatever its constants are."""

from __future__ import annotations

import itertools

import pytest
import torch

from paikern.backends.dense_masked_conv import out_size
from paikern.backends.masked_conv_cost import conv_kernel, dense_seconds, estimate_conv

LAYERS = [(64, 64, 3, 56, 1), (512, 512, 3, 7, 1), (256, 64, 1, 56, 1), (128, 128, 3, 56, 2)]


def shape_of(rows: int, channels: int, kernel: int, size: int, stride: int, batch: int) -> tuple:
    window = ((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), (1, 1))
    out = out_size((size, size), *window)
    return (batch, 1, rows, channels, size, size, *itertools.chain(*window), *out)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("op", ["output", "input", "kept"])
def test_more_kept_weights_never_turn_dense_into_direct(
    layer: tuple[int, int, int, int, int], batch: int, op: str
) -> None:
    shape = shape_of(*layer, batch)
    numel = layer[0] * layer[1] * layer[2] ** 2
    kernels = [conv_kernel(op, shape, numel * part // 100) for part in range(101)]
    assert kernels[1] == "direct"
    assert kernels[-1] == "dense"
    assert kernels == sorted(kernels, reverse=True)  # "direct" first


def test_a_map_beyond_32_bit_offsets_is_dense() -> None:
    assert conv_kernel("output", shape_of(8, 8, 3, 2**14, 1, 1), 1) == "dense"
    assert conv_kernel("output", shape_of(8, 8, 3, 2**11, 1, 1), 1) == "direct"


def test_an_estimate_names_kernel_times_and_reason() -> None:
    found = estimate_conv("cpu", 64, 64, (3, 3), (56, 56), 1843, 8, padding=(1, 1))
    assert found.kernel == "direct"
    assert found.seconds is not None
    assert found.dense_seconds == dense_seconds("output", shape_of(64, 64, 3, 56, 1, 8))
    assert found.seconds < found.dense_seconds
    assert found.why.endswith("dense at density 0.05")
    training = estimate_conv(
        "cpu", 64, 64, (3, 3), (56, 56), 1843, 8, padding=(1, 1), training=True
    )
    assert training.dense_seconds is not None
    assert training.dense_seconds > 2.9 * found.dense_seconds
    full = estimate_conv("cpu", 64, 64, (3, 3), (56, 56), 36_864, 8, padding=(1, 1))
    assert (full.kernel, full.seconds) == ("dense", full.dense_seconds)
    assert full.why.startswith("the direct kernel would take")


def test_an_estimate_without_figures_has_no_times() -> None:
    gpu = estimate_conv("cuda", 8, 8, (3, 3), (9, 9), 10, 4)
    assert (gpu.kernel, gpu.seconds, gpu.dense_seconds) == ("dense", None, None)
    assert gpu.why.startswith("not yet measured on cuda")
    double = estimate_conv("cpu", 8, 8, (3, 3), (9, 9), 10, 4, dtype=torch.float64)
    assert (double.kernel, double.why) == ("dense", "no packed kernel for torch.float64")
