"""The GPU check and the GPU benchmark, tried on the CPU at tiny sizes."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_check, gpu_cub, gpu_runs, gpu_selection, gpu_sweeps, run_gpu
from bench.gpu_clock import Clock, normal, rotated
from bench.timing import RESULTS
from python_tests.cuda_source import shim

SANITIZER = """#!/bin/sh
for word in "$@"; do
  case "$word" in
    --log-file=*) echo "========= ERROR SUMMARY: {errors} errors" > "${{word#--log-file=}}" ;;
  esac
done
while [ "${{1#--}}" != "$1" ]; do shift; done
exec "$@"
"""


@pytest.fixture
def check(tmp_path: Path) -> gpu_check.Check:
    return gpu_check.Check(tmp_path / "out", "cpu", 120.0)


def test_benchmark_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_gpu.main(["--out", str(tmp_path), "--device", "cpu", "--tiny"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["left_out"] == []
    assert {row["op"] for row in found["rows"]} == {"path", "topk", "masked_linear"}
    assert {row.get("method") for row in found["rows"]} >= {"synflow", "dpai"}
    for row in found["rows"]:
        assert row["seconds"] > 0, row
        assert math.isclose(row["ratio"], row["reference_seconds"] / row["seconds"])
        assert row["bandwidth_fraction"] > 0, row
        assert row.get("masks_agree", True), row
        assert row.get("close", True), row
        assert row.get("mask_agreement", 1.0) > 0.9, row
    assert "of a copy" in capsys.readouterr().out
    # A part for which there is no time is named.
    late = ["--out", str(tmp_path), "--device", "cpu", "--tiny", "--seconds", "1e-9"]
    assert run_gpu.main(late) == 1
    assert "SynFlow: no time left" in json.loads((tmp_path / "gpu.json").read_text())["left_out"]


def test_a_round_is_what_more_rounds_take() -> None:
    assert math.isclose(gpu_runs._each(1.3, 100, 0.5, 20), 0.01)
    assert gpu_runs._each(1.0, 100, 1.1, 20) == 0.01  # noise


def test_benchmark_wants_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_gpu.main(["--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "no GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_is_named_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(gpu_sweeps, "layer", broken)
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--tiny", "--only", "sweeps"]
    assert run_gpu.main(arguments) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "layer of 1 MB, float32: RuntimeError: no such kernel" in found["left_out"]
    assert {row["kernel"] for row in found["rows"]} == {"round"}


def test_bytes_of_a_sweep() -> None:
    assert gpu_sweeps.moved("path_forward", (10, 100), 2) == 2000 + 4 * 110
    assert gpu_sweeps.moved("path_sweep", (10, 100), 4) == 4000 + 4 * 210 + 125
    assert sum(math.prod(shape) for shape in gpu_sweeps.resnet50()) == 25_502_912
    assert sum(math.prod(shape) for shape in gpu_sweeps.seven_billion()) == 6_476_005_376


def test_inputs_are_random_and_as_many_as_no_cache_holds() -> None:
    device = torch.device("cpu")
    first, second = (normal((1000,), torch.float32, device, seed) for seed in (0, 1))
    assert torch.equal(first, normal((1000,), torch.float32, device, 0))
    assert not torch.equal(first, second)
    assert abs(float(first.std()) - 1) < 0.1
    assert len(rotated(object, 64 << 20)) == 4
    assert len(rotated(object, 1 << 30)) == 1
    assert len(rotated(object, 1000)) == 8


def test_contenders_take_turns_of_inputs() -> None:
    seen: list[tuple[str, int]] = []
    clock = Clock("cpu", seconds=1.0, most=4)
    found = clock.times({name: lambda i, n=name: seen.append((n, i)) for name in "ab"})
    assert found["a"].samples == 4
    assert [i for name, i in seen if name == "a"] == [0, 1, 2, 3, 4, 5]
    assert [name for name, _ in seen[4:8]] == ["b", "a", "a", "b"]


def test_a_contender_that_does_not_fit_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(index: int) -> None:
        raise torch.OutOfMemoryError("out of memory\nmore")

    clock = Clock("cpu", 0.01, 3)
    found = gpu_selection._measured(clock, {"torch.topk": lambda i: i, "torch.sort": broken})
    assert list(found) == ["torch.topk"]
    assert capsys.readouterr().out == "torch.sort: out of memory\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cub_compiles_and_says_what_it_is() -> None:
    cub = gpu_cub.compiled("sm_90")
    assert cub.name.startswith("cub::Device")
    assert int(cub.version.split(".")[0]) >= 2
    with pytest.raises(RuntimeError, match="CUDA error"):  # there is no GPU, or no such memory
        cub.topk(1000, 10, torch.device("cpu"))(torch.rand(1000))


def test_stages_on_stand_ins(
    check: gpu_check.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests and memcheck at their smallest: a few tests, a sanitizer that only writes."""
    if shim.missing():
        pytest.skip(shim.missing())
    shim.build()  # outside the time of a stage
    tool = tmp_path / "bin/compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER.format(errors=0))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    assert check.run(["environment", "tests", "memcheck"]) == 0
    told = json.loads((check.out / "gpu_check.json").read_text())
    assert [stage["name"] for stage in told["stages"]] == ["environment", "tests", "memcheck"]
    assert {stage["status"] for stage in told["stages"]} == {"ok"}, told["stages"]
    assert "no memory errors" in told["stages"][2]["said"]
    assert len(list(check.out.iterdir())) <= 8
    tool.write_text(SANITIZER.format(errors=3))
    status, said = check.__class__(check.out, "cpu", 60.0).memcheck(60.0)
    assert (status, said.split(";")[0]) == ("FAILED", "memory errors, see memcheck.txt")
    tool.write_text('#!/bin/sh\necho "Device not supported" > "${3#--log-file=}"\nexit 1\n')
    status, said = check.__class__(check.out, "cpu", 60.0).memcheck(60.0)
    assert status == "skipped"


