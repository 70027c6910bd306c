"""The path through NVRTC: what can be known without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from paikern import ops
from paikern.backends import cuda, cuda_jit
from paikern.backends.cuda_launch import provided
from python_tests.cuda_source import shim

pytestmark = pytest.mark.cuda_source


def test_all_kernels_are_in_the_text_and_each_once(on_cpu: shim.OnCpu) -> None:
    text = cuda_jit.assemble()
    bare = re.sub(r"__launch_bounds__\([^)]*\)", "", text)
    named = re.findall(r'extern "C" __global__ void\s+(\w+)\(', bare)
    assert sorted(named) == sorted(on_cpu.module.kernels()) == sorted(cuda_jit.files())
    assert "#include" not in text
    assert text.count("struct PaikernLayer {") == 1
    assert text.index("struct PaikernLayer {") < text.index("struct PaikernSelect {")


def test_a_kernel_comes_with_what_its_file_needs_and_no_more() -> None:
    text = cuda_jit.assemble(only=cuda_jit.files()["paikern_pack_mask"])
    assert "paikern_pack_mask" in text
    assert "paikern_select_filter" not in text
    text = cuda_jit.assemble(only=cuda_jit.files()["paikern_select_filter"])
    assert text.index("struct PaikernLayer {") < text.index("paikern_select_filter(")


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.cuh").write_text('#pragma once\n#include "gone.cuh"\n')
    with pytest.raises(FileNotFoundError, match=r"gone\.cuh is in none of"):
        cuda_jit.assemble([tmp_path])
    with pytest.raises(FileNotFoundError, match="no CUDA source in"):
        cuda_jit.assemble([tmp_path / "nothing"])


def test_the_text_compiles_as_one_file(tmp_path: Path) -> None:
    source = tmp_path / "paikern.cu"
    source.write_text(cuda_jit.assemble())
    shim_header = str(shim.ROOT / "csrc/testing/cuda_on_cpu.h")
    command = ["g++", "-std=c++20", "-fsyntax-only", "-include", shim_header, *shim.WARNINGS]
    done = subprocess.run([*command, "-x", "c++", str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_text_compiles_for_a_device(tmp_path: Path) -> None:
    source = tmp_path / "paikern.cu"
    source.write_text(cuda_jit.assemble())
    command = ["nvcc", "-std=c++17", "--fmad=false", "-arch=sm_90", "-cubin", "-o"]
    done = subprocess.run(
        [*command, str(tmp_path / "out.cubin"), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_text_compiles_through_nvrtc() -> None:
    nvrtc = pytest.importorskip("cupy.cuda.nvrtc", reason="CuPy is not installed")
    for capability in ((8, 0), (9, 0)):
        cubin = cuda_jit.compiled(nvrtc, cuda_jit.assemble(), cuda_jit.options_for(capability))
        assert cubin.startswith(b"\x7fELF")


def test_a_key_is_of_everything_that_a_cubin_is_made_from() -> None:
    text, options = "text", cuda_jit.options_for((9, 0))
    same = cuda_jit.key(text, list(options), (13, 0))
    assert same == cuda_jit.key(text, options, (13, 0))
    others = {
        cuda_jit.key("text2", options, (13, 0)),
        cuda_jit.key(text, cuda_jit.options_for((8, 0)), (13, 0)),
        cuda_jit.key(text, options, (12, 9)),
    }
    assert len(others | {same}) == 4
    assert "--fmad=false" in options
    assert "--gpu-architecture=sm_90" in options


def test_a_cubin_is_made_once_and_appears_whole(tmp_path: Path) -> None:
    made, wait = [], threading.Barrier(4)
    content = bytes(range(256)) * 4000

    def make() -> bytes:
        made.append(1)
        wait.wait()  # all four have found nothing and write at the same time
        return content

    def once() -> None:
        assert cuda_jit.cached("a.cubin", make, tmp_path / "new").read_bytes() == content

    threads = [threading.Thread(target=once) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.cubin"]
    cuda_jit.cached("a.cubin", make, tmp_path / "new")
    assert len(made) == 4


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*paths: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cuda_jit.os, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        cuda_jit.cached("a.cubin", lambda: b"1", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = cuda_jit.cached("a.cubin", lambda: b"1", tmp_path / "file/below")
    assert path.read_bytes() == b"1"
    shutil.rmtree(path.parent)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("PAIKERN_CACHE", raising=False)
    assert cuda_jit.cache_folder() == Path("/x/paikern")
    monkeypatch.setenv("PAIKERN_CACHE", "/y")
    assert cuda_jit.cache_folder() == Path("/y")


@pytest.mark.parametrize(("version", "extra"), [("12.8", "cuda12"), ("13.0", "cuda13")])
def test_without_cupy_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, version: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", version)
    why = cuda_jit.why_not()[2]
    assert why.startswith("CuPy is not installed; ")
    assert f"pip install 'paikern[{extra}]'" in why
    assert "\n" not in why


def test_without_a_gpu_cupy_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_jit, "_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert cuda_jit.why_not()[2] == "no GPU that this build of PyTorch can use"


def test_without_nvrtc_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("DynamicLibNotFoundError: libnvrtc.so\nmore words")

    nvrtc = SimpleNamespace(getVersion=missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(nvrtc=nvrtc))
    why = cuda_jit.why_not()[2]
    assert why.startswith("NVRTC could not be loaded (DynamicLibNotFoundError: libnvrtc.so)")
    assert "pip install 'paikern[cuda" in why


class _FakeCupy:
    """CuPy's names as far as they are used, with the kernels of the shim behind them."""

    def __init__(self, on_cpu: shim.OnCpu) -> None:
        self.loaded: list[str] = []
        self._run = on_cpu.module.run
        self.cuda = SimpleNamespace(Device=self._context, ExternalStream=self._context)

    class _context:  # noqa: N801
        def __init__(self, *numbers: int) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    def RawModule(self, path: str) -> SimpleNamespace:  # noqa: N802
        self.loaded.append(Path(path).read_text())

        def get_function(name: str):
            def kernel(grid, block, arguments, shared_mem):
                assert all(a.dtype.itemsize == 8 for a in arguments)
                numbers = tuple(a.item() for a in arguments)
                self._run([(name, *grid, *block, shared_mem, numbers)], 0, 0)

            return kernel

        return SimpleNamespace(get_function=get_function)


