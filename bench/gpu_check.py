"""Everything that a GPU is needed for, in one command of under ten minutes, without a network.

    make gpu-check OUT=dir          or        python3 -m bench.gpu_check --out dir

    environment   what is installed, and what of it is missing
    build         the native modules, `_cuda` with them, in place, for this GPU and this Python
    tests         `-m gpu`: the suites of the operations on device tensors, whole runs
    memcheck      some of them again under compute-sanitizer
    benchmark     bench.run_gpu

A stage has a time of its own; one that fails or is cut short does not stop the others. Under `dir`
come a table, gpu_check.json, gpu.json (the results), tests.xml, memcheck.txt and log.txt. Ends with
1 where a stage failed. Standard library only: nothing of paikern has to be built to start.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
NEEDED = ("torch", "numpy", "safetensors", "tqdm", "rich", "matplotlib", "pybind11")
WANTED = ("triton", "cupy", "pytest", "hypothesis", "xdist", "pytest_timeout")
SUITES = "python_tests/gpu/test_suites.py"
MEMCHECK_EVERY = 6  # tests: it is that much slower
#: What a stage may take, seconds; the benchmark has what is left.
BUDGETS = {
    "environment": 30.0,
    "build": 170.0,
    "tests": 190.0,
    "memcheck": 60.0,
    "benchmark": 300.0,
}
WHOLE = 550.0
_LEAST = 20.0  # seconds that are kept for every stage to come
DONE, FAILED, SKIPPED, CUT = "ok", "FAILED", "skipped", "cut short"


class Stage(NamedTuple):
    """How a stage ended."""

    name: str
    status: str
    said: str
    seconds: float = 0.0


class Ended(NamedTuple):
    code: int | None  # None: it ran out of time
    output: str


class Check:
    """The stages; what they print goes to the log and, short, to the terminal."""

    def __init__(self, out: Path, device: str, seconds: float) -> None:
        self.out, self.device, self.seconds = out, device, seconds
        self.began = time.monotonic()
        self.stages: list[Stage] = []
        self.about: dict[str, Any] = {}
        out.mkdir(parents=True, exist_ok=True)
        self.log: IO[str] = (out / "log.txt").open("w", encoding="utf-8")

    def run(self, names: Sequence[str]) -> int:
        for index, name in enumerate(names):
            budget = min(BUDGETS[name], self.left - _LEAST * (len(names) - index - 1))
            self._note(f"== {name} ({budget:.0f} s)")
            began = time.monotonic()
            stage: Callable[[float], tuple[str, str]] = getattr(self, name)
            try:
                status, said = stage(budget) if budget > 1 else (SKIPPED, "no time left")
            except Exception as error:  # the other stages run all the same
                status, said = FAILED, f"{type(error).__name__}: {error}"
            self.stages.append(Stage(name, status, said, time.monotonic() - began))
            self._note(f"{name}: {status}, {said}")
        return self._told()

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def environment(self, budget: float) -> tuple[str, str]:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        wanting = [name for name in WANTED if importlib.util.find_spec(name) is None]
        self.about["missing"] = [*missing, *wanting]
        ended = self._started([sys.executable, "-c", _VERSIONS, self.device], budget)
        if ended.code:
            return FAILED, last_line(ended.output)
        self.about["versions"] = json.loads(last_line(ended.output))
        for tool in ("nvcc", "cmake", "ninja", "compute-sanitizer"):
            self.about[tool] = shutil.which(tool, path=_tools_path())
        words = ", ".join(f"{key} {value}" for key, value in self.about["versions"].items())
        if missing:
            return FAILED, f"{', '.join(missing)} not installed; {words}"
        return DONE, words + (f"; without {', '.join(wanting)}" if wanting else "")

    def build(self, budget: float) -> tuple[str, str]:
        """By CMake with this interpreter: no environment of its own, nothing fetched."""
        until = time.monotonic() + budget
        for command in self.build_commands():
            left = until - time.monotonic()
            ended = self._started(
                command, max(1.0, left), {"CUDACXX": self.about.get("nvcc") or ""}
            )
            if ended.code != 0:
                return (CUT if ended.code is None else FAILED), _error_line(ended.output)
        usable = self._started([sys.executable, "-c", _USABLE], 60)
        said = last_line(usable.output)
        built = self.device == "cpu" or "cuda" in said.removeprefix("usable: ").split(", ")
        return (FAILED if usable.code or not built else DONE), said

    def build_commands(self) -> list[list[str]]:
        """Configure, build, and put each module beside the package's sources."""
        import pybind11

        folder, package = ROOT / "build/gpu_check", ROOT / "paikern"
        modules = ["_C", "_cuda"] if self.on_gpu else ["_C"]
        switches = [
            f"-DPAIKERN_CUDA={'ON' if self.on_gpu else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if arch := self.about.get("versions", {}).get("arch"):
            switches.append(f"-DPAIKERN_CUDA_ARCHS={arch}-real")
        if shutil.which("ninja", path=_tools_path()):
            switches.append("-GNinja")
        jobs = str(os.cpu_count() or 1)
        return [
            ["cmake", "-S", str(ROOT), "-B", str(folder), *switches],
            ["cmake", "--build", str(folder), "--target", *modules, "--parallel", jobs],
            *(
                ["cmake", "--install", str(folder), "--component", name, "--prefix", str(package)]
                for name in modules
            ),
        ]

    def tests(self, budget: float) -> tuple[str, str]:
        if importlib.util.find_spec("pytest") is None:
            return FAILED, "pytest is not installed"
        report = self.out / "tests.xml"
        many = ["-n", "8"] if self.on_gpu and importlib.util.find_spec("xdist") else []
        if importlib.util.find_spec("pytest_timeout"):
            many += ["--timeout=90"]
        files = [SUITES, *self._chosen()]
        if self.on_gpu:  # what NVRTC compiled is the text of `cuda`: its own lane is enough
            files = [*map(str, gpu_tests()), "-k", "not ([cuda_jit and (ops_ or triton_))"]
        command = [*_pytest(), *many, f"--junitxml={report}", *files]
        ended = self._started(command, budget, self._test_switches(1))
        return _of_tests(ended, report)

    def memcheck(self, budget: float) -> tuple[str, str]:
        tool = shutil.which("compute-sanitizer", path=_tools_path())
        if tool is None:
            return SKIPPED, "compute-sanitizer was not found"
        said = self.out / "memcheck.txt"
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "tests.xml"
            command = [
                tool, "--tool=memcheck", "--error-exitcode=9", f"--log-file={said}", *_pytest(),
                f"--junitxml={report}", SUITES, *self._chosen(),
            ]  # fmt: skip
            # Each tensor in memory of its own, so that a step beside it is seen.
            switches = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            switches |= self._test_switches(MEMCHECK_EVERY)
            ended = self._started(command, budget, switches)
            status, words = _of_tests(ended, report)
        found = said.read_text(errors="replace") if said.exists() else ""
        if "not supported" in found:
            return SKIPPED, "compute-sanitizer does not know this device or this system"
        errors = re.findall(r"ERROR SUMMARY: (\d+) error", found)
        bad = "Invalid __" in found or any(int(number) for number in errors)
        if bad or ended.code == 9:
            return FAILED, f"memory errors, see memcheck.txt; {words}"
        return status, f"no memory errors; {words}"

    def benchmark(self, budget: float) -> tuple[str, str]:
        seconds = max(5.0, budget - 40)  # no part begins after; the last one comes to its end
        command = [sys.executable, "-m", "bench.run_gpu", "--out", str(self.out)]
        command += ["--seconds", str(seconds), *([] if self.on_gpu else ["--tiny"])]
        ended = self._started([*command, "--device", self.device], budget)
        path = self.out / "gpu.json"
        if not path.exists():
            return (CUT if ended.code is None else FAILED), last_line(ended.output)
        found = json.loads(path.read_text())
        self.about["rows"] = len(found["rows"])
        left_out = found["left_out"]
        words = f"{len(found['rows'])} rows, copy at {found['copy_bandwidth'] / 1e9:.0f} GB/s"
        words += "".join(f"; {what}" for what in left_out)
        if ended.code is None:
            return CUT, words
        return (DONE if ended.code == 0 and not _broken(left_out) else FAILED), words

    def _chosen(self) -> list[str]:
        """Tests of the CUDA sources on their backend; in a trial of packed masks."""
        lane = "cuda_source" if self.on_gpu else "cuda_source_bits"
        return ["-k", f"{lane} and [cuda and not [cuda_jit"]

    def _test_switches(self, every: int) -> dict[str, str]:
        switches = {"PAIKERN_GPU_TESTS_EVERY": str(every)}
        if not self.on_gpu:
            switches |= {"PAIKERN_GPU_TESTS_ON": "cpu", "TRITON_INTERPRET": "1"}
        return switches

    def _started(
        self, command: Sequence[str], seconds: float, switches: Mapping[str, str] | None = None
    ) -> Ended:
        """Run to its end or, when the time is up, to an interrupt and soon after a kill."""
        self._note("$ " + " ".join(command), shown=False)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "PATH": _tools_path(),
            **(switches or {}),
        }
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            over = False
            for wait, then in ((seconds, signal.SIGINT), (15.0, signal.SIGKILL)):
                try:
                    process.wait(wait)
                    break
                except subprocess.TimeoutExpired:
                    over = True
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, then)
            code = process.wait()
            output.seek(0)
            words = output.read()
        self._note(words, shown=False)
        return Ended(None if over else code, words)

    def _note(self, words: str, shown: bool = True) -> None:
        print(words, file=self.log, flush=True)
        if shown:
            print(words, flush=True)

    def _told(self) -> int:
        # A build or tests that were cut short have proven nothing.
        whole = ("build", "tests")
        failed = [
            s for s in self.stages if s.status == FAILED or (s.status == CUT and s.name in whole)
        ]
        lines = [f"{s.name:12}{s.status:10}{s.seconds:6.0f} s  {s.said}" for s in self.stages]
        path = self.out / "gpu.json"
        if path.exists() and any(stage.name == "benchmark" for stage in self.stages):
            lines += ["", *figures(json.loads(path.read_text())["rows"])]
        (self.out / "table.txt").write_text("\n".join(lines) + "\n")
        content = {
            "schema_version": 1,
            "device": self.device,
            **self.about,
            "stages": [stage._asdict() for stage in self.stages],
        }
        (self.out / "gpu_check.json").write_text(json.dumps(content, indent=2) + "\n")
        self._note("\n".join(lines))
        self.log.close()
        return 1 if failed else 0


