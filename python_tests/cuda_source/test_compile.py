"""What the compilers say of the kernels, without a GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from python_tests.cuda_source import shim

pytestmark = pytest.mark.cuda_source
SOURCES = shim.ROOT / "csrc/cuda"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def check() -> ModuleType:
    path = shim.ROOT / "csrc/testing/check_cuda.py"
    spec = importlib.util.spec_from_file_location("check_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.cu")), ids=lambda path: path.name)
def test_kernels_compile_without_spills(check: ModuleType, source: Path, arch: int) -> None:
    found = check.compile_for(source, arch)
    named = set(re.findall(r"PK_KERNEL\((\w+)\)", source.read_text()))
    assert {kernel.name for kernel in found} == named
    assert {kernel.name: check.faults(kernel) for kernel in found if check.faults(kernel)} == {}


def test_a_spill_is_seen(check: ModuleType) -> None:
    words = (
        "ptxas info    : Compiling entry function 'paikern_select_band' for 'sm_90'\n"
        "    16 bytes stack frame, 32 bytes spill stores, 28 bytes spill loads\n"
        "ptxas info    : Used 65 registers, used 1 barriers, 49153 bytes smem\n"
    )
    (kernel,) = check.parse(words, 90)
    assert check.faults(kernel) == [
        "spills 60 bytes",
        "more than 64 registers",
        "more than 49152 bytes of shared memory",
    ]


def test_device_code_needs_no_standard_header() -> None:
    """NVRTC compiles the same text, without a host compiler's headers."""
    for path in [*SOURCES.glob("*.cuh"), shim.ROOT / "csrc/include/paikern/key_bits.h"]:
        assert "#include <" not in path.read_text(), path.name


def test_every_kernel_is_listed_with_its_parameters(on_cpu: shim.OnCpu) -> None:
    declared = {}
    for path in SOURCES.glob("*.cuh"):
        text = path.read_text().replace("\\\n", " ")
        macros = dict(re.findall(r"#define (PK_\w+) +(.+)", text))
        for name, parameters in re.findall(
            r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(([^)]*)\)', text
        ):
            words = [macros.get(word.strip(), word) for word in parameters.split(",")]
            declared[name] = len(",".join(words).split(","))
    assert on_cpu.module.kernels() == declared
