"""`topk_mask_factored` with maps: the mask of scores that path_conv_score would store."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paikern import ops
from paikern.backends import registry


def out_size(size, kernel, stride, padding, dilation):
    return [
        (n + 2 * p - d * (q - 1) - 1) // s + 1
        for n, q, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31 - 1),
    axes=st.integers(1, 3),
    groups=st.sampled_from([1, 1, 2]),
    batch=st.integers(1, 3),
    power=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    masked=st.booleans(),
    keep=st.floats(0, 1),
)
def test_equals_the_stored_scores(seed, axes, groups, batch, power, dtype, masked, keep) -> None:
    generator = torch.Generator().manual_seed(seed)

    def pick(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=generator))]

    kernel = [pick(1, 2, 3) for _ in range(axes)]
    stride, dilation = [pick(1, 2) for _ in range(axes)], [pick(1, 2) for _ in range(axes)]
    padding = [pick(0, 1) for _ in range(axes)]
    size = [pick(5, 7, 9) for _ in range(axes)]
    inputs, outputs = groups * pick(1, 3, 16), groups * pick(1, 5, 40)
    weight = torch.randn(outputs, inputs // groups, *kernel, generator=generator).to(dtype)
    x = torch.rand(batch, inputs, *size, generator=generator)
    out = out_size(size, kernel, stride, padding, dilation)
    g = torch.rand(batch, outputs, *out, generator=generator)
    linear = torch.randn(30, 20, generator=generator)
    a, b = torch.rand(batch, 20, generator=generator), torch.rand(batch, 30, generator=generator)
    mask = ops.pack_mask(torch.rand(weight.shape, generator=generator) < 0.5) if masked else None
    conv = (stride, padding, dilation, groups)
    scores = [
        ops.path_conv_score(weight, x, g, *conv, power=power),
        ops.path_score(linear, a, b, power=power),
    ]
    exponents = [pick(0, 3), 0]
    k = int(keep * (weight.numel() + linear.numel()))
    stored = ops.topk_mask(scores, k, exponents=exponents, masks=[mask, None])
    streamed = ops.topk_mask_factored(
        [weight, linear], [x, a], [g, b], exponents, k,
        power=power, masks=[mask, None], convs=[conv, None],
    )  # fmt: skip
    assert all(torch.equal(s, t) for s, t in zip(stored, streamed, strict=True))


@pytest.mark.parametrize(("outputs", "inputs", "side"), [(256, 128, 6), (96, 33, 14)])
def test_layers_of_many_chunks(outputs: int, inputs: int, side: int) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator)
    x = torch.rand(1, inputs, side, side, generator=generator)
    g = torch.rand(1, outputs, side, side, generator=generator)
    conv = ([1, 1], [1, 1], [1, 1], 1)
    score = ops.path_conv_score(weight, x, g, *conv)
    for k in (1, weight.numel() // 10, weight.numel() - 1):
        streamed = ops.topk_mask_factored([weight], [x], [g], [0], k, convs=[conv])
        assert torch.equal(streamed[0], ops.topk_mask(score, k)[0])


def test_the_reference_agrees_where_scores_are_exact() -> None:
    weight = torch.arange(1.0, 73.0).reshape(4, 2, 3, 3)
    x, g = torch.ones(1, 2, 5, 5), torch.ones(1, 4, 5, 5)
    conv = ([1, 1], [1, 1], [1, 1], 1)
    native = ops.topk_mask_factored([weight], [x], [g], [0], 20, convs=[conv])
    with registry.using("reference"):
        reference = ops.topk_mask_factored([weight], [x], [g], [0], 20, convs=[conv])
    assert torch.equal(native[0], reference[0])


def test_what_does_not_fit_is_refused() -> None:
    weight, x, g = torch.ones(4, 2, 3, 3), torch.ones(1, 2, 5, 5), torch.ones(1, 4, 5, 5)
    conv = ([1, 1], [1, 1], [1, 1], 1)
    with pytest.raises(ValueError, match="needs its entry in convs"):
        ops.topk_mask_factored([weight], [x], [g], [0], 1)
    with pytest.raises(ValueError, match=r"layer 0: g must have shape \(1, 4, 3, 3\)"):
        ops.topk_mask_factored([weight], [x], [g], [0], 1, convs=[([1, 1], [0, 0], [1, 1], 1)])
    with pytest.raises(TypeError, match="must not be float64"):
        ops.topk_mask_factored([weight.double()], [x], [g], [0], 1, convs=[conv])
    with pytest.raises(ValueError, match="no position"):
        ops.topk_mask_factored([torch.ones(3, 2)], [x[:0, :, 0, 0]], [g[:0, :3, 0, 0]], [0], 1)