_VERSIONS = """
import json, platform, sys, torch
device = sys.argv[1]
found = {"python": platform.python_version(), "torch": torch.__version__}
for name in ("triton", "cupy"):
    try:
        found[name] = __import__(name).__version__
    except ImportError:
        pass
if device != "cpu":
    major, minor = torch.cuda.get_device_capability(device)
    found |= {"gpu": torch.cuda.get_device_name(device), "arch": f"{major}{minor}"}
print(json.dumps(found))
"""
_USABLE = """
import paikern as pk
rows = pk.backends()
for row in rows:
    print(row["name"], row["usable"], row["reason"])
print("usable: " + ", ".join(row["name"] for row in rows if row["usable"]))
"""


def _tools_path() -> str:
    """The PATH and where a toolkit puts nvcc and compute-sanitizer."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    more = [f"{home}/bin", f"{home}/compute-sanitizer"]
    own = str(Path(sys.executable).parent)  # where packages put cmake and ninja
    return os.pathsep.join([os.environ.get("PATH", os.defpath), own, *more])


def _pytest() -> list[str]:
    marked = "gpu and not slow"
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked]


def gpu_tests() -> list[Path]:
    """Files with tests that need a GPU: all others stay uncollected, whatever they import."""
    found = sorted((ROOT / "python_tests").rglob("test_*.py"))
    return [path.relative_to(ROOT) for path in found if "pytest.mark.gpu" in path.read_text()]


def _of_tests(ended: Ended, report: Path) -> tuple[str, str]:
    """From the report where there is one: how many there were, which failed first."""
    if not report.exists():
        return (CUT if ended.code is None else FAILED), last_line(ended.output)
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    bad = []
    root = ElementTree.parse(report).getroot()
    for suite in root.iter("testsuite"):
        for key in counts:
            counts[key] += int(suite.get(key, 0))
    for case in root.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            bad.append(f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}")
    words = f"{counts['tests']} tests, {counts['skipped']} skipped, {len(bad)} failed"
    if bad:
        return FAILED, f"{words}: {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}"
    if ended.code is None:
        return CUT, words
    if ended.code != 0:
        return FAILED, f"{words}; {last_line(ended.output)}"
    return DONE, words


def _broken(left_out: Sequence[str]) -> bool:
    """Parts that failed, not those for which there was no time or no compiler."""
    return any(re.search(r": \w+(Error|Exception): ", words) for words in left_out)


def _error_line(words: str) -> str:
    """The first line that a compiler calls an error, else the last one."""
    found = (line.strip() for line in words.splitlines() if re.search(r"\berror\b", line, re.I))
    return next(found, last_line(words))


def last_line(words: str) -> str:
    return next((line for line in reversed(words.splitlines()) if line.strip()), "no output")


def figures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each thing measured, against the rival that came nearest."""
    nearest: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for row in rows:
        what = row.get("kernel") or row["method"]
        size = str(row.get("size") or row["model"])
        key = (row["op"], what, size, row.get("dtype", ""), row.get("backend", ""))
        if key not in nearest or row["ratio"] < nearest[key]["ratio"]:
            nearest[key] = row
    return [
        f"{op:14}{what:17}{size[:40]:41}{kind:9}{who:17}{1e3 * row['seconds']:11.3f} ms"
        f"{row['bandwidth_fraction']:6.0%} of a copy{row['ratio']:8.2f}x {row['reference']}"
        for (op, what, size, kind, who), row in nearest.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check")
    parser.add_argument("--out", type=Path, required=True, help="folder for at most eight files")
    parser.add_argument("--device", default="cuda:0", help="cpu: a trial on stand-ins, tiny sizes")
    parser.add_argument("--seconds", type=float, default=WHOLE, help="for all stages together")
    parser.add_argument("--only", nargs="*", choices=BUDGETS, default=list(BUDGETS))
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    return Check(given.out.resolve(), given.device, given.seconds).run(given.only)


if __name__ == "__main__":
    raise SystemExit(main())
