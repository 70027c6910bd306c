"""The command as a process: exit codes, pipes, interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from safetensors.torch import save_file

import paikern as pk


def process(*argv: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paikern.cli", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)  # type: ignore[call-overload,no-any-return]


def test_exit_codes_of_the_process(folder: Path, tmp_path: Path) -> None:
    masks = str(folder / "masks.safetensors")
    done = process("verify", masks, "--model", "lenet300", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    dense = tmp_path / "dense.safetensors"
    save_file(pk.zoo.create("lenet300", seed=0).state_dict(), dense)
    done = process("verify", masks, "--model", "lenet300", "--checkpoint", str(dense), "--quiet")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (1, 1)
    done = process("inspect", str(tmp_path / "absent"))
    assert (done.returncode, done.stdout, len(done.stderr.strip().splitlines())) == (2, "", 1)


def test_a_closed_pipe_is_no_error(folder: Path) -> None:
    command = f"{sys.executable} -m paikern.cli inspect {folder / 'masks.safetensors'} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_interrupt_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "paikern.cli", "prune", "--model", "resnet20", "--method"]
    command += ["dpai", "--sparsity", "0.9", "--set", "steps=1000000", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Shells start what runs in the background with SIGINT ignored, which would be inherited.
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:  # fmt: skip
        assert running.stderr is not None
        first = running.stderr.readline()  # the first progress line: the work has begun
        assert first.startswith("dpai: step ")
        running.send_signal(signal.SIGINT)
        rest = running.stderr.read()
        assert running.wait(timeout=60) == 130
    assert rest.strip().splitlines()[-1] == "paikern: interrupted; no file is half-written"
    assert "Traceback" not in rest
    assert os.listdir(tmp_path) == []


def test_start_up_is_quick_enough_for_a_shell() -> None:
    """matplotlib, transformers and the like are imported when first needed."""
    script = (
        "import sys, paikern.cli as c; c.main(['backends', '--quiet']); "
        "print([m for m in ('matplotlib', 'transformers', 'timm', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
