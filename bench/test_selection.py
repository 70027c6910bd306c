"""The selection benchmark: contenders agree, small sizes are timed, large ones keep their distance.

OMP_NUM_THREADS=2 python -m pytest bench/test_selection.py -m "not slow"     seconds
OMP_NUM_THREADS=2 python -m pytest bench/test_selection.py                   10^8 scores too

`python -m bench.run_selection` makes the whole table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import selection_contenders as who
from bench import selection_report
from bench.references.nth_element import nth_element_, read_bytes
from bench.run_selection import grid, main, rivals
from bench.selection_contenders import Contender, contenders_for, measure, thresholds
from bench.selection_data import DISTRIBUTIONS, KEEPS, SIZES, kept_count, make_scores, rows_of
from bench.timing import write_results

SMALL = (10_000, 100_000, 1_000_000)
LARGE = (10_000_000, 100_000_000)
TIMED = (who.OURS, who.TOPK, who.KTHVALUE, who.SORT, who.PARTITION, who.NTH_ELEMENT, who.READ)

#: size -> contender -> least ratio at 10 % of a normal, on a machine that does nothing else.
FLOORS = {
    1_000_000: {who.KTHVALUE: 15},
    10_000_000: {who.KTHVALUE: 30},
    100_000_000: {who.KTHVALUE: 40, who.TOPK: 45, who.PARTITION: 4},
}


def sizes(small: tuple[int, ...], large: tuple[int, ...]) -> list[Any]:
    slow = [pytest.param(size, marks=pytest.mark.slow) for size in large]
    return [*small, *slow]


@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize("size", sizes(SMALL, LARGE))
def test_time_of_keeping_a_tenth(benchmark: Any, size: int, name: str) -> None:
    benchmark.group = f"{size:,} normal magnitudes"
    scores = make_scores("normal", size)
    contender = contenders_for(scores, kept_count(size, 0.1), [*who.RIVALS, *who.FLOORS])[name]
    prepare = contender.prepare
    benchmark.pedantic(
        contender.action,
        setup=None if prepare is None else lambda: ((prepare(),), {}),
        rounds=5 if size <= 10**6 else 3,
        warmup_rounds=1,
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", FLOORS)
def test_distance_to_the_others(size: int) -> None:
    scores = make_scores("normal", size)
    pairs = measure(contenders_for(scores, kept_count(size, 0.1), FLOORS[size]))
    ratios = {name: other.seconds / ours.seconds for name, (ours, other) in pairs.items()}
    assert all(ratios[name] >= least for name, least in FLOORS[size].items()), ratios


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_never_slower_than_np_partition(name: str) -> None:
    scores = make_scores(name, 10_000_000)
    for keep in KEEPS:
        k = kept_count(scores.numel(), keep)
        ours, other = measure(contenders_for(scores, k, [who.PARTITION]))[who.PARTITION]
        assert ours.seconds <= other.seconds, keep


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_contenders_find_the_same_threshold(name: str, keep: float) -> None:
    found = thresholds(make_scores(name, 50_000), kept_count(50_000, keep))
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_are_what_they_say(name: str) -> None:
    scores = make_scores(name, 40_000)
    assert torch.equal(scores, make_scores(name, 40_000))
    assert float(scores.min()) >= 0
    distinct = scores.unique().numel()
    steps = scores.diff()
    assert {
        "levels": distinct == 256,
        "equal": distinct == 1,
        "ascending": bool((steps >= 0).all()),
        "descending": bool((steps <= 0).all()),
        "zeros": 0.94 < float((scores == 0).float().mean()) < 0.96,
        "bf16": torch.equal(scores, scores.bfloat16().float()),
    }.get(name, distinct > 39_000 and not bool((steps >= 0).all()))


def test_nth_element_and_read_by_hand() -> None:
    for dtype in (np.float32, np.float64):
        assert [nth_element_(np.array([2, 5, 1, 5], dtype=dtype), k) for k in (1, 2, 3, 4)] == [
            5, 5, 2, 1,
        ]  # fmt: skip
    with pytest.raises(ValueError, match=r"k must be in \[1, 2\], got 3"):
        nth_element_(np.zeros(2, dtype=np.float32), 3)
    words = torch.randint(0, 2**40, (12_345,), generator=torch.Generator().manual_seed(0))
    wanted = int(np.bitwise_xor.reduce(words.numpy()))
    assert {read_bytes(words, threads) for threads in (1, 2, 3)} == {wanted}


def test_a_contender_does_not_count_its_preparation() -> None:
    clock: list[str] = []
    contender = Contender(lambda held: clock.append(held), lambda: "prepared")
    other = Contender(lambda: None)
    pairs = measure({who.OURS: contender, "other": other}, spent=0.01)
    assert set(clock) == {"prepared"}
    assert {median.samples for median in pairs["other"]} == {5}
    assert contender.loops > 1


def test_the_grid_meets_every_pair_at_ten_million() -> None:
    cells = list(grid(SIZES, (1, 2), tuple(DISTRIBUTIONS)))
    pairs = {(c.distribution, c.keep) for c in cells if c.size == 10**7 and c.threads == 2}
    assert pairs == {(name, keep) for name in DISTRIBUTIONS for keep in KEEPS}
    assert {c.size for c in cells} == set(SIZES)
    assert not {who.SORT, who.TOPK, who.KTHVALUE} & set(rivals(10**9, "normal", 0.1, True))


def example_rows() -> list[dict[str, Any]]:
    cell = {
        "op": "topk_mask", "size": 10**8, "distribution": "normal", "keep": 0.1, "threads": 1,
        "dtype": "float32", "layout": "contiguous",
    }  # fmt: skip
    rivals = {who.KTHVALUE: 2.0, who.TOPK: 1.0, who.PARTITION: 0.5, who.SUM: 0.025, who.READ: 0.02}
    large = {name: ((0.04, 3), (seconds, 3)) for name, seconds in rivals.items()}
    small = {**cell, "size": 10**4, "distribution": "equal"}
    return [
        *rows_of(cell, large),
        *rows_of(small, {who.PARTITION: ((2e-5, 9), (1e-5, 9))}),
    ]


def test_the_page_says_what_the_results_file_says(tmp_path: Path) -> None:
    written = write_results("selection", example_rows(), threads=1, seeds=[0], folder=tmp_path)
    page, plot = tmp_path / "page.md", tmp_path / "images" / "plot.png"
    selection_report.write(written, page, plot)
    lines = page.read_text().splitlines()
    said = {line.split(" | ")[0].strip("| "): line for line in lines if " | " in line}
    met = said["10^8 fp32, 10 %, 1 thread: against torch.kthvalue"]
    assert "| 50.0x | met |" in met
    assert "| 25.0x | **missed** |" in said["10^8 fp32, 10 %, 1 thread: against torch.topk"]
    assert "| 2.00x | met |" in said["10^8 fp32, 10 %, 1 thread: over reading the data"]
    assert "| 0.50x | **missed** |" in said["worst cell of 10^4: against np.partition"]
    assert "not measured" in said["2^31 + 1024 scores"]
    losses = lines[lines.index("## Losses") : lines.index("## The grid")]
    assert sum(line.startswith("| 10^") for line in losses) == 1
    assert "](images/plot.png)" in page.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_report_only_needs_nothing_but_the_results(tmp_path: Path) -> None:
    write_results("selection", example_rows(), threads=1, seeds=[0], folder=tmp_path)
    before = json.loads((tmp_path / "selection.json").read_text())
    assert main(["--report-only", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "selection.md").exists()
    assert json.loads((tmp_path / "selection.json").read_text()) == before
