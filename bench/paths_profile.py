"""Where the time of a DPaI step goes, and what bytes and multiply-adds alone would take.

The operations of a step are called layer by layer in the order of a step (forward sweep; adjoint
and update from the last layer to the first; selection) with the shapes, masks and state of the
network, and timed one by one; the whole step is timed beside them. What the whole takes beyond its
parts is the *rest*: pools, additions, divisions by the maximum, live nodes, calls. It is negative
where the step does a part better than the operation called by itself.

The limit of an operation is the larger of two times: its bytes over the measured copy bandwidth
and its multiply-adds over the measured peak. Bytes are one bit a weight for a sweep, and for the
update the scores and both moments, read and written, and the mask; maps are taken to stay in the
caches. A sweep needs a multiply-add for each kept weight and position, the gradient of the mask
one for each weight, kept or not: every weight may come back.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.references.erk import erk_quotas
from bench.references.peaks import Peaks
from bench.run_dpai import NETWORKS, SEED, SPARSITY, library_steps
from paikern import ops, zoo

MODELS = {"resnet20": 20, "vgg19_bn": 7, "resnet50": 5}  # name -> steps timed
QUICK_MODELS = {"resnet20": 3}
SWEEPS = ("forward", "adjoint")
PARTS = (*SWEEPS, "update")


class Layer(NamedTuple):
    """A prunable layer as the network uses it: `weight`, `x` and `y` are shapes."""

    name: str
    weight: tuple[int, ...]
    x: tuple[int, ...]  # [1, in, *size] or [1, in]
    y: tuple[int, ...]
    geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int] | None
    kept: int

    @property
    def kind(self) -> str:
        return f"{'x'.join(map(str, self.weight[2:]))} convolution" if self.geometry else "linear"

    @property
    def positions(self) -> int:
        """Pairs of an output position and a kernel tap that meet the input, not the padding."""
        if self.geometry is None:
            return 1
        stride, padding, dilation, _ = self.geometry
        axes = zip(self.x[2:], self.y[2:], self.weight[2:], stride, padding, dilation, strict=True)
        return math.prod(taps(*axis) for axis in axes)

    def multiply_adds(self, part: str) -> int:
        """Of a sweep: kept weights, spread evenly over the taps; of the update: all weights."""
        weights = math.prod(self.weight) if part == "update" else self.kept
        return round(weights / math.prod(self.weight[2:]) * self.positions)

    def bytes(self, part: str) -> int:
        """Scores and both moments in float32, read and written, and a bit for each weight."""
        weights = math.prod(self.weight)
        return (weights + 7) // 8 + (24 * weights if part == "update" else 0)

    def limit(self, part: str, peaks: Peaks) -> float:
        """Seconds below which no program gets on this machine."""
        return max(self.bytes(part) / peaks.copy, self.multiply_adds(part) / peaks.multiply_adds)


def taps(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Pairs of output position and tap along one axis that lie inside the input.

    >>> taps(2, 2, 3, 1, 1, 1), taps(4, 2, 1, 2, 0, 1)
    (4, 2)
    """
    return sum(
        0 <= position * stride + tap * dilation - padding < size
        for position in range(out)
        for tap in range(kernel)
    )


def layers_of(model: nn.Module, example: Tensor, sparsity: float = SPARSITY) -> list[Layer]:
    """The Linear and Conv2d layers in module order, with the shapes of one forward pass."""
    seen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    named = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = tuple(given[0].shape), tuple(output.shape)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in named.items()]
    with torch.no_grad():
        model.eval()(example)
    for hook in hooks:
        hook.remove()
    shapes = [tuple(module.weight.shape) for module in named.values()]
    quotas = erk_quotas(shapes, sparsity, "published")
    found = []
    for (name, module), shape, kept in zip(named.items(), shapes, quotas, strict=True):
        geometry = None
        if isinstance(module, nn.Conv2d):
            padding = tuple(int(p) for p in module.padding)
            geometry = (module.stride, padding, module.dilation, module.groups)
        found.append(Layer(f"{name}.weight", shape, *seen[name], geometry, kept))
    return found


class State(NamedTuple):
    """The tensors of one layer in a step."""

    s: Tensor
    m: Tensor
    v: Tensor
    mask: Tensor
    x: Tensor
    g: Tensor
    live: Tensor


