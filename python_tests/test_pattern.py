"""What the words of `pattern=` mean, and where a pattern lies in the weight of a layer."""

from __future__ import annotations

import math

import pytest
from torch import nn

from paikern.errors import SparsityError
from paikern.pattern import NM, Blocks, Layout, parse_pattern
from paikern.prunable import prunable_parameters

PLAIN, TRANSPOSED = Layout(), Layout(transposed=True)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", None),
        ("2:4", NM(2, 4)),
        ("1:16", NM(1, 16)),
        ("block:16x16", Blocks("block", 16, 16)),
        ("block:1x128", Blocks("block", 1, 128)),
        ("row", Blocks("row")),
        ("column", Blocks("column")),
        ("kernel", Blocks("kernel")),
    ],
)
def test_parse_pattern(text: str, pattern: NM | Blocks | None) -> None:
    assert parse_pattern(text) == pattern
    assert pattern is None or str(pattern) == text


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "0:0"])
def test_parse_pattern_refuses_groups_that_keep_all_or_nothing(text: str) -> None:
    with pytest.raises(SparsityError, match="n:m needs 1 <= n < m"):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2:4 ", "unknown pattern '2:4 '; known: 'unstructured', 'n:m'"),
        ("rows", "unknown pattern 'rows'"),
        ("block:16", "unknown pattern 'block:16'"),
        ("block:-1x2", "unknown pattern"),
        ("block:0x2", "at least one row and one column"),
        ("", "unknown pattern ''"),
        ("1:99999999999", "unknown pattern"),
    ],
)
def test_parse_pattern_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pattern(text)


def test_parse_pattern_takes_strings_only() -> None:
    with pytest.raises(TypeError, match="pattern must be a string, got tuple"):
        parse_pattern((2, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("inputs", range(20))
def test_kept_of_counts_whole_groups_and_the_rest(inputs: int) -> None:
    for n, m in ((1, 2), (2, 4), (3, 7), (1, 16)):
        expected = sum(
            n if size == m else math.ceil(size * n / m)
            for size in [min(m, inputs - first) for first in range(0, inputs, m)]
        )
        assert NM(n, m).kept_of(inputs) == expected


def test_rounds_go_down_to_the_pattern() -> None:
    steps = [NM(2, 8).at(density).n for density in (1.0, 0.9, 0.75, 0.5, 0.3, 0.25, 0.1)]
    assert steps == [8, 8, 6, 4, 3, 2, 2]
    assert Blocks("row").at(0.3) == Blocks("row")


@pytest.mark.parametrize(
    ("shape", "layout", "blocks"),
    [
        # shape, layout, the stored block of row, column, kernel and block:4x2
        ((6, 8), PLAIN, ((1, 8), (6, 1), (1, 1), (4, 2))),
        ((8, 6), TRANSPOSED, ((8, 1), (1, 6), (1, 1), (2, 4))),
        ((6, 8, 3, 3), PLAIN, ((1, 72), (6, 9), (1, 9), (4, 2))),
        ((6, 4, 3), Layout(groups=2), ((1, 12), (3, 3), (1, 3), (4, 2))),
        ((8, 6, 3, 3), TRANSPOSED, ((8, 9), (1, 54), (1, 9), (2, 4))),
        ((8, 3, 5), Layout(True, 2), ((4, 5), (1, 15), (1, 5), (2, 4))),
        ((2, 1), PLAIN, ((1, 1), (2, 1), (1, 1), (2, 1))),
    ],
)
def test_blocks_in_the_stored_matrix(
    shape: tuple[int, ...], layout: Layout, blocks: tuple[tuple[int, int], ...]
) -> None:
    patterns = (Blocks("row"), Blocks("column"), Blocks("kernel"), Blocks("block", 4, 2))
    assert tuple(pattern.block(shape, layout) for pattern in patterns) == blocks


def test_layouts_of_layers() -> None:
    class Conv1D(nn.Module):  # as transformers names it
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(nn.init.normal_(nn.Linear(4, 2).weight.T.clone()))

    model = nn.ModuleList(
        [
            nn.Linear(2, 3),
            nn.Conv2d(4, 6, 3, groups=2),
            nn.ConvTranspose2d(4, 6, 3, groups=2),
            Conv1D(),
            nn.MultiheadAttention(4, 2),
        ]
    )
    layouts = {name: layer.layout for name, layer in prunable_parameters(model).items()}
    assert layouts == {
        "0.weight": PLAIN,
        "1.weight": Layout(groups=2),
        "2.weight": Layout(True, 2),
        "3.weight": TRANSPOSED,
        "4.in_proj_weight": PLAIN,
        "4.out_proj.weight": PLAIN,
    }
