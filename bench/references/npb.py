"""NPB as it is commonly run: an integer program for every piece of every layer, solved by HiGHS.

Weights are replaced by masks, norms and activations by the identity, biases dropped, the input is
ones; P[i] is what enters a layer by input i, summed over positions. With X[i, o] weights kept in
the kernel of input i and output o, b the budget and pos(x) = max(x, 0):

    A = [I + O - sum_i pos(t - sum_o X) - sum_o pos(t - sum_i X)] / (I + O)
    B = sum P[i] X[i, o] / longest,    longest the largest possible sum P X of b weights
    C = [b - sum pos(1 - X)] / b
    maximise  alpha A + (1 - alpha) B + beta C    for integers 0 <= X <= K with sum X <= b

The network is run again, whole and in float64, for the input of every layer. A large layer is
taken apart into pieces of `chunk` outputs with a program each; the budget of a layer is shared
among its pieces by size, and the last may be smaller. Budgets are ERK and exact. Which positions of
a kernel are kept is random. Source: specification of NPB, sections 1 to 4.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, hstack, identity, kron, vstack
from torch import Tensor, nn

from bench.references.erk import erk_quotas
from bench.references.layers import (
    IDENTITY,
    NotFinishedError,
    ones_like_input,
    prunable_layers,
    replace_modules,
)
from bench.references.selection import Masks

Array = npt.NDArray[np.float64]


class Program(NamedTuple):
    """One integer program: P, O, b, K, t and the weights of the three terms."""

    paths: Array
    outputs: int
    budget: int
    capacity: int
    least: int
    alpha: float
    beta: float

    @property
    def longest(self) -> float:
        """The largest sum P X of b weights: the best inputs, all of their weights."""
        ordered = np.sort(self.paths)[::-1]
        whole, rest = divmod(self.budget, self.outputs * self.capacity)
        last = rest * ordered[whole] if rest else 0.0
        return float(self.outputs * self.capacity * ordered[:whole].sum() + last)

    def objective(self, entries: Array) -> float:
        """alpha A + (1 - alpha) B + beta C of X, `[I, O]`."""
        inputs, outputs = entries.shape
        missing = np.maximum(self.least - entries.sum(1), 0).sum()
        missing += np.maximum(self.least - entries.sum(0), 0).sum()
        nodes = (inputs + outputs - missing) / (inputs + outputs)
        paths = float(self.paths @ entries.sum(1)) / self.longest
        kernels = (self.budget - np.maximum(1 - entries, 0).sum()) / self.budget
        return float(self.alpha * nodes + (1 - self.alpha) * paths + self.beta * kernels)


def solve(program: Program, seconds: float = math.inf) -> Array:
    """The best X, `[I, O]`, by HiGHS with its own defaults.

    Variables are X and the deficits pos(...) of rows, columns and entries, which the objective
    pushes down onto what is missing.

    Raises:
        NotFinishedError: HiGHS took longer than `seconds`.
        RuntimeError: any other end without an optimum.
    """
    inputs, outputs, b = len(program.paths), program.outputs, program.budget
    entries = inputs * outputs
    node = program.alpha / (inputs + outputs)
    cost = np.concatenate(
        [
            np.repeat(-(1 - program.alpha) / program.longest * program.paths, outputs),
            np.full(inputs + outputs, node),
            np.full(entries, program.beta / b),
        ]
    )
    rows = kron(identity(inputs), np.ones((1, outputs)))  # X -> sums of rows
    columns = kron(np.ones((1, inputs)), identity(outputs))
    reached = vstack([rows, columns, identity(entries)])
    deficits = identity(inputs + outputs + entries)
    least = np.concatenate([np.full(inputs + outputs, program.least), np.ones(entries)])
    total = coo_array(np.concatenate([np.ones(entries), np.zeros(len(cost) - entries)])[None])
    upper = np.concatenate(
        [np.full(entries, program.capacity), np.full(len(cost) - entries, np.inf)]
    )
    found = milp(
        cost,
        integrality=np.concatenate([np.ones(entries), np.zeros(len(cost) - entries)]),
        bounds=Bounds(0, upper),
        constraints=[
            LinearConstraint(hstack([reached, deficits]).tocsc(), least, np.inf),
            LinearConstraint(total.tocsc(), -np.inf, b),
        ],
        options={} if seconds == math.inf else {"time_limit": max(seconds, 0.1)},
    )
    if found.status == 1:
        raise NotFinishedError(f"a program of {inputs} x {outputs} kernels was not finished")
    if found.x is None:
        raise RuntimeError(
            f"HiGHS gave no solution for {inputs} x {outputs} kernels: {found.message}"
        )
    return cast(Array, np.rint(found.x[:entries]).reshape(inputs, outputs))


class _Piece(NamedTuple):
    """Outputs `start` to `stop` of group `group` of a layer and their share of its budget."""

    group: int
    start: int
    stop: int
    budget: int


class _Layer:
    """A Linear or Conv of the copy, whose weight holds the mask and is all ones at first."""

    def __init__(self, module: nn.Module, budget: int, chunk: int, chunk_above: int) -> None:
        self.module, self.budget = module, budget
        self.weight = cast(nn.Parameter, module.weight)
        self.groups = cast(int, getattr(module, "groups", 1))
        self.inputs = self.weight.shape[1]
        self.outputs = self.weight.shape[0] // self.groups
        self.positions = math.prod(self.weight.shape[2:])
        cut = self.outputs
        if self.inputs * self.outputs > chunk_above and chunk:
            cut = chunk
        self.pieces = list(self._cut(cut))

    def _cut(self, size: int) -> Iterator[_Piece]:
        """The budget goes by size, rounded so that the pieces add up to it."""
        spent = done = 0
        total = self.groups * self.outputs
        for group in range(self.groups):
            for start in range(0, self.outputs, size):
                stop = min(start + size, self.outputs)
                done += stop - start
                share = self.budget * done // total - spent
                spent += share
                yield _Piece(group, start, stop, share)

    def incoming(self, network: nn.Module, ones: Tensor) -> Array:
        """P of each input channel, `[groups, I]`, from a run of the whole network."""
        seen: list[Tensor] = []
        hook = self.module.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        with torch.no_grad():
            network(ones)
        hook.remove()
        x = seen[0]
        if isinstance(self.module, nn.Linear):
            paths = x.reshape(-1, x.shape[-1]).sum(0)
        else:
            paths = x[0].flatten(1).sum(1)
        return cast(Array, (paths / paths.max()).numpy().reshape(self.groups, -1))

    def place(self, piece: _Piece, entries: Array, generator: torch.Generator) -> None:
        """Write the mask of a piece: random positions in every kernel."""
        count = torch.from_numpy(entries.T.copy())  # [O, I]
        order = torch.rand(*count.shape, self.positions, generator=generator).argsort(2).argsort(2)
        rows = self.weight.data[piece.group * self.outputs :][piece.start : piece.stop]
        rows.copy_((order < count[:, :, None]).reshape(rows.shape))


def npb(
    model: nn.Module,
    example: Tensor | tuple[int, ...],
    sparsity: float,
    *,
    alpha: float = 0.01,
    beta: float = 1.0,
    max_kernel: int | None = None,
    min_node: int | None = None,
    chunk: int = 32,
    chunk_above: int = 128 * 128,
    seed: int = 0,
    report: Callable[[int, int], object] | None = None,
    time_limit: float = math.inf,
) -> Masks:
    """Return name -> bool mask of `model`, which is left untouched and whose weights are not read.

    Args:
        model: Linear and Conv layers joined by norms, activations, pools and adds.
        example: a batch `[batch, features...]` or its shape; the input is one sample of ones.
        sparsity: fraction removed; exactly `N - floor(sparsity * N)` weights are kept.
        alpha, beta: weights of nodes against paths, and of kernels with at least one weight.
        max_kernel: K; the size of the kernel if None, raised where the budget needs it.
        min_node: t, at most the average number of weights a kernel, rounded up; 1 if None.
        chunk, chunk_above: layers of more than `chunk_above` kernels in pieces of `chunk` outputs;
            `chunk=0` never. Small ResNets are commonly run with `chunk_above=64 * 32`.
        seed: of the positions within kernels.
        report: called as `report(done, total)` after each program.
        time_limit: seconds.

    Raises:
        NotFinishedError: the time limit was reached; the message says where.
    """
    started = time.perf_counter()
    work = copy.deepcopy(model).to(torch.float64).eval()
    network = replace_modules(work, lambda m: nn.Identity() if isinstance(m, IDENTITY) else None)
    modules = prunable_layers(network)
    shapes = [tuple(cast(Tensor, module.weight).shape) for module in modules.values()]
    quotas = erk_quotas(shapes, sparsity, "paper")
    layers = {
        name: _Layer(module, quota, chunk, chunk_above)
        for (name, module), quota in zip(modules.items(), quotas, strict=True)
    }
    for layer in layers.values():
        layer.weight.data.fill_(1.0)
        layer.module.register_parameter("bias", None)
    ones = ones_like_input(example, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    total, done = sum(len(layer.pieces) for layer in layers.values()), 0
    for number, (name, layer) in enumerate(layers.items(), 1):
        paths = layer.incoming(network, ones)
        for piece in layer.pieces:
            left = time_limit - (time.perf_counter() - started)
            kernels = layer.inputs * (piece.stop - piece.start)
            needed = -(-piece.budget // kernels)
            program = Program(
                paths[piece.group],
                piece.stop - piece.start,
                piece.budget,
                max(min(max_kernel or layer.positions, layer.positions), needed),
                min(min_node or 1, needed),
                alpha,
                beta,
            )
            try:
                entries = (
                    solve(program, left)
                    if piece.budget
                    else np.zeros((layer.inputs, program.outputs))
                )
            except NotFinishedError as error:
                raise NotFinishedError(
                    f"not finished in {time_limit:g} s: layer {number} of {len(layers)}, {name}, "
                    f"program {done + 1} of {total}: {error}"
                ) from None
            layer.place(piece, entries, generator)
            done += 1
            if report is not None:
                report(done, total)
    return {name: layer.weight.data.bool() for name, layer in layers.items()}
