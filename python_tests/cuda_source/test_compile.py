"""What the compilers say of the kernels, without a GPU."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from paikern.backends.nvrtc import Nvrtc, find
from python_tests.cuda_source import shim

sys.path.insert(0, str(shim.ROOT / "csrc/testing"))  # scripts, not a package
import budgets
import check_cuda
import check_nvrtc

pytestmark = pytest.mark.cuda_source
SOURCES = shim.ROOT / "csrc/cuda"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.cu")), ids=lambda path: path.name)
def test_kernels_compile_without_spills(source: Path, arch: int) -> None:
    found = check_cuda.compile_for(source, arch)
    named = set(re.findall(r"PK_(?:COOPERATIVE_)?KERNEL\((\w+)\)", source.read_text()))
    assert {need.kernel for need in found} == named
    assert budgets.verdict(found) == []


def test_a_spill_is_seen() -> None:
    words = (
        "ptxas info    : Compiling entry function 'paikern_select_band' for 'sm_90'\n"
        "    16 bytes stack frame, 32 bytes spill stores, 28 bytes spill loads\n"
        "ptxas info    : Used 65 registers, used 1 barriers, 49153 bytes smem\n"
    )
    (need,) = check_cuda.parse(words, "sm_90", "nvcc")
    assert need.threads == 1024
    assert budgets.faults(need) == [
        "spills 60 bytes",
        "more than 49152 bytes of shared memory",
    ]
    assert budgets.verdict([need])[0].startswith("nvcc, sm_90: paikern_select_band: spills 60")
    assert "OVER" in list(budgets.table([need]))[1]


def test_a_block_that_does_not_fit_is_seen() -> None:
    need = budgets.Need("kernel", "nvcc", "sm_80", 1024, 65, 0, 0)
    assert budgets.blocks(need) == 0
    assert budgets.faults(need) == ["1024 threads do not fit a multiprocessor"]
    fits = need._replace(registers=64, shared=20_000)
    assert budgets.blocks(fits) == 1
    assert budgets.faults(fits) == []
    assert budgets.blocks(fits._replace(threads=128, registers=32)) == 8  # by shared memory
    assert budgets.faults(need._replace(threads=32, registers=300)) == ["more than 255 registers"]
    assert budgets.faults(need._replace(error="no such thing")) == ["no such thing"]


def test_bounds_of_kernels_are_read_from_the_source() -> None:
    found = check_cuda.bounds()
    assert found["paikern_select_band"] == 1024
    assert found["paikern_select_filter"] == 256
    assert set(found.values()) <= {32 * warps for warps in range(1, 33)}


@pytest.fixture
def nvrtc() -> Nvrtc:
    found, why = find()
    if found is None:
        pytest.skip(why)
    return found


@pytest.mark.slow
def test_the_text_compiles_through_nvrtc(nvrtc: Nvrtc) -> None:
    found = check_nvrtc.needs(nvrtc, [90])
    assert budgets.verdict(found) == []
    assert len({need.kernel for need in found}) == len(found)


def test_an_error_of_nvrtc_is_told_with_its_line(nvrtc: Nvrtc) -> None:
    with pytest.raises(RuntimeError, match=r"NVRTC_ERROR_COMPILATION.*\n.*paikern\.cu\(1\)"):
        check_nvrtc.compiled(nvrtc, "wrong", ())
    cubin, words = check_nvrtc.compiled(
        nvrtc,
        'extern "C" __global__ void k(float *x) { x[threadIdx.x] = 1; }',
        ("--gpu-architecture=sm_90", "--ptxas-options=-v"),
    )
    assert cubin.startswith(b"\x7fELF")
    (need,) = check_cuda.parse(words, "sm_90", "nvrtc")
    assert (need.kernel, need.spilled) == ("k", 0)
    assert need.registers > 0


def test_device_code_needs_no_standard_header() -> None:
    """NVRTC compiles the same text, without a host compiler's headers."""
    for path in [*SOURCES.glob("*.cuh"), shim.ROOT / "csrc/include/paikern/key_bits.h"]:
        assert "#include <" not in path.read_text(), path.name


def test_every_kernel_is_listed_with_its_parameters(on_cpu: shim.OnCpu) -> None:
    declared = {}
    texts = [path.read_text().replace("\\\n", " ") for path in SOURCES.glob("*.cuh")]
    macros = dict(re.findall(r"#define (PK_\w+) +(.+)", "\n".join(texts)))
    for text in texts:
        for name, parameters in re.findall(
            r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(([^)]*)\)', text
        ):
            words = [macros.get(word.strip(), word) for word in parameters.split(",")]
            declared[name] = len(",".join(words).split(","))
    assert on_cpu.module.kernels() == declared
