"""Tracing on stand-ins against tracing by `torch.export`: the same graph, field by field."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paikern import zoo
from paikern.errors import PathRuleError
from paikern.pathgraph import PathGraph, capture, trace
from python_tests.pathgraph.helpers import state_of
from python_tests.pathgraph.test_models import TIMM, TRANSFORMERS, timm_model
from python_tests.pathgraph.test_rules import CONVOLUTIONS, HAND_WRITTEN, MHA, Attention, Gated

tracing = importlib.import_module("paikern.pathgraph.trace")


def contents(graph: PathGraph, model: nn.Module) -> list[Any]:
    """Everything a graph says; functions by what they compute."""
    state = state_of(model)
    said: list[Any] = [graph.inputs, graph.outputs, graph.notes]
    for step in graph.steps:
        fields: dict[str, Any] = {"type": type(step).__name__}
        for field in dataclasses.fields(step):
            value = getattr(step, field.name)
            if field.name == "fn":
                generator = torch.Generator().manual_seed(0)
                value = value(torch.rand(step.in_shape, generator=generator))
            elif callable(value):
                value = value(state)
            fields[field.name] = value.tolist() if isinstance(value, Tensor) else value
        said.append(fields)
    return said


def same_graph(a: PathGraph, b: PathGraph, model: nn.Module) -> None:
    for one, other in zip(contents(a, model), contents(b, model), strict=True):
        assert one == other


def check(model: nn.Module, inputs: Any) -> PathGraph:
    """Capture, which may not give up, against export."""
    given = tracing._one_sample(inputs)
    graph = tracing._captured(model, *given)
    same_graph(graph, tracing._exported(model, *given), model)
    return graph


SMALL: dict[str, dict[str, Any]] = {  # enough to meet every operation of the architecture
    "gpt2": {"layers": 2, "dim": 48, "heads": 4, "vocabulary": 100},
    "vit_b_16": {"layers": 2, "dim": 48, "heads": 4, "image_size": 32},
    "llama-160m": {"layers": 1},
    "llama-7b": {
        "layers": 1,
        "dim": 64,
        "heads": 4,
        "kv_heads": 4,
        "hidden": 96,
        "vocabulary": 50,
    },
}


@pytest.mark.parametrize("name", zoo.names())
def test_zoo(name: str) -> None:
    model = zoo.create(name, seed=0, **SMALL.get(name, {}))
    assert check(model, zoo.example_input(model)).weights


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    assert check(*TRANSFORMERS[name]()).weights


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    assert check(*timm_model(name, TIMM[name])).weights


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    layer, shape = CONVOLUTIONS[name]
    check(nn.Sequential(nn.Identity(), layer, nn.ReLU(inplace=True)), torch.ones(shape))


@pytest.mark.parametrize(
    "style", ["sdpa", "sdpa mask", "sdpa additive", "matmul", "scaled query", "bmm", "grouped"]
)
def test_attention(style: str) -> None:
    check(Attention(style, True), torch.randn(1, 6, 12))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_multihead_attention(need_weights: bool, cross: bool) -> None:
    check(MHA(need_weights, cross), torch.randn(1, 4, 8))


@pytest.mark.parametrize("kind", ["swiglu", "chunk", "glu"])
def test_gates(kind: str) -> None:
    check(Gated(kind), torch.randn(1, 4))


class Net(nn.Module):
    """A bit of everything, used by `function(net, *inputs)`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.emb = nn.Embedding(9, 4)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1
        )
        self.p = nn.Parameter(torch.rand(4))
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("count", torch.tensor(1))
        self.plain = torch.arange(4.0)  # neither parameter nor buffer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


X = torch.ones(1, 4)
IDS = torch.tensor([[1, 2, 3, 4]])
IMAGE = torch.ones(1, 3, 8, 8)
TOKENS = torch.ones(1, 5, 4)


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_functions_of_one_tensor(name: str) -> None:
    check(Net(lambda net, x: net.b(HAND_WRITTEN[name](net.a(x)))), X)