def test_a_failing_stage_stops_no_other(
    check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "NEEDED", ("torch", "no_such_package"))
    monkeypatch.setattr(gpu_check.Check, "build", lambda self, budget: 1 / 0)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *args, **kwargs: None)
    assert check.run(["environment", "build", "memcheck"]) == 1
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].startswith("environment FAILED")
    assert "no_such_package not installed" in lines[0]
    assert "ZeroDivisionError" in lines[1]
    assert "compute-sanitizer was not found" in lines[2]
    assert lines == (check.out / "table.txt").read_text().splitlines()


def test_a_stage_out_of_time_is_interrupted_and_told(check: gpu_check.Check) -> None:
    code = (
        "import time\nprint('begun', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('told')"
    )
    ended = check._started([sys.executable, "-c", code], 2.0)
    assert ended.code is None
    assert ended.output.split() == ["begun", "told"]
    check.seconds = 0.0
    assert check.run(["memcheck"]) == 0
    assert check.stages[-1].said == "no time left"


def test_failed_tests_are_named(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    ended = gpu_check.Ended(1, "words\nlast words\n")
    assert gpu_check._of_tests(ended, report) == ("FAILED", "last words")
    report.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase classname="a.test_b" name="one"/><testcase classname="a.test_b" name="two">'
        '<failure message="m"/></testcase></testsuite></testsuites>'
    )
    wanted = ("FAILED", "3 tests, 1 skipped, 1 failed: test_b::two")
    assert gpu_check._of_tests(ended, report) == wanted
    report.write_text('<testsuites><testsuite tests="3"/></testsuites>')
    assert gpu_check._of_tests(gpu_check.Ended(None, ""), report)[0] == "cut short"
    assert gpu_check._of_tests(gpu_check.Ended(0, ""), report)[0] == "ok"


def test_files_with_gpu_tests_are_found() -> None:
    found = {str(path) for path in gpu_check.gpu_tests()}
    assert {"python_tests/gpu/test_suites.py", "python_tests/backends/test_cuda.py"} <= found


def test_figures_of_the_documents_are_measured() -> None:
    """Until a results file is committed, pages give no figure of a GPU."""
    page = (gpu_check.ROOT / "docs/kernels.md").read_text()
    if not (RESULTS / "gpu.json").exists():
        assert "not yet measured" in page
        assert "TB/s" not in page.replace("at the speed of a copy", "")
