"""What a pruning method is: a scorer with documented options, found by name.

A scorer is a dataclass. Its fields are the method's options, so `pk.prune(..., rounds=..., norm=
"identity")` can be checked, listed by `pk.methods()` and recorded in the mask file.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import dataclass_transform

from paikern._lookup import by_name, check_options
from paikern.batches import Batches
from paikern.pathgraph import Flow, PathGraph, Semantics, shift_invariant, trace
from paikern.pattern import Layout
from paikern.prunable import Prunable
from paikern.scores import Scores

if TYPE_CHECKING:
    from paikern.scorers.device_loop import DeviceLoop
    from paikern.scorers.path_loop import PathLoop

VARIANTS = ("paper", "published")


@dataclass
class Run:
    """One pruning run: the model's tensors as they are, the layers, and the masks so far.

    `masks` maps parameter name to packed bits and is empty before the first round. Nothing here
    writes to the model. `method` is the scorer's name, for messages; `cache` is the scorer's, for
    what it keeps between rounds.
    """

    model: nn.Module
    state: Mapping[str, Tensor]
    layers: Mapping[str, Prunable]
    example_inputs: Any = None
    seed: int = 0
    variant: str = "paper"
    data: Batches | None = None
    loss_fn: Any = None
    method: str = ""
    masks: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cache: dict[str, Any] = field(default_factory=dict)
    _graph: PathGraph | None = None
    _vectors: PathGraph | None = None
    _flows: dict[Any, Flow] = field(default_factory=dict)

    @property
    def graph(self) -> PathGraph:
        if self._graph is None:
            self._graph = trace(self.model, self.example_inputs)
            unreached = [name for name in self.layers if name not in self._graph.uses()]
            if unreached:
                self.notes.append(
                    "no path from the input to the output uses "
                    + ", ".join(unreached)
                    + "; nothing tells their weights apart (use ignore= to leave them dense)"
                )
        return self._graph

    def graph_of(self, conv: str) -> PathGraph:
        """`graph` for conv="exact", and on channel vectors for "shift_invariant"."""
        if conv == "exact":
            return self.graph
        if self._vectors is None:
            self._vectors = shift_invariant(self.graph)
        return self._vectors

    def flow(self, semantics: Semantics, conv: str = "exact", **options: Any) -> Flow:
        """The sweeps of `graph_of(conv)` under `semantics`, planned once for all rounds."""
        key = (semantics, conv, tuple(options.items()))
        if key not in self._flows:
            self._flows[key] = Flow(self.graph_of(conv), semantics, **options)
        return self._flows[key]

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: layer.shape for name, layer in self.layers.items()}

    @property
    def layouts(self) -> dict[str, Layout]:
        return {name: layer.layout for name, layer in self.layers.items()}

    def weight(self, name: str) -> Tensor:
        return self.state[name].detach()

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@dataclass_transform()
@dataclass
class Scorer:
    """Base class. Subclasses implement `score` and set the class attributes.

    name: as given to `pk.prune`. summary, source: one line each for `pk.methods()`.
    needs_inputs: the method traces the model and needs `example_inputs`.
    needs_data, needs_labels: the method reads samples and needs `data`, with labels.
    takes_loss: the method differentiates `loss_fn`; where one is given to any other it is refused.
    cost: what a round costs, for `pk.methods()`; F is a forward pass over the data that are read, a
    backward pass counts 2F.
    weakness: known ways to fail, one line for `pk.methods()`.
    default_rounds, default_scope: used where the caller gives none.
    default_schedule: the curve over the rounds where the caller gives none.
    published_rule: what selection="published" means (`paikern.selection.PUBLISHED`).
    exact_count: exactly as many weights are kept as asked for.
    reads_weights: NaN or infinite weights are refused before the first round.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    needs_inputs: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    takes_loss: ClassVar[bool] = False
    cost: ClassVar[str] = ""
    weakness: ClassVar[str] = ""
    default_rounds: ClassVar[int] = 1
    default_scope: ClassVar[str] = "global"
    default_schedule: ClassVar[str] = "exponential"
    published_rule: ClassVar[str] = "above_removed"
    exact_count: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = True
    variants: ClassVar[tuple[str, ...]] = ("paper",)

    def score(self, run: Run) -> Scores:
        """Scores of all layers of `run` under `run.masks`; higher is kept."""
        raise TypeError(f"{type(self).__name__} must implement score()")

    def loop(self, run: Run) -> PathLoop | DeviceLoop | None:
        """All rounds natively, for exact counts of single weights; None to score each of them."""
        return None

    def statistics(self, run: Run) -> dict[str, float]:
        """What the last `score` found out, for progress and history."""
        return {}