def write_to_alias(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    g = h.float()  # h itself
    g.add_(x)
    d = F.dropout(h, 0.5, False)  # not h
    d.mul_(x)
    return net.b(h) + g * d


def write_to_input(net: Net, x: Tensor) -> Tensor:
    x.add_(1)
    return net.a(x.relu_())


def write_to_ids(net: Net, ids: Tensor) -> Tensor:
    ids[:, 0] = 3
    return net.a(net.emb(ids.clamp_(max=3))) * ids.sum().float()


def write_to_buffers(net: Net, x: Tensor) -> Tensor:
    net.count += 1
    net.table = net.table * 2
    return net.a(x) * net.table


def fresh_tensors(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    h = h + torch.zeros(1, 4, device=h.device, dtype=h.dtype) + h.new_ones(4)
    return h * torch.ones_like(h) + torch.full_like(h, 3) + torch.rand(4) + torch.rand_like(h)


def questions(net: Net, x: Tensor) -> Tensor:
    assert isinstance(net.p, nn.Parameter)
    assert x.device == torch.device("cpu")
    assert x.is_contiguous()
    assert not x.is_meta
    assert not torch.is_grad_enabled()
    return net.a(x) if torch.compiler.is_compiling() and net.p.is_leaf else net.b(x)


def regions(net: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        h = net.a(x)
    with torch.inference_mode():
        h = net.b(h)
    with torch.autocast("cpu", enabled=False):
        return net.a(h)


def layouts(net: Net, x: Tensor) -> Tensor:
    h = net.a(x).transpose(1, 2)
    h = (F.gelu(h) + h).contiguous().view(1, -1, 5)
    return torch.cat([h, h.neg()], 1).permute(0, 2, 1)[..., ::2].flatten(1)


def image(net: Net, x: Tensor) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    h = torch.cat([F.relu(net.conv(x)), x], 1).roll(1, 2).flip(3)
    h, _ = F.max_pool2d(h, 2, return_indices=True)
    h = F.avg_pool2d(F.pad(F.interpolate(h, scale_factor=2.0), (1, 1, 1, 1)), 3, 1)
    u, v, w = torch.stack(h.unbind(1), 1).tensor_split(3, 1)
    return F.pixel_unshuffle(F.adaptive_max_pool2d(u * v + w, 2), 2).mean((2, 3))


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(min=0)


def parameter_views(net: Net, x: Tensor) -> Tensor:
    h = F.linear(x @ net.a.weight.t() @ net.a.weight, net.b.weight.chunk(2)[1])
    return F.linear(h, net.b.weight[1:3].t()) * net.p[:4].abs()


FOLLOWED: dict[str, tuple[Callable[..., Any], Any]] = {
    "write to an alias": (write_to_alias, X),
    "write to the input": (write_to_input, X),
    "write to token ids": (write_to_ids, IDS),
    "write to buffers": (write_to_buffers, X),
    "fresh tensors": (fresh_tensors, X),
    "questions": (questions, X),
    "regions": (regions, X),
    "layouts": (layouts, TOKENS),
    "image": (image, IMAGE),
    "views of parameters": (parameter_views, X),
    "token ids": (
        lambda n, i: n.emb(i).masked_fill((i > 2)[..., None], 0)[:, i[0] - 1] + n.emb(i), IDS,
    ),
    "keywords": (lambda n, x, y: {"z": n.a(x) + n.b(y), "b": (2 * y, 3)}, {"y": X, "x": X}),
    "nested": (lambda n, x, k, d: n.a(x) * k + n.b(d["u"]), (X, 3, {"u": X})),
    "constants": (lambda n, x: n.a(x) * n.plain + n.plain.double().mean() + 2, X),
    "mixed dtypes": (lambda n, x: n.a(x.double().float()) * torch.arange(4) + n.table * x, X),
    "direct call": (lambda n, x: n.a.forward(x) + F.linear(x, n.b.weight), X),
    "encoder": (lambda n, x: n.encoder(x), TOKENS),
    "padded encoder": (
        lambda n, x, m: n.encoder(x, src_key_padding_mask=m), (TOKENS, torch.zeros(1, 5) > 0),
    ),
    "autograd function": (lambda n, x: n.b(Clamp.apply(n.a(x))), X),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_odd_modules_are_followed(name: str) -> None:
    function, inputs = FOLLOWED[name]
    check(Net(function), inputs)


def test_shared_modules_go_by_the_name_their_caller_uses() -> None:
    class Half(nn.Module):
        def __init__(self, table: nn.Module) -> None:
            super().__init__()
            self.table, self.fc = table, nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.table(x))

    table = nn.Linear(4, 4)
    graph = check(nn.Sequential(Half(table), Half(table)), X)
    assert [s.where for s in graph.weights] == ["0.table", "0.fc", "1.table", "1.fc"]
    assert [s.parameter for s in graph.weights][::2] == ["0.table.weight"] * 2


def test_hooks_of_the_model_run() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    model[1].register_forward_hook(lambda module, args, out: out + args[0])
    graph = check(model, X)
    assert [s.where for s in graph.steps] == ["0", "0", "1", "1"]


def test_compiled_models_run_as_written() -> None:
    part = torch.compile(nn.Linear(4, 4), backend="eager")
    model = torch.compile(nn.Sequential(part, nn.ReLU(), nn.Linear(4, 2)), backend="eager")
    assert len(check(model, X).weights) == 2


def written_constant(net: Net, x: Tensor) -> Tensor:
    total = torch.zeros(1, 4)
    total.add_(net.a(x))
    return net.b(total)


def out_argument(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    torch.add(h, x, out=h)
    return net.b(h)


def autocast(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = net.a(x)
    return net.b(h.float())


def two_names(net: Net, x: Tensor) -> Tensor:
    return net.twin(F.relu(net.a(x)))


def caught(net: Net, x: Tensor) -> Tensor:
    try:
        positive = float(net.p[0]) > 0
    except Exception:
        positive = True
    return net.a(x) if positive else net.b(x)


EXPORTED: dict[str, tuple[Callable[..., Any], Any]] = {
    "a constant is written to": (written_constant, X),
    "out=": (out_argument, X),
    "autocast": (autocast, X),
    "two names of one module": (two_names, X),
    "a value is read": (lambda n, x: n.a(x) * torch.tensor(3.0).item(), X),
    "shape from values": (lambda n, i: n.emb(i)[:, (i[0] > 2).nonzero()[:, 0]], IDS),
    "an error is caught": (caught, X),
    "in place transpose": (lambda n, x: n.a(x).t_() * 2, X),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_the_rest_goes_through_export(name: str) -> None:
    function, inputs = EXPORTED[name]
    net = Net(function)
    net.twin = net.a if "names" in name else None
    given = tracing._one_sample(inputs)
    with pytest.raises(capture.UnsupportedError):
        tracing._captured(net, *given)
    same_graph(trace(net, inputs), tracing._exported(net, *given), net)


def caught_list(net: Net, ids: Tensor) -> Tensor:
    try:
        first = ids.tolist()[0][0]
    except Exception:
        first = 0
    return net.a(net.emb(ids)) if first else net.emb(ids)


BRANCHES: dict[str, tuple[Callable[..., Any], Any]] = {
    "on paths": (lambda n, x: n.a(x) if x.sum() > 0 else n.b(x), X),
    "on ids": (lambda n, i: n.emb(i) if i.max() > 3 else n.b(n.emb(i)), IDS),
    "on a list of ids": (lambda n, i: n.emb(i) if max(i.tolist()[0]) else n.b(n.emb(i)), IDS),
    "on a buffer": (lambda n, x: n.a(x) if n.count else n.b(x), X),
    "on a parameter": (lambda n, x: n.a(x) if n.p[0].item() > 0 else n.b(x), X),
    "on memory": (lambda n, x: n.a(x) if x.data_ptr() else n.b(x), X),
    "after an error": (caught_list, IDS),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_no_branch_is_taken_on_values(name: str) -> None:
    function, inputs = BRANCHES[name]
    with pytest.raises(ValueError, match="could not be traced"):
        trace(Net(function), inputs)


@pytest.mark.parametrize("wrong", [torch.ones(1, 5), torch.ones(1, 3, 7)])
def test_wrong_inputs_are_refused(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="example_inputs: Net could not be traced"):
        trace(Net(lambda net, x: net.a(x) + 0), wrong)


@pytest.mark.parametrize("channels", [2, 6])
def test_wrong_channels_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match="could not be traced"):
        trace(nn.Conv2d(3, 4, 3), torch.ones(1, channels, 8, 8))


def test_model_inputs_and_process_stay_as_they_were() -> None:
    net = Net(lambda net, x: write_to_buffers(net, x.add_(torch.rand(4))))
    x = torch.ones(2, 4)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    tensors = {name: id(value) for name, value in net.named_parameters()}
    random = torch.get_rng_state()
    fused = torch.backends.mha.get_fastpath_enabled()
    trace(net, x)
    tracing._exported(net, *tracing._one_sample(x))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, torch.ones(2, 4))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert {name: id(value) for name, value in net.named_parameters()} == tensors
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert net.training
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert not torch.compiler.is_compiling()


def test_an_error_inside_vmap_leaves_vmap() -> None:
    net = Net(lambda net, x: torch.vmap(lambda t: torch.special.erfcx(net.a(t)))(x))
    with pytest.raises(PathRuleError):
        trace(net, TOKENS)
    assert torch.rand(3).shape == (3,)  # vmap forbids random numbers


_FRESH = """
import sys, torch, paikern
model = paikern.zoo.create("{0}", **{1})
before = set(sys.modules)
print(paikern.pathgraph.trace(model, paikern.zoo.example_input(model)))
slow = [name for name in ("torch._dynamo", "sympy") if name in set(sys.modules) - before]
sys.exit(f"imported {{slow}}" if slow else 0)
"""


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "gpt2", "llama-tiny", "vit_b_16"])
def test_the_first_trace_imports_no_compiler(name: str) -> None:
    """torch._dynamo takes 0.9 s, sympy 0.3 s; tracing resnet20 takes 0.08 s with neither."""
    sizes = SMALL.get(name, {})
    code = _FRESH.format(name, sizes)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
