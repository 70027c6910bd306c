"""explain: which kernel runs for every layer and why, expected times, bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paikern._names import slots
from paikern.prunable import prunable_parameters
from paikern.report import tables
from paikern.sparse import choice, layers
from paikern.sparse.layers import Place
from paikern.sparse.masked_module import MaskedModule
from paikern.sparse.observed import DEFAULT_BATCH, check_batch, check_flags, input_shapes

_COPIES = 4  # a weight, its gradient and both moments of Adam


@dataclass(frozen=True)
class LayerPlan:
    """One weight.

    Attributes:
        name, shape: of the dense weight.
        kept: how many of its entries are kept; of a dense weight those that are not 0.
        packed: whether the layer stores the kept values only.
        forward, backward: the kernels that run: "index", "decode", "direct" (a convolution by its
            kept weights), "dense", "backend" (on a GPU, whose backend chooses call by call), or
            "unknown" (a convolution of maps of unknown size).
        why: what speaks for it.
        seconds, dense_seconds: expected for one pass over the layer, as it is and dense; None where
            nothing is measured.
        nbytes, dense_nbytes: weight, gradient, both moments of Adam and positions, as it is and
            dense.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    packed: bool
    forward: str
    backward: str
    why: str
    seconds: float | None
    dense_seconds: float | None
    nbytes: int
    dense_nbytes: int

    @property
    def density(self) -> float:
        return self.kept / max(1, math.prod(self.shape))


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str()` is a table.

    Attributes:
        layers: one entry a weight, in the order of the model.
        training: whether seconds are those of a training step or of the forward pass.
    """

    layers: tuple[LayerPlan, ...]
    training: bool

    @property
    def kept(self) -> int:
        return sum(layer.kept for layer in self.layers)

    @property
    def total(self) -> int:
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def packed(self) -> int:
        """How many of the weights are packed."""
        return sum(layer.packed for layer in self.layers)

    @property
    def seconds(self) -> float | None:
        """Expected for all layers with a figure, once each; None if there is none."""
        return _sum([layer.seconds for layer in self.layers])

    @property
    def dense_seconds(self) -> float | None:
        return _sum([layer.dense_seconds for layer in self.layers])

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        return sum(layer.dense_nbytes for layer in self.layers)

    def __str__(self) -> str:
        def row(layer: LayerPlan) -> tuple[str, ...]:
            return (
                tables.printable(layer.name),
                tables.shape_text(layer.shape),
                f"{layer.kept:,}",
                tables.percent(layer.kept, math.prod(layer.shape)),
                layer.forward,
                layer.backward,
                _time(layer.seconds),
                _time(layer.dense_seconds),
                _bytes(layer.nbytes),
                _bytes(layer.dense_nbytes),
                layer.why,
            )

        right = {"kept", "density", "time", "dense time", "memory", "dense memory"}
        titles = "weight, shape, kept, density, forward, backward, time, dense time, memory"
        titles += ", dense memory, why"
        columns = tuple(tables.Column(t, t in right) for t in titles.split(", "))
        what = "a training step" if self.training else "the forward pass"
        footer = (
            "total",
            "",
            f"{self.kept:,}",
            tables.percent(self.kept, self.total),
            "",
            "",
            _time(self.seconds),
            _time(self.dense_seconds),
            _bytes(self.nbytes),
            _bytes(self.dense_nbytes),
            f"{self.packed} of {len(self.layers)} packed",
        )
        title = f"time: expected for {what}; memory: weight, gradient, two moments, positions"
        return tables.Table(columns, [row(layer) for layer in self.layers], footer, title).plain()


def explain(
    model: nn.Module,
    *,
    batch: int | None = None,
    example_inputs: Any = None,
    training: bool | None = None,
) -> Explanation:
    """Which kernel runs for every layer of a model and why, how long it should take, its bytes.

    Args:
        model: with packed weights, dense ones or both; left as it is.
        batch, example_inputs, training: as for `sparsify`.

    Returns:
        One entry for each weight that is packed or could be pruned. Times come from a table that
        was measured on a CPU with two threads; they are None where nothing was measured.

    Raises:
        ValueError: neither a packed nor a prunable weight, no batch. TypeError: no model.

    Example:
        >>> import paikern as pk
        >>> net = pk.zoo.create("lenet300", seed=0)
        >>> masks = pk.prune(net, "magnitude", sparsity=0.98)
        >>> found = pk.explain(pk.sparsify(net, masks, force=True), batch=256)
        >>> found.kept, found.packed, found.layers[0].density < 0.1
        (5324, 3, True)
        >>> found.nbytes < 0.1 * found.dense_nbytes
        True
    """
    check_batch("explain", batch)
    check_flags("explain", training=training)
    layers.check_model("explain", model)
    mode = model.training if training is None else training
    every = _weights(model)
    shapes: dict[int, tuple[int, ...]] = {}
    if example_inputs is not None:
        owners = [owner for _, owner, _ in every]
        shapes = input_shapes("explain", model, owners, example_inputs)
    rows = []
    for name, owner, place in every:
        shape = shapes.get(id(owner))
        rows.append(_plan(name, owner, place, shape, batch or DEFAULT_BATCH, mode))
    return Explanation(tuple(rows), mode)


def _weights(model: nn.Module) -> list[tuple[str, nn.Module, Place | None]]:
    """Name of every weight, a layer that uses it, and for dense ones what speaks against packing.

    In the order of the model, tied weights once.
    """
    known = prunable_parameters(model, packed=True)
    dense = {slot.source: slot for slot in slots(model)}
    packed: dict[str, nn.Module] = {}
    for name, layer in layers.masked_modules(model):
        packed.setdefault(f"{name}.weight" if name else "weight", layer)
    found = {name: dense[p.source] for name, p in known.items() if name not in packed}
    by_name = {place.name: place for place in layers.places(model, found)}
    result: list[tuple[str, nn.Module, Place | None]] = []
    for name in known:
        if name in packed:
            result.append((name, packed[name], None))
        else:
            result.append((name, by_name[name].owners[0], by_name[name]))
    return result


def _plan(
    name: str,
    owner: nn.Module,
    place: Place | None,
    shape: tuple[int, ...] | None,
    batch: int,
    training: bool,
) -> LayerPlan:
    if isinstance(owner, MaskedModule):
        weight = owner.weight
        one = choice.estimate(owner, weight.nnz, weight.values, shape, batch, training=False)
        step = choice.estimate(owner, weight.nnz, weight.values, shape, batch, training=True)
        bits, values = weight.format == "bitmap", weight.values
        forward, both = (
            choice.packed(
                owner, weight.nnz, values, found, shape, batch, bits=bits, training=training
            )
            for found, training in ((one, False), (step, True))
        )
        item = weight.values.element_size()
        return LayerPlan(
            name,
            tuple(weight.shape),
            weight.nnz,
            True,
            forward[0],
            both[0],
            (step if training else one).why,
            (both if training else forward)[1],
            (step if training else one).dense_seconds,
            weight.nbytes + (_COPIES - 1) * weight.nnz * item,
            _COPIES * weight.shape.numel() * item,
        )
    assert place is not None
    parameter = place.parameter.detach()
    kept = parameter.numel() if parameter.is_meta else int(torch.count_nonzero(parameter))
    held = _COPIES * parameter.numel() * parameter.element_size()
    why, seconds = place.reason, None
    if not why:
        estimate = choice.estimate(owner, kept, parameter, shape, batch, training=training)
        why, seconds = estimate.why, estimate.dense_seconds
        if estimate.kernel != "dense":
            why = f"pk.sparsify would pack it: {why}"
    dims = tuple(parameter.shape)
    return LayerPlan(name, dims, kept, False, "dense", "dense", why, seconds, seconds, held, held)


def _sum(found: list[float | None]) -> float | None:
    known = [seconds for seconds in found if seconds is not None]
    return sum(known) if known else None


def _time(seconds: float | None) -> str:
    """
    >>> _time(0.00123), _time(2.5e-5), _time(None)
    ('1.23 ms', '0.025 ms', 'not measured')
    """
    return "not measured" if seconds is None else f"{1e3 * seconds:.3g} ms"


def _bytes(count: int) -> str:
    """
    >>> _bytes(999), _bytes(12_345), _bytes(3_200_000_000)
    ('999 B', '12.3 kB', '3.2 GB')
    """
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