Report = Callable[[int, dict[str, float]], None]
"""Called as `report(step, values)` after every training step."""


@dataclass
class TrainedScorer(Scorer):
    """A scorer whose scores are trained under a budget per layer instead of computed."""

    def planned_steps(self, variant: str) -> int:
        raise TypeError(f"{type(self).__name__} must implement planned_steps()")

    def train(
        self, run: Run, kept: list[int], report: Report = lambda step, values: None
    ) -> Scores:
        """Train and return the scores; their top-k per layer is the mask."""
        raise TypeError(f"{type(self).__name__} must implement train()")


@dataclass
class MaskBuilder(Scorer):
    """A method that builds its masks under a budget and ranks no scores.

    unit: what `report` counts. published_budget: rounding of the ERK quotas in variant
    "published" (`paikern.budget.ERK_VARIANTS`).
    """

    unit: ClassVar[str] = "layer"
    published_budget: ClassVar[str] = "published"

    def score(self, run: Run) -> Scores:
        raise ValueError(
            f"method: {self.name} builds masks and has no scores; use pk.prune(..., apply=False)"
        )

    def planned_units(self, run: Run, kept: int | list[int]) -> int:
        """What `report` counts up to."""
        return len(run.layers)

    def build(
        self, run: Run, kept: int | list[int], report: Report = lambda done, values: None
    ) -> dict[str, Tensor]:
        """The packed masks by name; `kept` is one number, or one for each layer of `run`."""
        raise TypeError(f"{type(self).__name__} must implement build()")


_SCORERS: dict[str, type[Scorer]] = {}
_T = TypeVar("_T", bound=type[Scorer])


def register_scorer(name: str) -> Callable[[_T], _T]:
    """Make a scorer available as `pk.prune(model, name)`.

    The decorated class derives from `paikern.scorers.Scorer` and implements `score(run)`; it is
    made a dataclass, and its fields are the method's options. A name that exists is replaced.

    Example:
        >>> import torch, paikern as pk
        >>> from paikern.scorers import Dense, Scorer, Scores
        >>> @pk.register_scorer("smallest")
        ... class Smallest(Scorer):
        ...     summary = "keeps the smallest weights"
        ...     def score(self, run):
        ...         entries = {n: Dense(-run.weight(n).abs()) for n in run.layers}
        ...         return Scores(entries, run.shapes)
        >>> net = torch.nn.Linear(4, 2)
        >>> pk.prune(net, "smallest", sparsity=0.5).kept
        4
    """

    def register(cls: _T) -> _T:
        cls.name = name
        _SCORERS[name] = dataclasses.dataclass(cls)
        return cls

    return register


def scorer_names() -> list[str]:
    return sorted(_SCORERS)


def scorer_class(name: str) -> type[Scorer]:
    """The scorer registered under `name`; ValueError suggests the nearest."""
    return by_name(
        _SCORERS, name, parameter="method", what="method", example="snip", fix="see pk.methods()"
    )


def check_loss(kind: str, name: str, takes_loss: bool, loss_fn: Any) -> None:
    """Refuse a loss where nothing would be made of it; `kind` is "method" or "pruner"."""
    if loss_fn is not None and not takes_loss:
        raise ValueError(
            f"loss_fn: {kind} {name!r} differentiates no loss; leave loss_fn= out, or use a method "
            "that does, such as 'snip' (pk.methods() lists them under 'takes_loss')"
        )


def make_scorer(name: str, options: Mapping[str, Any]) -> Scorer:
    """Instantiate with options; ValueError names an option that the method does not have."""
    cls = scorer_class(name)
    check_options("method", cls.name, {f.name for f in dataclasses.fields(cls)}, options)
    return cls(**options)
