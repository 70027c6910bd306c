"""The path through NVRTC: what can be known without a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paikern import ops
from paikern.backends import cuda, cuda_driver, cuda_jit, nvrtc
from paikern.backends.cuda_launch import COOPERATIVE, Step, provided
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
    compiler, why = nvrtc.find()
    if compiler is None:
        pytest.skip(why)
    for kernel in ("paikern_pack_mask", "paikern_select_filter"):
        text = cuda_jit.assemble(only=cuda_jit.files()[kernel])
        cubin = cuda_jit.compiled(compiler, text, cuda_jit.options_for((9, 0)))
        assert cubin.startswith(b"\x7fELF")
        assert kernel.encode() in cubin
    with pytest.raises(RuntimeError, match=r"did not compile: NVRTC_ERROR_COMPILATION"):
        cuda_jit.compiled(compiler, "this is no CUDA", ())


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", version)
    asked: list[str] = []
    monkeypatch.setattr(nvrtc, "find", lambda major: asked.append(major) or (None, "no library"))
    why = cuda_jit.why_not()[2]
    assert why.startswith("CuPy is not installed; ")
    assert f"pip install 'paikern[{extra}]'" in why
    assert why.endswith("; and without CuPy: no library")
    assert "\n" not in why
    assert asked == [version.split(".")[0]]


def test_without_cupy_the_driver_and_pytorchs_nvrtc_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc, "find", lambda major: ("compiler", "somewhere"))
    monkeypatch.setattr(cuda_driver, "Driver", lambda: "driver")
    assert cuda_jit.why_not() == ("driver", "compiler", "")

    def missing() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(cuda_driver, "Driver", missing)
    assert cuda_jit.why_not()[2].endswith(
        "the driver says libcuda.so.1: cannot open shared object file"
    )


def test_on_rocm_there_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "use the triton backend" in cuda_jit.why_not()[2]


def test_without_a_gpu_cupy_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert cuda_jit.why_not()[2] == "no GPU that this build of PyTorch can use"


def test_without_nvrtc_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("DynamicLibNotFoundError: libnvrtc.so\nmore words")

    compiler = SimpleNamespace(getVersion=missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc, "find", lambda major: (None, "no library"))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(nvrtc=compiler))
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

    def RawModule(  # noqa: N802
        self, path: str, enable_cooperative_groups: bool = False
    ) -> SimpleNamespace:
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
    cupy, compiler, scores = _FakeCupy(on_cpu), _FakeNvrtc(), torch.randn(9000)
    for _ in range(2):  # two processes
        jit = cuda_jit.Jit(cupy, compiler)
        jit.multiprocessors = lambda device: 3  # type: ignore[method-assign]
        with provided(jit):
            found = cuda.topk_mask([scores], [1234], [], True, [], None)
            found += [cuda.pack_mask(scores > 0)]
        wanted = [*ops.topk_mask(scores, 1234, absolute=True), ops.pack_mask(scores > 0)]
        assert all(map(torch.equal, found, wanted))
    # bits, and the sample, filter, digits and bits of a selection
    assert compiler.compiled == compiler.destroyed == 5
    assert cupy.loaded == ["cubin"] * 10


class _FakeLibrary:
    """libcuda.so.1 as far as it is called, with the kernels of the shim behind it."""

    def __init__(self, on_cpu: shim.OnCpu) -> None:
        self._on_cpu = on_cpu
        self._names: list[str] = []
        self.pushed, self.streams = 0, set[int]()

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, handle: Any, device: int) -> int:  # noqa: N802
        handle._obj.value = device + 40
        return 0 if device < 8 else 101

    def cuDevicePrimaryCtxRetain(self, context: Any, handle: Any) -> int:  # noqa: N802
        context._obj.value = handle.value
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.pushed += 1
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.pushed -= 1
        return 0

    def cuModuleLoadData(self, module: Any, image: ctypes.c_char_p) -> int:  # noqa: N802
        assert self.pushed
        assert image.value == b"cubin"
        module._obj.value = 1
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:  # noqa: N802
        self._names.append(name.decode())
        function._obj.value = len(self._names)
        return 0

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:  # noqa: N802
        assert rest[-1] is None
        return self._launched(False, function, *rest[:-1])

    def cuLaunchCooperativeKernel(self, function: Any, *rest: Any) -> int:  # noqa: N802
        return self._launched(True, function, *rest)

    def _launched(self, together: bool, function: Any, *rest: Any) -> int:
        x, _, _, threads, _, _, shared, stream, places = rest
        name = self._names[function.value - 1]
        assert together == (name in COOPERATIVE)
        count = self._on_cpu.module.kernels()[name]
        # Whatever the type: the shim takes the eight bytes as they are.
        numbers = tuple(ctypes.c_int64.from_address(places[i]).value for i in range(count))
        self.streams.add(stream.value or 0)
        self._on_cpu.module.run([(name, x, threads, shared, numbers)], 0, 0)
        return 0

    def cuGetErrorString(self, code: int, words: Any) -> int:  # noqa: N802
        words._obj.value = b"invalid device ordinal"
        return 0


def test_operations_run_through_the_driver(
    on_cpu: shim.OnCpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAIKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    library = _FakeLibrary(on_cpu)
    jit = cuda_jit.Jit(cuda_driver.Driver(library), _FakeNvrtc())
    jit.multiprocessors = lambda device: 3  # type: ignore[method-assign]
    scores, t = torch.randn(9000), torch.tensor([1.0, 3.0])
    with provided(jit):
        (found,) = cuda.topk_mask([scores], [1234], [], True, [], None)
        scaled = cuda.map_scale_(t, -1, 0.0)  # with parameters that are no integers
    assert torch.equal(found, ops.topk_mask(scores, 1234, absolute=True)[0])
    assert scaled.tolist() == [0.5, 1.5]
    assert library.pushed == 0
    jit.run([Step("paikern_pack_mask", 1, (scores.data_ptr(), 0, t.data_ptr()))], 0, 77)
    assert library.streams == {0, 77}
    none = (torch.zeros(1, dtype=torch.int64).data_ptr(), 0, 0, t.data_ptr())
    jit.run([Step("paikern_flow", 1, none)], 0, 0)  # by itself: blocks that wait for each other
    with pytest.raises(RuntimeError, match="cuDeviceGet: invalid device ordinal"):
        jit.run([Step("paikern_pack_mask", 1, ())], 9, 0)


def test_an_error_of_the_compiler_is_told_in_full() -> None:
    compiler = _FakeNvrtc(fails=True)
    with pytest.raises(RuntimeError, match=r"did not compile: NVRTC_ERROR.*\npaikern\.cu\(7\)"):
        cuda_jit.compiled(compiler, "text", ())
    assert compiler.destroyed == 1
