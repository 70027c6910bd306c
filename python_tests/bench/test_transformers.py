"""The benchmark of pretrained transformers on a tiny one: measures, texts, the page."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import run_transformers as bench
from bench.pretrained import pairs, text, windows
from python_tests.scorers.data_nets import transformer


class Words:
    """A tokenizer that numbers words by their length."""

    cls_token_id, sep_token_id = 38, 39

    def __call__(self, given: str, **options: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[min(len(word), 37) for word in given.split()]])}


def test_texts_do_not_overlap() -> None:
    calibrate, measure = text("calibrate"), text("measure")
    assert len(calibrate) >= len(measure) > 10
    assert set(calibrate).isdisjoint(measure)


def test_windows_and_pairs() -> None:
    found = windows(Words(), "measure", 5, 11)
    assert found.shape == (5, 11)
    assert not torch.equal(found[0], found[4])
    halves = pairs(Words(), "measure", 3, 8)
    assert halves.shape == (6, 8)
    assert halves[:, 0].tolist() == [38] * 6
    assert halves[:, -1].tolist() == [39] * 6
    with pytest.raises(ValueError, match="are fewer than"):
        windows(Words(), "measure", 10**6, 11)


def test_perplexity_is_that_of_the_loss() -> None:
    model, data = transformer("llama")
    model.eval()
    ids = data["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.exp().item()
    assert bench.perplexity(model, ids) == pytest.approx(expected, rel=1e-4)


def test_contrast_wants_halves_to_find_each_other() -> None:
    class Outputs:
        def __init__(self, rows: torch.Tensor) -> None:
            self.last_hidden_state = rows[:, None].expand(-1, 3, -1)

    rows = torch.eye(4)
    right = bench.contrast(Outputs(torch.cat([rows, rows])), None)
    wrong = bench.contrast(Outputs(torch.cat([rows, rows.flip(0)])), None)
    assert right < 1e-6 < wrong


def test_page() -> None:
    none = {"seconds": 1.0, "reference_seconds": None, "ratio": None, "model": "smollm2"}
    rows = [
        {**none, "method": "dense", "sparsity": 0.0, "perplexity": 10.0},
        {**none, "method": "Wanda, row", "sparsity": 0.5, "perplexity": 20.5, "empty_layers": 1},
        {**none, "method": "Wanda, row", "sparsity": 0.7, "perplexity": 2e6, "empty_layers": 3},
    ]
    page = bench.page_text(
        {
            "machine": {"cpu": "a cpu", "cores": 2}, "threads": 1, "versions": {"torch": "2"},
            "rows": rows,
        }
    )  # fmt: skip
    assert "Dense: 10.0." in page
    assert "| Wanda, row | 20.5 | 2.0e+06 | 3 | 1.0 s |" in page
    assert "MiniLM-L6-v2: embeddings" not in page


def test_a_complete_run_has_nothing_left_to_do() -> None:
    have = {("smollm2", way, s) for way in bench.WAYS for s in (0.3, 0.5)}
    have.add(("smollm2", "dense", 0.0))
    assert list(bench.rows_of("smollm2", (0.3, 0.5), have)) == []