def parts_of(layer: Layer, state: State) -> dict[str, Callable[[], object]]:
    """Part name -> the operation on this layer."""
    s, m, v, mask, x, g, live = state
    rule: dict[str, Any] = {"exp_avg": m, "exp_avg_sq": v, "lr": 0.005, "t": 100}
    if layer.geometry is None:
        return {
            "forward": lambda: ops.path_forward(s, x, power=0, mask=mask),
            "adjoint": lambda: ops.path_backward(s, g, power=0, mask=mask),
            "update": lambda: ops.dpai_step_(s, mask, x, g, live, 1e-6, **rule),
        }
    stride, padding, dilation, groups = layer.geometry
    where = (stride, padding, dilation, groups)
    rule |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    size = list(x.shape)
    return {
        "forward": lambda: ops.path_conv_forward(s, x, *where, power=0, mask=mask),
        "adjoint": lambda: ops.path_conv_backward(s, g, size, *where, power=0, mask=mask),
        "update": lambda: ops.dpai_step_(s, mask, x, g, live, 1e-6, **rule),
    }


def states_of(layers: list[Layer], scores: list[Tensor]) -> list[State]:
    """Masks of the scores, moments of zeros, positive maps, every node live."""
    masks = ops.topk_mask(scores, [layer.kept for layer in layers], absolute=True)
    generator = torch.Generator().manual_seed(SEED)
    return [
        State(
            s,
            torch.zeros_like(s),
            torch.zeros_like(s),
            mask,
            torch.rand(layer.x, generator=generator) + 0.5,
            torch.rand(layer.y, generator=generator) + 0.5,
            torch.ones(layer.weight[0], dtype=torch.uint8),
        )
        for layer, s, mask in zip(layers, scores, masks, strict=True)
    ]


def profile(name: str, steps: int) -> dict[str, Any]:
    """Time `steps` steps of one network, whole and in parts; medians in seconds."""
    model = zoo.create(name, seed=SEED, **NETWORKS[name][0])
    example = zoo.example_input(model)
    layers = layers_of(model, example)
    generator = torch.Generator().manual_seed(SEED)
    scores = [torch.randn(layer.weight, generator=generator) for layer in layers]
    kept = [layer.kept for layer in layers]
    named = {layer.name: s.clone() for layer, s in zip(layers, scores, strict=True)}
    whole = library_steps(model, example, named, kept, "published")
    states = states_of(layers, scores)
    calls = [parts_of(layer, state) for layer, state in zip(layers, states, strict=True)]
    memory = torch.full((len(layers), 2), math.nan, dtype=torch.float64)
    times: list[dict[str, list[float]]] = [{part: [] for part in PARTS} for _ in layers]
    wholes: list[float] = []
    selections: list[float] = []

    def timed(action: Callable[[], object], into: list[float]) -> None:
        start = time.perf_counter()
        action()
        into.append(time.perf_counter() - start)

    for _ in range(steps + 1):  # the first warms up
        timed(whole.step, wholes)
        for call, into in zip(calls, times, strict=True):
            timed(call["forward"], into["forward"])
        for call, into in zip(reversed(calls), reversed(times), strict=True):
            timed(call["update"], into["update"])
            timed(call["adjoint"], into["adjoint"])
        timed(lambda: ops.topk_mask(scores, kept, absolute=True, memory=memory), selections)
    return {
        "model": name,
        "sparsity": SPARSITY,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "seconds": statistics.median(wholes[1:]),
        "selection": statistics.median(selections[1:]),
        "layers": [
            layer._asdict()
            | {"kind": layer.kind}
            | {part: statistics.median(samples[1:]) for part, samples in into.items()}
            for layer, into in zip(layers, times, strict=True)
        ],
    }


def layer_from(row: dict[str, Any]) -> Layer:
    """A layer as it was written."""
    given = {field: row[field] for field in Layer._fields}
    geometry = given["geometry"]
    if geometry is not None:
        geometry = (*(tuple(part) for part in geometry[:3]), geometry[3])
    shapes = {field: tuple(given[field]) for field in ("weight", "x", "y")}
    return Layer(**{**given, **shapes, "geometry": geometry})
