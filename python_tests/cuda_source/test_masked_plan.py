"""What products with packed weights launch for layers of real sizes; nothing runs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from paikern.backends import cuda_masked_linear
from paikern.backends.cuda_launch import Step, provided

pytestmark = pytest.mark.cuda_source
HALF = torch.bfloat16


class Recorder:
    """A provider that starts nothing."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def run(self, steps: Sequence[Step], device: int, stream: int) -> None:
        self.steps += steps

    def multiprocessors(self, device: int) -> int:
        return 132

    def together(self, device: int, each: int) -> int:
        return 132 * each


def launched(
    operation: str, rows: int, columns: int, kept: int, batch: int, bitmap: bool = False
) -> list[tuple[str, int]]:
    """Kernels and blocks; of the tensors only their sizes count."""
    panel = 4096

    def positions(numel: int) -> Tensor:
        return torch.empty(kept, dtype=torch.int16)

    def starts(rows: int, columns: int) -> Tensor:
        return torch.empty(rows * -(-columns // panel) + 1, dtype=torch.int32)

    bits = torch.empty(-(-rows * columns // 8), dtype=torch.uint8)
    where = (
        bits if bitmap else positions(kept),
        starts(rows, columns),
        positions(kept),
        starts(columns, rows),
        torch.empty(kept, dtype=torch.int32),
        *(rows, columns, panel, kept),
    )
    x, g = torch.empty(batch, columns, dtype=HALF), torch.empty(batch, rows, dtype=HALF)
    values, recorder = torch.empty(kept, dtype=HALF), Recorder()
    with provided(recorder):
        if operation == "output":
            cuda_masked_linear.masked_linear(x, values, None, *where)
        elif operation == "input":
            cuda_masked_linear.masked_linear_input(g, values, *where)
        else:
            cuda_masked_linear.masked_linear_kept(g, x, *where)
    return [(step.kernel.removeprefix("paikern_masked_"), step.blocks) for step in recorder.steps]


N = 4096
TENTH, FEW = N * N // 10, N * N // 50


def test_one_row_of_x_is_one_launch_with_a_warp_for_each_row() -> None:
    assert launched("output", N, N, TENTH, 1) == [("few", N * 32 // 256)]
    assert launched("output", N, N, N * N // 2, 4) == [("few", N * 32 // 256)]


def test_bitmaps_of_halves_are_one_launch_up_to_64_rows_of_x() -> None:
    for batch, tiles in ((1, 1), (8, 1), (9, 2), (17, 4), (64, 8)):
        assert launched("output", N, N, N * N // 2, batch, bitmap=True) == [
            (f"decode_{tiles}", N // 32)
        ]


def test_sparse_layers_go_by_panels_of_x() -> None:
    assert launched("output", N, N, FEW, 16) == [("panels", N // 32), ("rows_1", N // 8)]
    assert launched("output", N, N, FEW, 512) == [("panels", 4 * 4 * N // 32), ("rows_4", N // 2)]
    assert launched("input", N, N, FEW, 64) == [("panels", 2 * N // 32), ("rows_2", N // 8)]
    assert launched("kept", N, N, FEW, 40) == [
        ("panels", 2 * N // 32),
        ("panels", 2 * N // 32),
        ("dots_2", N // 8),
    ]


def test_few_long_rows_are_cut_into_parts() -> None:
    (few, blocks), (parts, _) = launched("output", 10, 140_000, 200_000, 1)
    assert (few, parts) == ("few", "parts")
    assert blocks > 10 * 32 // 256 * 8
    (bits, blocks), (parts, _) = launched("output", 64, 65_536, 64 * 32_768, 8, bitmap=True)
    assert (bits, blocks, parts) == ("decode_1", 2 * 16, "parts")


def test_else_the_library_multiplies_and_moves_frame_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "mm", lambda a, b: torch.empty(a.shape[0], b.shape[1], dtype=HALF))
    assert launched("input", N, N, N * N // 2, 1) == [("fill", N)]
    assert launched("input", N, N, N * N // 2, 1, bitmap=True) == [("move_bits", N // 8)]
    assert launched("kept", N, 2 * N, N * N // 2, 64) == [("move", 2048 // 8)] * 2
