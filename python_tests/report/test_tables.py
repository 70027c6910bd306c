"""Tables as text, and the numbers in them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import paikern as pk
from paikern.masks import MaskSet
from paikern.report import Column, Table, layer_table, provenance_table, summarize
from paikern.report.tables import log_text, percent, printable


def two_layers() -> tuple[nn.Module, MaskSet, pk.Topology]:
    """3 -> 2 -> 2 by hand: unit 0 of the first layer is alive, the second reaches nothing."""
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    masks = MaskSet.from_bool(
        {
            "0.weight": torch.tensor([[True, True, False], [False, False, True]]),
            "2.weight": torch.tensor([[True, False], [True, False]]),
        }
    )
    return model, masks, pk.analyze(model, masks, example_inputs=torch.ones(1, 3))


def test_plain_text_is_aligned_and_has_no_blanks_at_line_ends() -> None:
    table = Table(
        (Column("name"), Column("n", right=True), Column("note")),
        [("a", "1", ""), ("longer", "1,000", "x")],
        footer=("total", "1,001", ""),
        title="Title",
    )
    assert table.plain() == (
        "Title\nname        n  note\na           1\nlonger  1,000  x\ntotal   1,001"
    )


def test_markdown_escapes_bars() -> None:
    table = Table((Column("a|b"), Column("n", right=True)), [("x|y", "1")])
    assert table.markdown() == "| a\\|b | n |\n| --- | ---: |\n| x\\|y | 1 |"


def test_layer_table_by_hand() -> None:
    _, masks, topology = two_layers()
    table = layer_table(masks, topology)
    assert table.rows == [
        ("0.weight", "2 x 3", "3", "6", "50.00 %", "1 / 2", "2 / 6", "2", ""),
        ("2.weight", "2 x 2", "2", "4", "50.00 %", "2 / 2", "2 / 4", "2", ""),
    ]
    assert table.footer == ("total", "", "5", "10", "50.00 %", "3 / 4", "4 / 10", "4", "")
    assert all(len(row) == len(table.columns) for row in table.lines)


def test_layer_table_without_topology() -> None:
    _, masks, _ = two_layers()
    assert layer_table(masks).rows[0] == ("0.weight", "2 x 3", "3", "6", "50.00 %")


def test_dead_and_untouched_layers_are_marked() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    masks = MaskSet.from_bool({"0.weight": torch.zeros(2, 3, dtype=torch.bool)})
    topology = pk.analyze(model, masks, example_inputs=torch.ones(1, 3))
    rows = layer_table(masks, topology).rows
    assert [row[-1] for row in rows] == ["dead", "dead"]
    alone = MaskSet.from_bool({"0.weight": torch.ones(2, 3, dtype=torch.bool)})
    rows = layer_table(alone, pk.analyze(model, example_inputs=torch.ones(1, 3))).rows
    assert [row[-1] for row in rows] == ["", "dense"]


def test_mask_of_a_layer_that_the_topology_does_not_know_is_shown() -> None:
    _, _, topology = two_layers()
    masks = MaskSet.from_bool({"rnn.weight": torch.ones(2, 2, dtype=torch.bool)})
    rows = {row[0]: row for row in layer_table(masks, topology).rows}
    assert rows["rnn.weight"] == ("rnn.weight", "2 x 2", "4", "4", "100.00 %", "", "", "", "")


def test_provenance_flattens_and_cuts() -> None:
    masks = MaskSet(
        {},
        {},
        {
            "method": "dpai",
            "arguments": {"alpha": 0.99, "init_scores": None},
            "history": [{"step": 1}] * 3,
            "notes": ["x" * 500],
            "odd": "line\nbreak",
        },
    )
    rows = dict(provenance_table(masks).rows)
    assert rows["arguments.alpha"] == "0.99"
    assert rows["arguments.init_scores"] == "null"
    assert rows["history"] == "3 entries"
    assert len(rows["notes"]) == 160
    assert rows["odd"] == "line\\nbreak"


@pytest.mark.parametrize("history", ["text", 3, None, {"step": 1}])
def test_provenance_survives_odd_history(history: object) -> None:
    assert ("history", "unreadable") in provenance_table(MaskSet({}, {}, {"history": history})).rows


def test_summary_numbers_are_those_of_the_masks_and_the_topology() -> None:
    _, masks, topology = two_layers()
    found = summarize(masks, topology)
    assert (found["kept"], found["total"], found["sparsity"]) == (5, 10, 0.5)
    assert found["log_paths"] == pytest.approx(math.log(4))  # 2 inputs x 1 unit x 2 outputs
    assert (found["effective_nodes"], found["nodes"]) == (3, 4)
    assert found["layers"][0]["dead_channels"] == [1]
    assert found["dead_layers"] == []
    assert found["digest"] == masks.digest


def test_percent_and_logarithms() -> None:
    assert percent(0, 0) == "-"
    assert percent(1, 3) == "33.33 %"
    assert log_text(-math.inf) == "no path"


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "a\nb", "a\r", "\u202eabc", "\x00"])
def test_terminal_control_is_escaped(text: str) -> None:
    assert printable(text).isprintable()


def test_printable_leaves_ordinary_names_alone() -> None:
    assert printable("layer1.0.conv1.weight") == "layer1.0.conv1.weight"
    assert printable("größe Ψ") == "größe Ψ"
