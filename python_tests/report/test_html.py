"""The page: self-contained, escaped, whole."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import paikern as pk
from paikern.masks import MaskSet
from paikern.report import write_report
from paikern.report.html import report_page

_VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def run() -> tuple[MaskSet, pk.Topology]:
    model = pk.zoo.create("mlp", sizes=(8, 8, 4), seed=0)
    x = torch.ones(1, 8)
    masks = pk.prune(model, "dpai", sparsity=0.5, example_inputs=x, steps=5, apply=False)
    return masks, pk.analyze(model, masks, example_inputs=x)


def test_page_holds_tables_plots_and_provenance(run: tuple[MaskSet, pk.Topology]) -> None:
    text = report_page(*run, notes=["a note"])
    page = Page(text)
    assert not page.open
    shown = " ".join(page.text)
    for expected in ("dpai at 50.00 % sparsity", "Layers", "Along the run", "Masks", "a note"):
        assert expected in shown
    for name in run[0]:
        assert name in shown
    assert page.tags.count("svg") == 3


def test_page_loads_nothing(run: tuple[MaskSet, pk.Topology]) -> None:
    page = Page(report_page(*run))
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value.startswith(("#", "data:image/png;base64,")), (name, value[:60])
        assert not name.startswith("on")
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in [
        (name, " ".join(value.split())) for name, value in page.attributes
    ]


def test_hostile_texts_are_escaped() -> None:
    evil = '<script>alert("x")</script><img src=http://evil.example/a>'
    masks = MaskSet(
        {evil: torch.tensor([255], dtype=torch.uint8)},
        {evil: (2, 4)},
        {
            "method": evil,
            "model": evil,
            "notes": [evil],
            evil: {evil: evil},
            "history": [{"step": 1, evil: 1.0}, {"step": 2, evil: 2.0}],
        },
    )
    page = Page(report_page(masks, None, notes=[evil]))
    assert not page.open
    assert {"script", "img"}.isdisjoint(page.tags)
    assert any(evil in text for text in page.text)


def test_braces_in_texts_are_left_alone() -> None:
    masks = MaskSet({}, {}, {"method": "{title}", "model": "{0}{body}"})
    assert "{title} at" in report_page(masks, None)


def test_page_without_topology_or_metadata() -> None:
    page = Page(report_page(MaskSet.from_bool({"w": torch.ones(2, 2) == 1}), None))
    assert not page.open
    assert "0.00 % sparsity" in " ".join(page.text)


def test_dead_layers_stand_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    masks = MaskSet.from_bool({"0.weight": torch.zeros(2, 3) == 1})
    topology = pk.analyze(model, masks, example_inputs=torch.ones(1, 3))
    text = report_page(masks, topology)
    assert text.count('class="bad">dead<') == 2
    assert "no path" in text


def test_write_report_is_atomic(
    run: tuple[MaskSet, pk.Topology], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.html"
    write_report(*run, path)
    whole = path.read_text(encoding="utf-8")
    assert whole.endswith("</html>\n")

    def fail(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(*run, path, notes=["other"])
    assert path.read_text(encoding="utf-8") == whole
    assert os.listdir(tmp_path) == ["page.html"]


def test_large_models_give_small_pages() -> None:
    bits = {f"layer{i}.weight": torch.ones(512, 512) == 1 for i in range(8)}
    bits |= {f"small{i}.weight": torch.rand(500, 500) > 0.9 for i in range(8)}
    assert len(report_page(MaskSet.from_bool(bits), None)) < 2_000_000
