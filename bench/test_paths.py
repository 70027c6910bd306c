"""The path benchmark: operations are timed one by one, references agree, the page tells the file.

OMP_NUM_THREADS=2 python -m pytest bench/test_paths.py -m "not slow"     seconds
OMP_NUM_THREADS=2 python -m pytest bench/test_paths.py                   [8192, 8192] too

`python -m bench.run_paths` makes the whole table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench import paths_report, paths_results, paths_sweeps
from bench.paths_process import LOOP, MILLION, OURS, ROUNDS, Case, Measurer, Usage, side_of, stack
from bench.paths_profile import PARTS, layer_from, layers_of, parts_of, profile, states_of
from bench.paths_profile_report import cost_of, one_profile
from bench.paths_runs import LOOP as LOOP_NAME
from bench.paths_runs import compare_synflow, overlap
from bench.paths_scaling import rows_of, slope, usage_rows
from bench.paths_sweeps import ABS, COMPOSITION, READ, make_layer, threshold_of
from bench.references import path_layer
from bench.references.peaks import Peaks, measure, multiply_adds
from bench.run_paths import main
from paikern import ops, zoo

SIDES = (1024, pytest.param(8192, marks=pytest.mark.slow))
DTYPES = (torch.float32, torch.bfloat16)
MASKS = (0.0, 0.9)
PEAKS = Peaks(threads=2, copy=1e10, read=1e10, multiply_adds=1e11)

#: Least speed-up over |W| made and multiplied, on two cores of a machine that does nothing else.
LEAST_OVER_ABS = 12
MOST_OVER_READ = 1.1


def ids(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def sweep_actions(side: int, dtype: torch.dtype, removed: float) -> dict[str, Callable[[], object]]:
    """Name of an operation, or of what it is compared with -> a call."""
    layer = make_layer(side, dtype, removed)
    weight, packed, floats, x, g, _ = layer
    threshold = threshold_of(layer)
    return {
        "path_forward": lambda: ops.path_forward(weight, x, mask=packed),
        "path_backward": lambda: ops.path_backward(weight, g, mask=packed),
        "path_sweep": lambda: ops.path_sweep(weight, x, g, threshold, mask=packed),
        "torch forward": lambda: path_layer.forward(weight, x, floats),
        "torch backward": lambda: path_layer.backward(weight, g, floats),
        "torch composition": lambda: path_layer.sweep(weight, x, g, threshold, floats),
        "torch.sum": weight.sum,
    }


@pytest.mark.parametrize("name", sweep_actions(8, torch.float32, 0.0))
@pytest.mark.parametrize("removed", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("side", SIDES)
def test_time_of_a_sweep(
    benchmark: Any, side: int, dtype: torch.dtype, removed: float, name: str
) -> None:
    benchmark.group = f"{side} x {side} {dtype}, {removed:.0%} masked"
    action = sweep_actions(side, dtype, removed)[name]
    benchmark.pedantic(action, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["layer1.0.conv1", "layer2.0.downsample.0", "fc"])
def test_time_of_a_dpai_operation(benchmark: Any, name: str, part: str) -> None:
    benchmark.group = f"DPaI on ResNet-20: {part}"
    model = zoo.create("resnet20", seed=0)
    layers = layers_of(model, zoo.example_input(model))
    layer = next(held for held in layers if held.name == f"{name}.weight")
    (state,) = states_of([layer], [torch.randn(layer.weight)])
    benchmark.pedantic(parts_of(layer, state)[part], rounds=5, warmup_rounds=1)


@pytest.mark.slow
def test_path_forward_keeps_its_distance() -> None:
    rows = [
        row
        for row in paths_sweeps.run([torch.get_num_threads()], quick=False)
        if row["op"] == "path_forward" and row["dtype"] == "float32" and not row["sparsity"]
    ]
    over = paths_report.over_read(rows)
    assert over is not None
    assert over <= MOST_OVER_READ, rows
    least = paths_report.against(rows, ABS)
    assert least is not None
    assert least >= LEAST_OVER_ABS, rows


@pytest.mark.parametrize("removed", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_the_contenders_of_a_sweep_compute_the_same(dtype: torch.dtype, removed: float) -> None:
    layer = make_layer(96, dtype, removed)
    weight, packed, floats, x, g, _ = layer
    wide = weight.double().abs() if floats is None else weight.double().abs() * floats.double()
    rtol = 1e-5 if dtype == torch.float32 else 3e-2
    z, back = ops.path_forward(weight, x, mask=packed), ops.path_backward(weight, g, mask=packed)
    for found in (z, path_layer.forward(weight, x, floats)):
        torch.testing.assert_close(found.double(), wide @ x.double(), rtol=rtol, atol=0.0)
    for found in (back, path_layer.backward(weight, g, floats)):
        torch.testing.assert_close(found.double(), g.double() @ wide, rtol=rtol, atol=0.0)
    threshold = threshold_of(layer)
    adjoint, kept, count = path_layer.sweep(weight, x, g, threshold, floats)
    torch.testing.assert_close(adjoint, path_layer.backward(weight, g, floats))
    scores = wide * x.double() * g.double()[:, None]
    assert count == int(kept.sum())
    assert abs(count - int((scores > threshold).sum())) <= (0 if dtype == torch.float32 else 40)
    share = count / (weight.numel() * (1 - removed))
    assert 0.05 < share < 0.2  # a tenth of those that the mask leaves
    if dtype == torch.float32:
        ours, bits, ours_count = ops.path_sweep(weight, x, g, threshold, mask=packed)
        assert torch.equal(ours, back)
        assert torch.equal(ops.unpack_mask(bits, list(weight.shape)), kept)
        assert int(ours_count) == count


def test_multiply_adds_by_hand() -> None:
    # 192 sums start at 0 to 11, 16 lanes each, and one round halves them and adds 1.
    assert multiply_adds(1, 1) == 16 * (66 / 2 + 12)
    assert multiply_adds(0, 2) == 2 * 16 * 66
    with pytest.raises(ValueError, match="threads >= 1, got 5, 0"):
        multiply_adds(5, 0)
    found = measure(1, size=1 << 20, rounds=1000)
    assert min(found) > 0
    assert found.threads == 1


@pytest.mark.parametrize("name", ["resnet20", "vgg19_bn"])
def test_multiply_adds_of_a_layer_are_those_of_a_convolution_of_ones(name: str) -> None:
    model = zoo.create(name, seed=0)
    layers = layers_of(model, zoo.example_input(model))
    assert sum(layer.kept for layer in layers) >= 0.02 * sum(math.prod(x.weight) for x in layers)
    for layer in layers:
        x, ones = torch.ones(layer.x), torch.ones(layer.weight)
        if layer.geometry is None:
            dense = F.linear(x, ones)
        else:
            stride, padding, dilation, groups = layer.geometry
            dense = F.conv2d(x, ones, None, stride, padding, dilation, groups)
        assert tuple(dense.shape) == layer.y
        assert layer.multiply_adds("update") == int(dense.double().sum())
        density = layer.kept / math.prod(layer.weight)
        assert layer.multiply_adds("forward") == pytest.approx(
            density * float(dense.double().sum()), abs=1
        )


def test_limit_is_the_larger_of_bytes_and_multiply_adds() -> None:
    model = zoo.create("resnet20", seed=0)
    first, *_, last = layers_of(model, zoo.example_input(model))
    assert first.limit("update", PEAKS) == first.multiply_adds("update") / 1e11
    assert last.weight == (10, 64)
    assert last.limit("update", PEAKS) == (24 * 640 + 80) / 1e10
    assert last.limit("forward", PEAKS) == 80 / 1e10


def test_a_profile_adds_up() -> None:
    found = json.loads(json.dumps(profile("resnet20", steps=1)))
    assert found["seconds"] > 0
    assert [layer_from(row).kind for row in found["layers"]].count("linear") == 1
    cost = cost_of(found["layers"], PEAKS)
    assert cost.total == pytest.approx(sum(row[part] for row in found["layers"] for part in PARTS))
    lines = [line.split(" | ") for line in one_profile(found, PEAKS)]
    sums = {line[0].removeprefix("| "): line[5] for line in lines if len(line) == 10}
    whole = float(sums.pop("**step**"))
    parts = [float(text) for text in sums.values() if text[-1].isdigit()]
    assert len(parts) == 5  # three kinds of layers, selection, rest
    assert sum(parts) == pytest.approx(whole, rel=0.02)
    assert whole == pytest.approx(1e3 * found["seconds"], rel=0.02)


def test_a_synflow_run_is_compared_with_the_loop() -> None:
    rows = compare_synflow("resnet20", rounds=4, repeats=1)
    assert [row["variant"] for row in rows] == ["published", "paper"]
    for row in rows:
        assert row["kept"] == 5418
        # The loop drops what ties with its threshold: on two threads two scores round to one.
        assert 5417 <= row["reference_kept"] <= 5418
        assert row["overlap_3_rounds"] >= 0.999
        assert row["overlap"] >= 0.99
        assert row["log_paths"] == pytest.approx(row["reference_log_paths"], abs=0.1)


def test_overlap_by_hand() -> None:
    left = {"a": torch.tensor([True, False, True]), "b": torch.tensor([True])}
    right = {"a": torch.tensor([True, True, False]), "b": torch.tensor([True])}
    assert overlap(left, right) == pytest.approx(2 / 3)


def test_cases_say_what_they_do_not_know() -> None:
    assert Case.parse("torch:stack-64") == Case(LOOP, "stack-64")
    for text in ("paikern", "numpy:vgg16_bn", "torch:stack", "torch:stack-x", "torch:lenet"):
        with pytest.raises(ValueError, match="unknown case"):
            Case.parse(text)
    assert [parameter.shape for parameter in stack(side_of("stack-1")).parameters()] == [
        (512, 512)
    ] * 4


def test_memory_is_measured_beyond_the_model() -> None:
    with Measurer(1) as measurer:
        ours, loop = (measurer(f"{who}:stack-4") for who in (OURS, LOOP))
    assert ours.weights == 4 * MILLION
    assert ours.weight_bytes == 4 * ours.weights
    # The loop holds at least its copy, a float mask, gradients, scores and their concatenation.
    assert loop.ratio > 5
    assert ours.ratio < 2
    assert ours.kept == ours.weights - math.floor(0.9 * ours.weights)
    assert abs(loop.kept - ours.kept) <= 10
    assert loop.rounds % (ROUNDS[LOOP] - 1) == 0
    assert 0 < ours.round_seconds < loop.round_seconds


def usage(who: str, millions: int, seconds: float) -> Usage:
    weights = 4 * side_of(f"stack-{millions}") ** 2
    name, kept = f"{who}:stack-{millions}", weights // 10
    return Usage(name, weights, 4 * weights, weights, seconds, 5, kept, "float32")


def test_slope_uses_the_sizes_it_names() -> None:
    straight = [(float(m * MILLION), 3.0 * m) for m in (8, 64, 512)]
    assert slope(straight) == pytest.approx(1.0)
    bent = [(MILLION * 1.0, 1e6), *straight, (1024.0 * MILLION, 1e6)]
    assert slope(bent) == slope(straight)
    assert slope(straight[:2]) is None


def example_sections() -> dict[str, dict[str, Any]]:
    layer = make_layer(16, torch.float32, 0.0)
    held = {ABS: 13.0, READ: 0.5, paths_sweeps.SUM: 0.8}
    sweep = {COMPOSITION: 20.0, READ: 0.6}
    rows = [
        {
            "section": "sweeps", "op": op, "size": "16 x 16", "dtype": "float32", "sparsity": 0.0,
            "threads": 2, "reference": name, "seconds": 1e-3, "reference_seconds": 1e-3 * ratio,
            "ratio": ratio, "bytes": layer.weight.nbytes,
        }
        for op, ratios in (("path_forward", held), ("path_sweep", sweep))
        for name, ratio in ratios.items()
    ]  # fmt: skip
    usages = [usage(OURS, m, 1e-3 * m) for m in (8, 64, 512)] + [usage(LOOP, 8, 0.1)]
    run = {
        "section": "runs", "method": "synflow", "model": "vgg16_bn", "sparsity": 0.98,
        "rounds": 100, "threads": 2, "kept": 5, "reference_kept": 0, "overlap": 0.0,
        "overlap_3_rounds": 1.0, "log_paths": 41.5, "reference_log_paths": None,
    }  # fmt: skip
    pairs = [("paper", 26.0), ("published", 24.0)]
    return {
        "sweeps": {"rows": rows, "measured": "today", "duration": 1.0},
        "runs": {
            "rows": [
                {**run, "variant": variant, "reference": LOOP_NAME, "seconds": 1.0,
                 "reference_seconds": ratio, "ratio": ratio}
                for variant, ratio in pairs
            ],
            "measured": "today",
            "duration": 2.0,
        },
        "scaling": {
            "rows": rows_of(usages, 2),
            "usages": usage_rows(usages),
            "left_out": ["torch:stack-64"],
            "measured": "today",
            "duration": 3.0,
        },
    }  # fmt: skip


def test_the_page_says_what_the_results_file_says(tmp_path: Path) -> None:
    written = paths_results.save(tmp_path, example_sections(), 2)
    page, plot = tmp_path / "page.md", tmp_path / "images" / "plot.png"
    paths_report.write(written, page, plot)
    lines = page.read_text().splitlines()
    said = {line.split(" | ")[0].removeprefix("| "): line for line in lines if " | " in line}
    forward = "`path_forward`, float32, 2 threads"
    assert "| 2.00x | **missed** |" in said[f"{forward}: over a read"]
    assert "| 13.0x | met |" in said[f"{forward}: against torch \\|W\\|"]
    fused = "`path_sweep`, float32, 2 threads"
    assert "| 1.67x | met |" in said[f"{fused}: over a read"]
    assert "| 20.0x | **missed** |" in said[f"{fused}: against torch composition"]
    assert "| 24.0x | **missed** | variant published |" in said["synflow, vgg16_bn, whole run"]
    assert "not measured" in said["px, resnet20, whole run"]
    growth = said["growth of a round's time from 8 M to 512 M weights: exponent"]
    assert "| 1.000 | met |" in growth
    assert "| 12.5x |" in said["stack-8"]  # 100 ms of the loop over 8 ms
    assert "41.500 / none" in said["synflow, paper"]
    assert "](images/plot.png)" in page.read_text()
    assert "Left out for want of memory or time: torch:stack-64." in page.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_growth_is_judged_on_all_sizes_only(tmp_path: Path) -> None:
    sections = example_sections()
    del sections["scaling"]["usages"][2]
    results = paths_results.content_of(sections) | {"threads": 2}
    assert paths_report.outcomes(results)[-1].value is None


def test_sections_are_measured_again_one_by_one(tmp_path: Path) -> None:
    sections = example_sections()
    written = paths_results.save(tmp_path, sections, 2)
    kept = paths_results.earlier(written, 2, ["runs"])
    assert set(kept) == {"sweeps", "scaling"}
    assert kept["sweeps"]["rows"] == json.loads(json.dumps(sections["sweeps"]["rows"]))
    assert kept["scaling"]["usages"] == sections["scaling"]["usages"]
    assert paths_results.earlier(written, 1, ["runs"]) == {}
    content = json.loads(written.read_text())
    content["versions"]["torch"] = "0.0"
    written.write_text(json.dumps(content))
    assert paths_results.earlier(written, 2, ["runs"]) == {}
    assert paths_results.earlier(tmp_path / "none.json", 2, []) == {}


def test_report_only_needs_nothing_but_the_results(tmp_path: Path) -> None:
    written = paths_results.save(tmp_path, example_sections(), 2)
    before = written.read_text()
    assert main(["--report-only", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "paths.md").exists()
    assert (tmp_path / "paths.png").exists()
    assert written.read_text() == before
