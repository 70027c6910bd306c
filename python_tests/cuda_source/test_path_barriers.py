"""Every barrier of products, passes and updates is needed; see test_barriers.py for how it is seen.

Each process begins with nothing in shared memory, and shapes change from call to call, so that
what lies there from the one before is wrong.
Those that say "between" order blocks, or device functions of which a kernel here has one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch
from torch import Tensor

from paikern import ops
from paikern.backends import cuda, cuda_dpai, cuda_path
from paikern.backends.cuda_launch import Step, provided, run
from python_tests.cuda_source import shim
from python_tests.ops.path_cases import Geometry

pytestmark = pytest.mark.cuda_source
FILES = ("path.cuh", "path_vector.cuh", "path_maps.cuh", "maps.cuh", "dpai.cuh")
BARRIERS = [
    (name, number)
    for name in FILES
    for number, line in enumerate((shim.ROOT / "csrc/cuda" / name).read_text().splitlines(), 1)
    if re.match(r"\s*__syncthreads\(\);", line) and "between" not in line
]
FEW = Geometry((3, 3), (3, 3), (1, 1), (1, 1), (1, 1), rows=66, channels=40, batch=1)
STRIDES = Geometry((5, 7), (3, 2), (2, 3), (1, 1), (1, 1), rows=7, channels=70, batch=2)


def results(on_cpu: shim.OnCpu) -> list[Tensor]:
    """Calls that between them pass every barrier, each kernel on few blocks with several items."""
    torch.manual_seed(3)
    found = []
    with provided(on_cpu):
        for case in (FEW, STRIDES):
            w, x, g = case.weight(), case.x(), case.g()
            found.append(cuda.path_conv_forward(w, x, *case.args, 1, None))
            found.append(cuda.path_conv_backward(w, g, list(x.shape), *case.args, 1, None))
            found.append(cuda.path_conv_score(w, x, g, *case.args, 1, None, 0.0))
        found.append(cuda.path_forward(torch.randn(9, 2051), torch.rand(2051), 1, None))
        for shape in ((600, 140), (60, 700)):
            found.append(cuda.path_backward(torch.randn(shape), torch.rand(shape[0]), 1, None))
        for count in (20_000, 9000):
            x = torch.rand(count).round(decimals=2)  # some are 1
            # The parts of the sum: what one lacks without a barrier, the next one has.
            room, dots = torch.zeros(3), torch.zeros(-(-count // 8192), dtype=torch.float64)
            ties = torch.zeros(2, dtype=torch.int64)
            places = (dots, ties, ties[1:], room)
            maps = (torch.rand(count), x)
            addresses = [t.data_ptr() for t in (*maps, *places)]
            addresses.insert(2, count)
            run(x, [Step("paikern_map_share", 2, tuple(addresses))])
            found += [dots, room]
        s, live = torch.randn(40, 29, 3), torch.ones(40, dtype=torch.bool)
        q = torch.where(torch.rand(40, 29, 3) < 0.2, 1.0, 0.0)
        mask = ops.pack_mask(torch.rand(q.shape) < 0.5)
        cuda.dpai_update_(s, q, mask, live, None, None, 0.9, 0.5, 0.1, 1, 1, False)
    return [*found, s]


def seen(on_cpu: shim.OnCpu, file: str, line: int, wanted: list[Tensor]) -> bool:
    """Whether something is wrong without this barrier."""
    for way in (2, 1, 0):
        on_cpu.order(way)
        on_cpu.without_barrier(file, line)
        try:
            found = results(on_cpu)
        except RuntimeError as error:
            if "cuda_on_cpu: block" in str(error):
                return True
            raise
        if not all(map(torch.equal, found, wanted)):
            return True
    return False


def main() -> None:
    """One line for each barrier: file, line, and 1 if it is missed."""
    on_cpu = shim.OnCpu(shim.build())
    plan = cuda_path.workspace
    cuda_path.workspace = lambda *args: plan(*args)._replace(blocks=5)
    cuda_dpai.blocks = lambda *shape: 1
    with tempfile.TemporaryDirectory() as folder:
        truth = f"{folder}/results.pt"
        for file, line in [("truth", 0), ("none", 1), *BARRIERS]:
            child = os.fork()
            if child == 0:
                if file == "truth":
                    torch.save(results(on_cpu), truth)
                    os._exit(1)
                os._exit(0 if seen(on_cpu, file, line, torch.load(truth)) else 1)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            # A signal is a write to where nothing is: seen as well.
            print(file, line, int(status == 0 or status < 0), flush=True)


@pytest.fixture(scope="module")
def missed() -> dict[tuple[str, int], bool]:
    done = subprocess.run(
        [sys.executable, "-m", "python_tests.cuda_source.test_path_barriers"],
        cwd=shim.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(shim.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [row.split() for row in done.stdout.splitlines()]
    return {(file, int(line)): found == "1" for file, line, found in rows}


def test_with_all_barriers_nothing_is_wrong(missed: dict[tuple[str, int], bool]) -> None:
    assert missed["none", 1] is False
    assert len(BARRIERS) > 10


@pytest.mark.parametrize(("file", "line"), BARRIERS)
def test_a_missing_barrier_is_seen(
    missed: dict[tuple[str, int], bool], file: str, line: int
) -> None:
    assert missed[file, line]


if __name__ == "__main__":
    main()
