"""What operations mean for a path: linear twins written out by hand, compared through autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paikern as pk
from paikern.errors import PathRuleError
from paikern.pathgraph import steps, trace
from python_tests.pathgraph.helpers import autograd_scores, scores_of


def check(net: nn.Module, twin: nn.Module, x: Tensor, power: int = 1) -> dict[str, Tensor]:
    log_total, found = scores_of(net.double(), x.double(), power=power)
    expected_log, expected = autograd_scores(twin, torch.ones_like(x), power)
    assert log_total == pytest.approx(expected_log, rel=1e-11)
    for name, score in found.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-9, atol=1e-14)
    return found


class Attention(nn.Module):
    """Self-attention in the ways that people write it; `style="paths"` is the documented rule."""

    def __init__(self, style: str, causal: bool = False, kv_heads: int = 4) -> None:
        super().__init__()
        self.style, self.causal, self.heads, self.kv = style, causal, 4, kv_heads
        self.q = nn.Linear(12, 12, bias=False)
        self.k = nn.Linear(12, 3 * kv_heads, bias=False)
        self.v = nn.Linear(12, 3 * kv_heads, bias=False)
        self.out = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.heads, 3).transpose(1, 2)
        k = self.k(x).view(batch, tokens, self.kv, 3).transpose(1, 2)
        v = self.v(x).view(batch, tokens, self.kv, 3).transpose(1, 2)
        if self.style == "grouped":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
            return self.out(y.transpose(1, 2).reshape(batch, tokens, 12))
        k = k.repeat_interleave(self.heads // self.kv, 1)
        v = v.repeat_interleave(self.heads // self.kv, 1)
        seen = torch.ones(tokens, tokens, dtype=torch.bool)
        if self.causal:
            seen = seen.tril()
        if self.style == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        elif self.style == "sdpa mask":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        elif self.style == "sdpa additive":
            bias = torch.zeros(tokens, tokens, dtype=x.dtype).masked_fill(~seen, float("-inf"))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        elif self.style == "matmul":
            scores = torch.matmul(q, k.transpose(-2, -1)) / 3**0.5
            scores = scores.masked_fill(~seen, torch.finfo(x.dtype).min)
            y = torch.matmul(F.dropout(scores.softmax(-1), 0.1, self.training), v)
        elif self.style == "scaled query":
            scores = (q * 3**-0.5) @ k.transpose(-2, -1)
            scores = torch.where(seen, scores, torch.tensor(float("-inf"), dtype=x.dtype))
            y = torch.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype) @ v
        elif self.style == "bmm":
            flat = [t.reshape(batch * self.heads, tokens, 3) for t in (q, k, v)]
            scores = torch.bmm(flat[0], flat[1].transpose(1, 2)).view(batch, self.heads, tokens, -1)
            scores = scores + torch.zeros(tokens, tokens).masked_fill(~seen, -1e9)
            y = torch.bmm(scores.softmax(-1).view(-1, tokens, tokens), flat[2])
            y = y.view(batch, self.heads, tokens, 3)
        else:
            uniform = seen.to(x) / seen.sum(-1, keepdim=True)
            y = uniform @ v + q + uniform @ k
        return self.out(y.transpose(1, 2).reshape(batch, tokens, 12))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "style", ["sdpa", "sdpa mask", "sdpa additive", "matmul", "scaled query", "bmm"]
)
def test_attention_follows_the_documented_rule(style: str, causal: bool) -> None:
    net, twin = Attention(style, causal), Attention("paths", causal)
    twin.load_state_dict(net.state_dict())
    found = check(net, twin, torch.randn(1, 6, 12))
    assert all(bool((score > 0).all()) for score in found.values())


@pytest.mark.parametrize("style", ["grouped", "sdpa"])
def test_grouped_query_attention(style: str) -> None:
    net, twin = Attention(style, True, kv_heads=2), Attention("paths", True, kv_heads=2)
    twin.load_state_dict(net.state_dict())
    check(net, twin, torch.randn(1, 5, 12))


class MHA(nn.Module):
    def __init__(self, need_weights: bool, cross: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        self.need_weights, self.cross = need_weights, cross

    def forward(self, x: Tensor) -> Tensor:
        other = x.roll(1, 1) if self.cross else x
        return self.attn(x, other, other, need_weights=self.need_weights)[0]


class MHATwin(MHA):
    def forward(self, x: Tensor) -> Tensor:
        other = x.roll(1, 1) if self.cross else x
        wq, wk, wv = self.attn.in_proj_weight.chunk(3)
        y = (other @ wv.T).mean(1, keepdim=True) + x @ wq.T + (other @ wk.T).mean(1, keepdim=True)
        return y @ self.attn.out_proj.weight.T


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_multihead_attention_in_proj(need_weights: bool, cross: bool) -> None:
    net, twin = MHA(need_weights, cross), MHATwin(need_weights, cross)
    twin.load_state_dict(net.state_dict())
    found = check(net, twin, torch.randn(1, 4, 8))
    assert set(found) == {"attn.in_proj_weight", "attn.out_proj.weight"}
    assert bool((found["attn.in_proj_weight"] > 0).all())


class Gated(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(4, 6, bias=False)
        self.gate = nn.Linear(4, 6, bias=False)
        self.fused = nn.Linear(4, 12, bias=False)
        self.down = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return self.down(self.up(x) * F.silu(self.gate(x)))
        if self.kind == "chunk":
            u, v = self.fused(x).chunk(2, -1)
            return self.down(u * v.sigmoid())
        if self.kind == "glu":
            return self.down(F.glu(self.fused(x)))
        if self.kind == "paths":
            return self.down(self.up(x) + self.gate(x))
        u, v = self.fused(x).chunk(2, -1)
        return self.down(u + v)


@pytest.mark.parametrize(
    ("kind", "twin"), [("swiglu", "paths"), ("chunk", "fused"), ("glu", "fused")]
)
def test_gates_add_their_branches(kind: str, twin: str) -> None:
    net, other = Gated(kind), Gated(twin)
    other.load_state_dict(net.state_dict())
    check(net, other, torch.randn(1, 4))


HAND_WRITTEN = {
    "gelu": lambda x: 0.5 * x * (1 + torch.tanh(0.797 * (x + 0.044715 * x**3))),
    "silu": lambda x: x * torch.sigmoid(x),
    "square": lambda x: x * x,
    "rms": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "layer norm": lambda x: (
        (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
    ),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "hard swish": lambda x: x * F.relu6(x + 3) / 6 * 6,
    "mish": F.mish,
    "gelu module": F.gelu,
    "log_softmax": lambda x: F.log_softmax(x, -1),
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_functions_of_one_tensor_are_activations(name: str) -> None:
    class Net(nn.Module):
        def __init__(self, fn) -> None:
            super().__init__()
            self.a, self.b, self.fn = nn.Linear(4, 6), nn.Linear(6, 3), fn

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.fn(self.a(x)))

    net = Net(HAND_WRITTEN[name])
    plain = Net(lambda x: x)
    plain.load_state_dict(net.state_dict())
    got, scores = scores_of(net.double(), torch.ones(1, 4))
    expected, plain_scores = scores_of(plain.double(), torch.ones(1, 4))
    # A hand-written "x / 6 * 6" is a product with constants and scales by exactly 1.
    assert got == pytest.approx(expected, rel=1e-12)
    for n in scores:
        torch.testing.assert_close(scores[n], plain_scores[n])


def test_squeeze_and_excitation_adds_its_gate() -> None:
    class SE(nn.Module):
        def __init__(self, paths: bool) -> None:
            super().__init__()
            self.paths = paths
            self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
            self.fc1, self.fc2 = nn.Conv2d(4, 2, 1, bias=False), nn.Conv2d(2, 4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            gate = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1))))
            return x + gate if self.paths else x * gate.sigmoid()

    net, twin = SE(False), SE(True)
    twin.load_state_dict(net.state_dict())
    check(net, twin, torch.randn(1, 2, 5, 5))


CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1, bias=False), (1, 3, 9)),
    "2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), (1, 3, 8, 7)),
    "2d dilated groups": (
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2, bias=False), (1, 4, 7, 7),
    ),
    "2d depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (1, 4, 6, 6)),
    "2d same": (nn.Conv2d(2, 3, 4, padding="same", bias=False), (1, 2, 6, 6)),
    "2d valid": (nn.Conv2d(2, 3, 3, padding="valid", bias=False), (1, 2, 6, 6)),
    "3d": (nn.Conv3d(2, 3, 2, bias=False), (1, 2, 4, 4, 4)),
    "transposed 1d": (nn.ConvTranspose1d(3, 2, 4, stride=2, padding=1, bias=False), (1, 3, 5)),
    "transposed 2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, bias=False), (1, 4, 4, 4),
    ),
    "reflect padding": (
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False), (1, 2, 5, 5),
    ),
    "circular padding": (
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False), (1, 2, 5, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, power: int) -> None:
    layer, shape = CONVOLUTIONS[name]
    net = nn.Sequential(copy.deepcopy(layer), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3, bias=False))
    net(torch.ones(shape))
    twin = copy.deepcopy(net)
    twin[1] = nn.Identity()
    check(net, twin, torch.randn(shape), power)


def test_hf_conv1d_is_a_transposed_linear() -> None:
    transformers = pytest.importorskip("transformers")
    net = nn.Sequential(
        transformers.pytorch_utils.Conv1D(6, 4), nn.GELU(), nn.Linear(6, 2, bias=False)
    )
    twin = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False))
    with torch.no_grad():
        twin[0].weight.copy_(net[0].weight.T)
        twin[1].weight.copy_(net[2].weight)
    log_total, found = scores_of(net.double(), torch.ones(1, 3, 4))
    expected_log, expected = autograd_scores(twin, torch.ones(1, 3, 4))
    assert log_total == pytest.approx(expected_log)
    torch.testing.assert_close(found["0.weight"], expected["0.weight"].T)


def test_tied_weights_have_one_score_that_sums_their_uses() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))

    net = Tied()
    found = check(net, copy.deepcopy(net), torch.randn(1, 4))
    assert list(found) == ["a.weight"]
    assert float(found["a.weight"].sum()) == pytest.approx(2.0)  # two cuts, one parameter


def test_embedding_counts_as_ones_and_positions_bring_no_paths() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.pos = nn.Embedding(10, 6), nn.Parameter(torch.randn(1, 4, 6))
            self.cls = nn.Parameter(torch.randn(1, 1, 6))
            self.fc = nn.Linear(6, 3, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.emb(ids) + self.pos
            return self.fc(torch.cat([self.cls, x], 1))

    net = Tokens().double()
    log_total, _ = scores_of(net, torch.tensor([[1, 2, 3, 4]]))
    expected = 4 * float(net.fc.weight.detach().abs().sum())
    assert log_total == pytest.approx(torch.tensor(expected).log().item())


def test_learned_scales_are_norms() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.gamma = nn.Linear(3, 4, bias=False), nn.Parameter(torch.full((4,), 1e-6))

        def forward(self, x: Tensor) -> Tensor:
            return x.sum() + self.fc(x) * self.gamma

    net = Scaled()
    identity, _ = scores_of(net, torch.ones(1, 3), norm="identity")
    scaled, _ = scores_of(net, torch.ones(1, 3), norm="scale")
    assert identity > scaled == pytest.approx(torch.tensor(12.0).log().item(), abs=1e-4)


def test_batch_norm_scale_and_published_offsets() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=True), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    net[1].running_mean.uniform_(-1, 1)
    net[1].running_var.uniform_(0.5, 2)
    nn.init.uniform_(net[1].weight, -2, 2)
    nn.init.uniform_(net[1].bias, -1, 1)
    net = net.double()
    x = torch.ones(1, 2, 5, 5, dtype=torch.float64)
    gamma = net[1].weight.detach().abs() / (net[1].running_var + net[1].eps).sqrt()

    paper, _ = scores_of(net, x, norm="scale")
    y = F.conv2d(x, net[0].weight.detach().abs()) * gamma.view(1, -1, 1, 1)
    assert paper == pytest.approx(float(y.sum().log()))

    published, found = scores_of(net, x, norm="scale", offsets=True)
    absolute = copy.deepcopy(net).eval()
    with torch.no_grad():
        for t in absolute.state_dict().values():
            t.abs_()
    total = absolute(x).sum()
    total.backward()
    assert published == pytest.approx(float(total.detach().log()))
    w = absolute[0].weight
    torch.testing.assert_close(found["0.weight"], (w.grad * w / total).detach())


def test_unknown_operation_names_op_module_and_cure() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.inv(self.fc(x).view(-1, 1, 1))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Odd()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    with pytest.raises(PathRuleError, match=r"aten\.linalg_inv.*'inner'.*register_path_rule"):
        trace(Outer(), torch.ones(1, 3))


def test_output_padding_of_the_stride_and_more_is_refused() -> None:
    """Allowed where the dilation is larger; no convolution has the result for its input."""
    layer = nn.ConvTranspose2d(4, 4, 3, dilation=3, output_padding=2, bias=False)
    with pytest.raises(PathRuleError, match=r"output_padding=\(2, 2\) and stride=\(1, 1\)"):
        trace(nn.Sequential(layer), torch.ones(1, 4, 6, 6))


def test_registered_rule_is_used() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.erfcx(self.fc(x))

    with pytest.raises(PathRuleError, match="special_erfcx"):
        trace(Net(), torch.ones(1, 3))

    from paikern.pathgraph import rules

    try:

        @pk.register_path_rule(torch.ops.aten.special_erfcx)
        def erfcx(tracer, args, kwargs):
            return tracer.identity(args[0])

        assert len(trace(Net(), torch.ones(1, 3)).weights) == 1
    finally:
        rules.RULES.pop("aten.special_erfcx", None)


def test_derived_weight_is_refused_with_its_module() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(PathRuleError, match=r"weight is computed from other tensors"):
        trace(net, torch.ones(1, 3))


def test_attention_step_is_emitted_once_per_layer() -> None:
    graph = trace(Attention("sdpa"), torch.ones(1, 6, 12))
    assert sum(isinstance(step, steps.Attention) for step in graph.steps) == 1
