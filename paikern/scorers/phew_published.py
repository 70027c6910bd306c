"""The walk graph of the published PHEW program: a list of layers instead of a network.

Layers are the weights of two or more dimensions in the order of the model's parameters; a block is
listed as conv1, conv2, shortcut, and every convolution with a kernel of one element counts as a
shortcut. Backwards, a walk that stands behind shortcut j takes it or the layer before it with
probability 1/2, and goes from the shortcut to layer j - 3, the end of the block before. Forwards,
it is before layer k that one in two walks goes to the shortcut k + 3 if there is one: a layer too
early, so that such a walk leaves out layers k to k + 2 and is no path of the network.

Source: specification of PHEW, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from paikern.pathgraph.steps import State, Weight
from paikern.pathgraph.units import INPUT, OUTPUT, WEIGHT, Node, Slot, WalkGraph


def published_walk_graph(
    model: nn.Module, state: State, shapes: Mapping[str, tuple[int, ...]]
) -> WalkGraph:
    """Nodes for the list of layers, each with other pairs forwards than backwards.

    Raises:
        ValueError: a layer that may follow another in the list does not take its units (a
            bottleneck, a grouped convolution), or a kernel is not square: the program stops there
            with an index error, or walks where nothing is defined.
    """
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    layers = [(name, tuple(state[name].shape)) for name in names]
    for name, shape in layers:
        if name not in shapes or len(shape) not in (2, 4) or len(set(shape[2:])) > 1:
            raise ValueError(
                f"variant='published': {name} {list(shape)} is not the weight of a linear layer or "
                "of a convolution with square kernels, all of which are pruned; use "
                "variant='paper'"
            )
    return _List(layers).graph()


class _List:
    def __init__(self, layers: list[tuple[str, tuple[int, ...]]]) -> None:
        self.layers = layers
        self.shortcut = [shape[2:] == (1, 1) for _, shape in layers]
        self.base: list[int] = []
        base = layers[0][1][1]
        for _, shape in layers:
            self.base.append(base)
            base += shape[0]

    def graph(self) -> WalkGraph:
        inputs = self.layers[0][1][1]
        nodes = [Node(INPUT, 0, inputs, 0, [])]
        units = torch.arange(inputs)
        for at, (name, shape) in enumerate(self.layers):
            first = Slot(units, units) if at == 0 else None
            back = first or self._pairs([j for j in range(at) if at in self._backwards(j)], at)
            back.onward = first or self._pairs([j for j in range(at) if at in self._onward(j)], at)
            nodes.append(
                Node(WEIGHT, self.base[at], shape[0], shape[1], [back], _step(name, shape))
            )
        outputs = torch.arange(self.layers[-1][1][0])
        slot = Slot(outputs + self.base[-1], outputs)
        base = self.base[-1] + len(outputs)
        nodes.append(Node(OUTPUT, base, len(outputs), len(outputs), [slot]))
        return WalkGraph(tuple(nodes), 0)

    def _onward(self, at: int) -> list[int]:
        """Layers that may follow layer `at` forwards."""
        before = at + 1
        ways = [before + 3] if self._is_shortcut(before + 3) else []
        if self._is_shortcut(before):
            before += 1  # reached by a jump only
        return [*ways, before] if before < len(self.layers) else ways

    def _backwards(self, at: int) -> list[int]:
        """Layers that may be left for layer `at` backwards."""
        after = at + 1
        if self._is_shortcut(after) and not self.shortcut[at]:
            after += 1  # conv2: from what is behind the shortcut
        ways = [after] if after < len(self.layers) else []
        return [*ways, at + 3] if self._is_shortcut(at + 3) else ways

    def _is_shortcut(self, at: int) -> bool:
        return at < len(self.layers) and self.shortcut[at]

    def _pairs(self, sources: list[int], at: int) -> Slot:
        name, shape = self.layers[at]
        found, meets = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        for source in sources:
            before, (units, *_) = self.layers[source]
            width = shape[1]
            if width % units or (width != units and len(shape) > 2):
                raise ValueError(
                    f"variant='published': in the list of layers {name} {list(shape)} may follow "
                    f"{before}, which has {units} units; the published program ends with an index "
                    "error on such networks (bottlenecks, grouped convolutions); use "
                    "variant='paper'"
                )
            ahead = torch.arange(width)
            found.append(self.base[source] + ahead // (width // units))
            meets.append(ahead)
        return _ordered(torch.cat(found), torch.cat(meets))


def _ordered(sources: Tensor, meets: Tensor) -> Slot:
    order = meets.argsort(stable=True)
    return Slot(sources[order], meets[order])


def _step(name: str, shape: tuple[int, ...]) -> Weight:
    kind = "linear" if len(shape) == 2 else "conv"
    return Weight((), -1, name, kind, name, kind, False, (), ())
