"""The CUDA module: what can be known without a GPU, and the kernels where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from paikern import ops
from paikern.backends import registry

SOURCES = Path(__file__).parents[2] / "csrc/cuda"
KERNELS = {
    "paikern_pack_mask",
    "paikern_unpack_mask",
    "paikern_apply_mask_16",
    "paikern_apply_mask_32",
    "paikern_apply_mask_64",
}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU that this build of torch can use"
)


@pytest.mark.cuda_source
@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_spills(arch: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            "nvcc", "-std=c++17", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v,--warn-on-spills",
            "-o", str(tmp_path / "bits.cubin"), str(SOURCES / "bits.cu"),
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"Compiling entry function '(\w+)'", done.stderr)) == KERNELS
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) == len(KERNELS)
    assert set(spills) == {("0", "0")}
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    assert max(registers) <= 32  # eight blocks of 256 threads a multiprocessor


@pytest.mark.cuda_source
def test_device_code_needs_no_standard_header() -> None:
    """NVRTC compiles the same text, without a host compiler's headers."""
    for path in SOURCES.glob("*.cuh"):
        assert "#include <" not in path.read_text(), path.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_module_imports_without_a_gpu_and_says_why() -> None:
    cuda = pytest.importorskip("paikern._cuda", reason="_cuda was built without nvcc")
    count, why = cuda.device_count()
    assert count == 0
    assert why
    with pytest.raises(RuntimeError, match="pack_mask: CUDA driver") as raised:
        cuda.pack_mask(0, 8, 0, 0, 0)
    assert "\n" not in str(raised.value)
    assert cuda.pack_mask(0, 0, 0, 0, 0) is None  # nothing to do is nothing to fail


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [0, 1, 31, 33, 255, 1000, 1_000_003])
@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_masks_on_the_gpu_equal_the_cpu(size: int, backend: str) -> None:
    mask = torch.rand(size) < 0.3
    packed = ops.pack_mask(mask)
    with registry.using(backend):
        assert torch.equal(ops.pack_mask(mask.cuda()).cpu(), packed)
        assert torch.equal(ops.unpack_mask(packed.cuda(), (size,)).cpu(), mask)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            values = torch.randn(size).to(dtype)
            values[::3] = float("nan")
            found = ops.apply_mask_(values.cuda(), packed.cuda()).cpu()
            assert torch.equal(found.nan_to_num(7), ops.apply_mask_(values, packed).nan_to_num(7))


@pytest.mark.gpu
@needs_gpu
def test_masks_on_the_gpu_follow_strides_and_the_current_stream() -> None:
    weight = torch.randn(257, 129, device="cuda").T
    mask = weight > 0
    wanted = weight.cpu().relu()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        weight.add_(0)
        ops.apply_mask_(weight, ops.pack_mask(mask))
    torch.cuda.synchronize()
    assert torch.equal(weight.cpu(), wanted)


@pytest.mark.gpu
@needs_gpu
def test_cuda_serves_masks_and_leaves_the_rest_to_the_reference() -> None:
    assert registry.resolve("pack_mask", "cuda", False).__module__ == "paikern.backends.cuda"
    assert registry.resolve("topk_mask", "cuda", False).__module__ == "paikern.backends.reference"
    scores = torch.randn(10_000)
    found = ops.topk_mask(scores.cuda(), 1234)[0].cpu()
    assert torch.equal(found, ops.topk_mask(scores, 1234)[0])


@pytest.mark.gpu
@needs_gpu
def test_tensors_of_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="apply_mask_: tensors are on cuda:0 and cpu"):
        ops.apply_mask_(torch.ones(8, device="cuda"), torch.ones(1, dtype=torch.uint8))
