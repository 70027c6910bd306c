"""Every step against the definition of an adjoint: <A x, y> = <x, A^T y>."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paikern.pathgraph import Flow, Semantics, trace

CASES = {
    "reshape": (lambda x: x.reshape(2, 6).flatten(0), (1, 12)),
    "permute": (lambda x: x.permute(0, 2, 1).transpose(1, 2), (1, 3, 4)),
    "expand": (lambda x: x.unsqueeze(1).expand(-1, 5, -1), (1, 3)),
    "slice": (lambda x: x[:, 1:6:2], (1, 7)),
    "select": (lambda x: x[:, 2], (1, 4, 3)),
    "negative slice": (lambda x: x[:, -3:], (1, 7)),
    "chunk and cat": (lambda x: torch.cat(x.chunk(3, 1)[::-1], 1), (1, 7)),
    "split": (lambda x: x.split([1, 4], 1)[1], (1, 5)),
    "unbind and stack": (lambda x: torch.stack(x.unbind(1)[:2], 2), (1, 3, 4)),
    "mean": (lambda x: x.mean((2, 3)), (1, 3, 4, 5)),
    "mean keepdim": (lambda x: x.mean(-1, keepdim=True), (1, 3, 4)),
    "sum": (lambda x: x.sum(1), (1, 3, 4)),
    "max_pool1d": (lambda x: nn.functional.max_pool1d(x, 2), (1, 3, 9)),
    "max_pool2d": (lambda x: nn.functional.max_pool2d(x, 3, 2, 1), (1, 3, 9, 8)),
    "max_pool2d ceil": (lambda x: nn.functional.max_pool2d(x, 2, ceil_mode=True), (1, 2, 7, 7)),
    "max_pool3d": (lambda x: nn.functional.max_pool3d(x, 2), (1, 2, 4, 4, 6)),
    "avg_pool2d": (lambda x: nn.functional.avg_pool2d(x, 3, 2, 1), (1, 3, 9, 8)),
    "adaptive mean": (lambda x: nn.functional.adaptive_avg_pool2d(x, 1), (1, 3, 5, 4)),
    "adaptive grid": (lambda x: nn.functional.adaptive_avg_pool2d(x, (2, 3)), (1, 3, 5, 7)),
    "adaptive max": (lambda x: nn.functional.adaptive_max_pool2d(x, 2), (1, 3, 5, 7)),
    "upsample": (lambda x: nn.functional.interpolate(x, scale_factor=2), (1, 2, 3, 3)),
    "bilinear": (lambda x: nn.functional.interpolate(x, (5, 5), mode="bilinear"), (1, 2, 3, 3)),
    "pad": (lambda x: nn.functional.pad(x, (1, 2, 0, 1)), (1, 2, 3, 3)),
    "reflect": (lambda x: nn.functional.pad(x, (1, 1), mode="reflect"), (1, 2, 4)),
    "roll": (lambda x: torch.roll(x, 2, 1), (1, 5)),
    "flip": (lambda x: x.flip(1), (1, 5)),
    "pixel_shuffle": (lambda x: nn.functional.pixel_shuffle(x, 2), (1, 8, 2, 3)),
    "repeat": (lambda x: x.repeat(1, 3), (1, 4)),
    "index": (lambda x: x[:, torch.tensor([2, 0, 0])], (1, 4)),
    "residual": (lambda x: x + 2 * x.roll(1, 1), (1, 5)),
    "broadcast add": (lambda x: x + x.mean(1, keepdim=True).roll(1, 0), (1, 5)),
    "constant product": (lambda x: x * torch.tensor([0.5, 2.0, 3.0]), (1, 3)),
    "division": (lambda x: x / 4.0, (1, 3)),
    "amax": (lambda x: x.amax(1), (1, 6)),
}


class _Between(nn.Module):
    """Linear, the operation, linear: the graph's ends are weights whose scores must agree."""

    def __init__(self, fn, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.fn = fn
        n = torch.Size(shape).numel()
        self.first = nn.Linear(3, n, bias=False)
        out = fn(torch.ones(shape))
        self.last = nn.Linear(out.numel(), 2, bias=False)
        self.shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.fn(self.first(x).reshape(self.shape)).reshape(1, -1))


@pytest.mark.parametrize("name", CASES)
def test_step_agrees_with_autograd(name: str) -> None:
    fn, shape = CASES[name]
    net = _Between(fn, shape).double()
    flow = Flow(trace(net, torch.ones(1, 3)), Semantics(1), dtype=torch.float64)
    state = {n: p.detach() for n, p in net.named_parameters()}
    total = flow.forward(state)
    seen = {}
    flow.backward(lambda v: seen.update({v.step.parameter: v}))

    with torch.no_grad():
        for p in net.parameters():
            p.abs_()
    net(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    truth = net(torch.ones(1, 3, dtype=torch.float64)).sum().log()
    assert total == pytest.approx(float(truth), rel=1e-12)
    for parameter, v in seen.items():
        q = v.g.reshape(-1, v.g.shape[-1]).T @ v.x.reshape(-1, v.x.shape[-1]) * 2.0**v.exponent
        expected = dict(net.named_parameters())[parameter].grad
        torch.testing.assert_close(q, expected, rtol=1e-10, atol=1e-12)
    assert len(seen) == 2