class _FakeNvrtc:
    def __init__(self, fails: bool = False) -> None:
        self.fails, self.compiled, self.destroyed = fails, 0, 0

    def getVersion(self) -> tuple[int, int]:  # noqa: N802
        return (13, 0)

    def createProgram(self, text: str, *names: object) -> str:  # noqa: N802
        return text

    def compileProgram(self, program: str, options: tuple[str, ...]) -> None:  # noqa: N802
        self.compiled += 1
        if self.fails:
            raise ValueError("NVRTC_ERROR_COMPILATION (6)")

    def getProgramLog(self, program: str) -> str:  # noqa: N802
        return "paikern.cu(7): error: no such thing"

    def getCUBIN(self, program: str) -> bytes:  # noqa: N802
        return b"cubin"

    def destroyProgram(self, program: str) -> None:  # noqa: N802
        self.destroyed += 1


def test_operations_run_through_cupys_modules(
    on_cpu: shim.OnCpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for CuPy: compiled once, kept, launched by name with numbers of 8 bytes."""
    monkeypatch.setenv("PAIKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cupy, nvrtc, scores = _FakeCupy(on_cpu), _FakeNvrtc(), torch.randn(9000)
    for _ in range(2):  # two processes
        jit = cuda_jit.Jit(cupy, nvrtc)
        jit.multiprocessors = lambda device: 3  # type: ignore[method-assign]
        with provided(jit):
            found = cuda.topk_mask([scores], [1234], [], True, [], None)
            found += [cuda.pack_mask(scores > 0)]
        wanted = [*ops.topk_mask(scores, 1234, absolute=True), ops.pack_mask(scores > 0)]
        assert all(map(torch.equal, found, wanted))
    # bits, and the sample, filter, digits and bits of a selection
    assert nvrtc.compiled == nvrtc.destroyed == 5
    assert cupy.loaded == ["cubin"] * 10


def test_an_error_of_the_compiler_is_told_in_full() -> None:
    nvrtc = _FakeNvrtc(fails=True)
    with pytest.raises(RuntimeError, match=r"did not compile: NVRTC_ERROR.*\npaikern\.cu\(7\)"):
        cuda_jit.compiled(nvrtc, "text", ())
    assert nvrtc.destroyed == 1
