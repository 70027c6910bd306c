"""PX: SynFlow-L2 whose outputs are weighted by the paths that are open on data.

    R = sum_n sum_k g_k(x_n**2) h_k,   S = theta**2 dR/dtheta**2

h is the network of squared weights on an input of ones. g_k(x**2) adds the squared inputs of all
kept paths to output k whose ReLUs are open for x. Since h does not depend on the sample, the data
enter as one number an output, c_k = sum_n g_k(x_n**2): the score is that of SynFlow-L2 with c as
the cotangent of the outputs, one sweep a round for any number of samples.

Source: PX (Iurada et al. 2024, arXiv:2406.01820), equations 6 to 9.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paikern import ops
from paikern.errors import PaikernError
from paikern.gradients import own_randomness
from paikern.pathgraph import Flow, PathGraph, Program, Semantics
from paikern.pathgraph.flow import Cotangent
from paikern.pathgraph.gated import GatedModel
from paikern.pathgraph.gated_program import GatedGraph, lower
from paikern.pathgraph.steps import Norm, Reshape, Weight
from paikern.scorers.base import Run, register_scorer
from paikern.scorers.device_loop import DeviceLoop
from paikern.scorers.path_loop import PathLoop, path_loop
from paikern.scorers.synflow import PathScorer, note_closed_norms
from paikern.scores import Scores

_Total = tuple[Tensor, int]
_TRIED = 4  # samples on which the native f and g are compared with the model


@register_scorer("px")
class PX(PathScorer):
    """`theta**2 dR/dtheta**2` with R weighted by the open paths of `data`.

    Args:
        coupling: "per_output" is R as written, each output with its own c_k. "product" couples the
            totals, (sum_k g_k)(sum_k h_k), for study: the data are then one factor, and the ranking
            is that of `synflow_l2`.
        pool_gate: max pools of g take the position of the model's maximum instead of their own.
        batch_size: samples at a time where `data` is one tensor.
    """

    coupling: str = "per_output"
    pool_gate: bool = False
    batch_size: int = 128

    summary = "SynFlow-L2 with outputs weighted by the paths that are open on data"
    source = "Iurada et al. 2024, eqs. 6-9"
    cost = "2 sweeps of one input and 2F a round"
    weakness = (
        "empties 6 layers of a ResNet-20 at 95 %, 12 at 99 %; refuses activations other than ReLU"
    )
    needs_data: ClassVar[bool] = True
    variants: ClassVar[tuple[str, ...]] = ("paper",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coupling not in ("per_output", "product"):
            raise ValueError(f"coupling must be 'per_output' or 'product', got {self.coupling!r}")

    @property
    def powers(self) -> tuple[int, int]:
        return 2, 2

    def score(self, run: Run) -> Scores:
        _refuse_integers(run)
        return super().score(run)

    def loop(self, run: Run) -> PathLoop | DeviceLoop | None:
        _refuse_integers(run)
        if not self.monotone:
            return None
        if self.norm == "scale":
            note_closed_norms(run)
        flow = run.flow(Semantics(self.powers[0], self.norm), self.conv)

        def prepare(program: Program) -> float:
            program.set_cotangent(self.cotangent(run, program))
            log_flow: float = run.cache["log_flow"]
            return log_flow

        return path_loop(run, flow, self.powers[1], self._dead, prepare)

    def cotangent(self, run: Run, flow: Flow | Program) -> Cotangent:
        """c of this round, one tensor an output of the graph, its largest entry in [1, 2).

        Where all c_k are known to be equal only one sample is read, to see that they are not 0.
        """
        equal = self.coupling == "product" or run.cache.get("equal", True)
        if equal and self.coupling != "product":  # what is pruned stays so
            equal = run.cache["equal"] = _outputs_are_equal(run)
        totals = self._totals(run, 1 if equal else None)
        if equal and not _any_open(totals):
            totals = self._totals(run, None)
        if not _any_open(totals):
            raise PaikernError(
                "px: no path is open on data: every ReLU between the input and the output is shut "
                f"for every sample, under masks of {_kept(run)}; use other or more samples"
            )
        outputs = flow.outputs
        if [t.shape for t, _ in totals] != [t.shape for t, _ in outputs]:
            raise PaikernError(
                f"px: the model returns tensors of shapes {[tuple(t.shape) for t, _ in totals]} "
                f"where its graph has {[tuple(t.shape) for t, _ in outputs]}; return one tensor "
                "[n, outputs]"
            )
        if equal:
            totals = [(torch.ones_like(t), 0) for t, _ in outputs]
        run.cache["log_flow"] = _log_total(totals, outputs)
        if run.cache["log_flow"] == -math.inf:
            raise PaikernError(
                "px: no output that is reached on data is reached by squared weights, so no weight "
                "scores above 0; use more rounds, a lower sparsity or other data"
            )
        return totals

    def statistics(self, run: Run) -> dict[str, float]:
        return {"log_flow": run.cache["log_flow"]}

    def _totals(self, run: Run, samples: int | None) -> list[_Total]:
        """`sum_n g` of each output over the first `samples`, all where None."""
        assert run.data is not None
        networks = None
        expected = next(iter(run.graph.inputs.values()))[1:]
        totals: list[_Total] = []
        # A loader may shuffle and a model may draw; tensors and the native program do not.
        drawn = not (run.data.whole and isinstance(run.cache.get("networks"), GatedGraph))
        with own_randomness(run.model, run.seed) if drawn else nullcontext():
            for x, _ in run.data:
                if x.shape[1:] != torch.Size(expected):
                    raise ValueError(
                        f"data: samples of shape {tuple(x.shape[1:])} where example_inputs has "
                        f"{tuple(expected)}; pass samples that the model accepts"
                    )
                x = x[:samples].to(run.weight(next(iter(run.layers))))
                if networks is None:
                    networks = _networks(run, self.pool_gate, x)
                found = networks.totals(x)
                totals = (
                    [_sum(*pair) for pair in zip(totals, found, strict=True)] if totals else found
                )
                if samples is not None:
                    break
        return [_normalised(*total) for total in totals]


def _refuse_integers(run: Run) -> None:
    """Before the model is traced, which would find other words for it."""
    for x in pytree.tree_leaves(run.example_inputs):
        if isinstance(x, Tensor) and not x.is_floating_point():
            raise ValueError(
                f"data: px squares its inputs, so they have to be floats, got {x.dtype}; "
                + (
                    "convert bytes as in training, for instance x.float() / 255"
                    if x.dtype == torch.uint8
                    else "token numbers have no squares: use ntk_sap or wanda"
                )
            )


def _networks(run: Run, pool_gate: bool, x: Tensor) -> GatedModel | GatedGraph:
    """f and g under the masks of this round: the native program where it is known to be right.

    It reads the path graph, which leaves out what carries no path; so it has to give f and g of
    the model on a few samples, once, before it is used.
    """
    networks: GatedModel | GatedGraph | None = run.cache.get("networks")
    if networks is None:
        names = {name: layer.source for name, layer in run.layers.items()}
        model = networks = GatedModel(run.model, names, pool_gate)
        model.load(run.state, run.masks)
        few = x[:_TRIED]
        totals, output = model.totals(few), model.output(few)  # refuses what has no gates
        program = lower(run.graph, run.state, x.device.type, x.dtype, pool_gate)
        if program is not None and output is not None:
            program.load(run.state, run.masks)
            if program.agrees(few, output, totals):
                networks = program
        run.cache["networks"] = networks
    networks.load(run.state, run.masks)
    return networks


def _outputs_are_equal(run: Run) -> bool:
    """Whether all c_k are one number, because one dense linear layer makes all outputs.

    With weights of one and no mask each of its rows adds up the same values. So it is before the
    first round, and for good where that layer is not pruned; a sequence of outputs, an activation
    behind the layer or a second branch makes them differ.
    """
    last = _last_weight(run.graph)
    if last is None or last.kind != "linear" or last.positions != 1:
        return False
    packed = run.masks.get(last.parameter)
    if packed is None:
        return True
    shape = run.state[last.parameter].shape
    return bool(ops.unpack_mask(packed, shape).all())


def _last_weight(graph: PathGraph) -> Weight | None:
    """The weight that makes the one output by itself; g leaves norms out."""
    if len(graph.outputs) != 1:
        return None
    made = {step.output: step for step in graph.steps}
    at = graph.outputs[0]
    while at in made:
        step = made[at]
        if isinstance(step, Weight):
            return step
        if not isinstance(step, (Norm, Reshape)):
            return None
        at = step.inputs[0]
    return None


def _any_open(totals: list[_Total]) -> bool:
    return any(bool((t > 0).any()) for t, _ in totals)


def _sum(a: _Total, b: _Total) -> _Total:
    top = max(a[1], b[1])
    return a[0] * 2.0 ** max(-1000, a[1] - top) + b[0] * 2.0 ** max(-1000, b[1] - top), top


def _normalised(total: Tensor, exponent: int) -> _Total:
    shift = math.frexp(float(total.max()))[1] - 1 if bool((total > 0).any()) else 0
    return total * 2.0**-shift, exponent + shift


def _log_total(cotangent: list[_Total], outputs: list[_Total]) -> float:
    """`log sum_k c_k h_k`."""
    parts = [
        (float((c.double() * y.double()).sum()), e + f)
        for (c, e), (y, f) in zip(cotangent, outputs, strict=True)
    ]
    top = max(e for _, e in parts)
    total = sum(math.ldexp(value, e - top) for value, e in parts)
    return math.log(total) + top * math.log(2) if total > 0 else -math.inf


def _kept(run: Run) -> str:
    if not run.masks:
        return "all weights"
    kept = sum(int(ops.unpack_mask(m, run.shapes[n]).sum()) for n, m in run.masks.items())
    return f"{kept} weights"
