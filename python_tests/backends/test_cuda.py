"""The CUDA module: what can be known without a GPU, and the kernels where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paikern import ops
from paikern.backends import registry

HALF = torch.bfloat16
SIZES = (0, 1, 31, 1000, 8193, 1_000_003)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU that this build of torch can use"
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_module_imports_without_a_gpu_and_says_why() -> None:
    cuda = pytest.importorskip("paikern._cuda", reason="_cuda was built without nvcc")
    count, why = cuda.device_count()
    assert count == 0
    assert why
    with pytest.raises(RuntimeError, match="paikern_pack_mask: CUDA driver") as raised:
        cuda.run([("paikern_pack_mask", 1, 32, 0, (0, 8, 0))], 0, 0)
    assert "\n" not in str(raised.value)
    assert cuda.run([], 0, 0) is None  # nothing to do is nothing to fail


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
@pytest.mark.parametrize("backend", ["cuda", "cuda_jit", "reference"])
def test_selection_on_the_gpu_equals_the_cpu(backend: str) -> None:
    if registry.load(backend).module is None:
        pytest.skip(registry.load(backend).reason)
    scores = [torch.randn(size).to(dtype) for size in SIZES for dtype in (torch.float32, HALF)]
    total = sum(s.numel() for s in scores)
    with registry.using(backend):
        for k in (1, total // 50, total // 2, total):
            found = ops.topk_mask([s.cuda() for s in scores], k)
            assert all(map(torch.equal, [f.cpu() for f in found], ops.topk_mask(scores, k)))
        counts = [s.numel() // 3 for s in scores]
        found = ops.topk_mask([s.cuda() for s in scores], counts, absolute=True)
        wanted = ops.topk_mask(scores, counts, absolute=True)
        assert all(map(torch.equal, [f.cpu() for f in found], wanted))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["cuda", "cuda_jit"])
def test_made_scores_and_patterns_on_the_gpu_equal_the_cpu(backend: str) -> None:
    if registry.load(backend).module is None:
        pytest.skip(registry.load(backend).reason)
    w, a, g = torch.randn(300, 1000).to(HALF), torch.rand(1000), torch.rand(300)
    mask = ops.pack_mask(torch.rand(w.shape) < 0.5)
    device = [t.cuda() for t in (w, a, g, mask)]

    def all_of(w: Tensor, a: Tensor, g: Tensor, mask: Tensor) -> list[Tensor]:
        return [
            *ops.topk_mask_factored([w, w], [a, a], [g, g], [0, 5], 100_000, masks=[mask, None]),
            *ops.topk_mask_product(w, w.flip(0), 1234),
            *ops.nm_mask_factored([w], [a], [g], 2, 4, masks=[mask]),
            *ops.nm_mask([w, w.double()], 3, 7, dims=0, absolute=True),
            ops.block_means(w, (16, 20)),
            ops.block_means_factored(w, a, g, (3, 8), mask=mask),
            ops.expand_blocks(mask[:1000], (300, 1000), (10, 10)),
        ]

    wanted = all_of(w, a, g, mask)
    with registry.using(backend):
        found = all_of(*device)
    assert all(map(torch.equal, [f.cpu() for f in found], wanted))


@pytest.mark.gpu
@needs_gpu
def test_a_graph_holds_a_selection_and_replays_it_on_other_values() -> None:
    from paikern.backends.cuda_layers import dense
    from paikern.backends.cuda_select import SelectionPlan

    scores, k = torch.randn(3_000_000, device="cuda"), torch.tensor([1000], device="cuda")
    plan = SelectionPlan(dense([scores], (), True), k)
    plan.launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.launch()
    for count in (1000, 2_500_000, 1):
        k.fill_(count)
        scores.normal_()
        graph.replay()
        wanted = ops.topk_mask(scores.cpu(), count, absolute=True)
        assert torch.equal(plan.bits[0].cpu(), wanted[0])
    plan.check("graph")


@pytest.mark.gpu
@needs_gpu
def test_tensors_of_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="apply_mask_: tensors are on cuda:0 and cpu"):
        ops.apply_mask_(torch.ones(8, device="cuda"), torch.ones(1, dtype=torch.uint8))
