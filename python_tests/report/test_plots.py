"""Plots: there when there is something to show, and robust against odd files."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET

import matplotlib.image
import numpy as np
import pytest
import torch

import paikern as pk
from paikern.masks import MaskSet
from paikern.report import plots


@pytest.fixture(scope="module")
def lenet() -> tuple[MaskSet, pk.Topology]:
    model = pk.zoo.create("mlp", sizes=(12, 10, 6, 4), seed=0)
    masks = pk.prune(model, "random", sparsity=0.5, scope="erk", apply=False)
    return masks, pk.analyze(model, masks, example_inputs=torch.ones(1, 12))


def drawn(figure: object) -> ET.Element:
    """The SVG as XML; a layout that does not fit is an error."""
    assert figure is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ET.fromstring(plots.svg(figure, "p"))  # type: ignore[arg-type]


def texts(root: ET.Element) -> list[str]:
    return [e.text or "" for e in root.iter() if e.tag.endswith("text")]


def test_density_names_every_layer(lenet: tuple[MaskSet, pk.Topology]) -> None:
    masks, topology = lenet
    found = texts(drawn(plots.density_figure(masks, topology)))
    assert set(masks) <= set(found)
    assert "effective nodes" in found
    assert "effective nodes" not in texts(drawn(plots.density_figure(masks)))


def test_density_of_hundreds_of_layers_numbers_them() -> None:
    many = {f"layer{i}.weight": torch.ones(2, 2, dtype=torch.bool) for i in range(200)}
    found = texts(drawn(plots.density_figure(MaskSet.from_bool(many))))
    assert "layer0.weight" not in found
    assert "layer, in model order" in found


def test_density_shows_layers_that_keep_nothing() -> None:
    masks = MaskSet.from_bool({"a": torch.ones(2, 2) == 1, "b": torch.zeros(2, 2) == 1})
    assert "nothing kept" in texts(drawn(plots.density_figure(masks)))
    empty = MaskSet.from_bool({"b": torch.zeros(2, 2) == 1})
    assert "nothing kept" in texts(drawn(plots.density_figure(empty)))


def test_nothing_to_show_is_none() -> None:
    nothing = MaskSet({}, {})
    assert plots.density_figure(nothing) is None
    assert plots.mask_figure(nothing) is None
    assert plots.run_figure({"x": []}) is None
    assert plots.run_figure({"magnitude": [{"round": 1, "density": 0.1}]}) is None


def test_run_has_a_panel_for_each_quantity() -> None:
    history = [{"step": i, "log_paths": float(i), "effective_nodes": 9 - i} for i in range(1, 5)]
    found = texts(drawn(plots.run_figure({"dpai": history})))
    assert {"log effective paths", "effective nodes", "step"} <= set(found)
    rounds = [{"round": i, "density": 1 / i} for i in range(1, 5)]
    assert "round" in texts(drawn(plots.run_figure({"synflow": rounds})))


@pytest.mark.parametrize(
    "history",
    [
        None,
        "text",
        [1, 2, 3],
        [{"step": 1, "x": "text"}, {"step": 2}],
        [{"step": 1, "x": True}, {"step": 2, "x": None}],
        [{"x": float("nan")}, {"x": float("inf")}],
    ],
)
def test_histories_without_numbers_are_left_out(history: object) -> None:
    assert plots.run_figure({"odd": history}) is None


@pytest.mark.parametrize(
    "history",
    [
        [{"step": "a", "x": 1}, {"step": None, "x": 2}],
        [{"x": 1.0}, "text", {"x": 10**400}, {"x": 3.0}],
        [{"step": 1, "x": 1.0}, {"step": 2, "x": float("inf")}],
    ],
)
def test_odd_entries_do_not_stop_the_others(history: object) -> None:
    drawn(plots.run_figure({"odd": history}))


def test_mask_pictures_show_the_bits(lenet: tuple[MaskSet, pk.Topology]) -> None:
    masks, _ = lenet
    root = drawn(plots.mask_figure(masks))
    images = [e for e in root.iter() if e.tag.endswith("image")]
    assert len(images) == len(masks) == 3


def test_mask_pictures_leave_large_layers_out() -> None:
    masks = MaskSet.from_bool({"big": torch.ones(1000, 1000) == 1, "bias": torch.ones(9) == 1})
    assert plots.mask_figure(masks) is None


def test_png_holds_the_mask() -> None:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:8] = True
    figure = plots.mask_figure(MaskSet.from_bool({"half": mask}))
    assert figure is not None
    picture = matplotlib.image.imread(io.BytesIO(plots.png(figure)))[..., :3]
    blue = np.array([int(plots.BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    share = (np.abs(picture - blue).max(-1) < 0.02).mean()
    height, width = figure.get_size_inches()[::-1]
    assert share == pytest.approx(0.5 * 1.2 * 1.2 / (height * width), rel=0.05)


def test_svg_takes_the_colour_of_the_page_and_names_nothing_outside() -> None:
    masks = MaskSet.from_bool({"$x$ <&> \x1b[0m": torch.ones(3, 3) == 1})
    text = plots.svg(plots.density_figure(masks), "one")  # type: ignore[arg-type]
    assert text.startswith("<svg")
    assert "currentColor" in text
    assert plots.INK not in text
    assert "<metadata" not in text
    assert "$x$ &lt;&amp;&gt; \\x1b[0m" in text
    assert set(re.findall(r'href="(.)', text)) <= {"#"}
    ids, used = re.findall(r' id="([^"]*)', text), re.findall(r"url\(#([^)]*)", text)
    assert all(name.startswith("one-") for name in ids + used)


def test_svg_is_the_same_every_time(lenet: tuple[MaskSet, pk.Topology]) -> None:
    first, again = (plots.svg(plots.density_figure(*lenet), "p") for _ in range(2))  # type: ignore[arg-type]
    assert first == again


def test_comparison_labels_dead_networks() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    dead = MaskSet.from_bool({"0.weight": torch.zeros(2, 3) == 1})
    topologies = {
        "dense": pk.analyze(model, example_inputs=torch.ones(1, 3)),
        "dead": pk.analyze(model, dead, example_inputs=torch.ones(1, 3)),
    }
    found = texts(drawn(plots.comparison_figure(topologies)))
    assert "no path" in found
    assert "2.48" in found  # log 12


def test_plots_leave_matplotlibs_settings_alone(lenet: tuple[MaskSet, pk.Topology]) -> None:
    before = dict(matplotlib.rcParams)
    plots.svg(plots.density_figure(*lenet), "p")  # type: ignore[arg-type]
    assert dict(matplotlib.rcParams) == before
