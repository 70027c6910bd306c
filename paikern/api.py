"""A pruning run, top to bottom: what to prune, how to score, how many to keep, which, and apply."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from paikern import budget
from paikern.analysis import Topology, topology
from paikern.backends import registry
from paikern.channel_rounds import channel_metadata
from paikern.errors import PaikernWarning, SparsityError
from paikern.masks import MaskSet
from paikern.pathgraph import trace
from paikern.pattern import parse_pattern
from paikern.preparation import packed_of, prepare_run, state_of
from paikern.progress import ProgressFunction
from paikern.prunable import prunable_parameters, unwrap
from paikern.rounds import Plan, check_single_weights, layer_counts, ranked, run_rounds
from paikern.rows import check_rows, select_rows
from paikern.scorers import (
    MaskBuilder,
    Run,
    Scorer,
    Scores,
    TrainedScorer,
    make_scorer,
    scorer_names,
)
from paikern.scorers.base import VARIANTS, scorer_class
from paikern.scorers.channel_scorer import ChannelScorer
from paikern.selection import (
    ON_COLLAPSE,
    RULES,
    apply_collapse_rule,
    listed,
    other_count,
    select_packed,
)
from paikern.structured import check_pattern, left_dense, target_sparsity

Filter = Sequence[Any] | None
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _on_its_own_device(function: _Function) -> _Function:
    """Whatever a surrounding `with torch.device("meta")` says, buffers of a run have memory."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


@_on_its_own_device
def prune(
    model: nn.Module,
    method: str | Scorer,
    *,
    sparsity: float | None = None,
    density: float | None = None,
    amount: float | int | None = None,
    compression: float | None = None,
    example_inputs: Any = None,
    data: Any = None,
    loss_fn: str | Callable[[Any, Any], Tensor] | None = None,
    pattern: str = "unstructured",
    scope: str | None = None,
    rounds: int | None = None,
    schedule: str | None = None,
    ignore: Filter = (),
    include: Filter = None,
    seed: int = 0,
    variant: str = "paper",
    selection: str = "exact",
    on_collapse: str = "warn",
    backend: str | None = None,
    progress: bool | ProgressFunction | None = None,
    apply: bool = True,
    **method_options: Any,
) -> MaskSet:
    """Prune `model` with one of `pk.methods()`; returns the masks.

    Args:
        model: any `nn.Module`. Only Linear, Conv, HF `Conv1D` and attention projection weights are
            pruned; embeddings, norms and biases are not. The model is written to once, at the end.
        method: a name from `pk.methods()` or a scorer.
        sparsity: fraction removed of the prunable weights, in [0, 1). `density` (fraction kept),
            `amount` (a fraction or, as an int, a number of weights removed) or `compression` (a
            factor: 10 keeps a tenth) instead.
            Exactly `N - floor(sparsity * N)` weights are kept. Methods that remove whole channels
            count the outputs of layers instead, or weights with `target="weights"`.
        example_inputs: one input for methods that trace the model: a tensor, a tuple, or a dict of
            keyword inputs. Only its shape matters, unless it holds integers (token ids).
        data: samples for methods that read some: a tensor `[n, ...]`, an (inputs, labels) pair, a
            mapping of keyword inputs (a tokenizer's, with labels), or an iterable of batches of any
            of these forms, such as a `DataLoader`, which is read once a round. `example_inputs`
            may be left out then. Labels that a method does not need are left alone, and so are all
            of the data by methods that read neither samples nor the shape of an input.
        loss_fn: what methods that differentiate a loss use: a function of the model's outputs and
            the labels, "cross_entropy", "nll_logits" or "mse". Default: the model's own loss where
            it returns one, cross-entropy for integer labels, the squared error for float ones.
            Other methods refuse it (`pk.methods()`: "takes_loss").
        scope: "global", "local" (the same fraction of every layer), "row" (of every output),
            "erk" or "lamp"; default by method.
        rounds, schedule: how often to score and prune, and along which curve ("exponential",
            "linear", "cubic", "expinv", "halving", "one-shot"); default by method.
        ignore, include: parameter or module names, "re:" patterns, module types.
        seed: of everything random.
        variant: "paper", or "published" for the behaviour of the authors' code.
        selection: "exact", or "published" for the threshold rule of the method's published code.
        on_collapse: a layer would keep nothing: "warn" names it, "raise" stops, "floor" keeps its
            best weight.
        backend: force one backend by name (`pk.backends()`).
        progress: None for a bar on a terminal and log lines elsewhere, False for silence, or a
            function called as `progress(done, total, values)`.
        apply: zero the pruned weights in place.
        **method_options: options of the method (`pk.methods()` lists them).

    Returns:
        A `MaskSet` with provenance in `.metadata`.

    Raises:
        SparsityError: the sparsity is out of range, or keeps nothing.
        ValueError: unknown method or option, missing example_inputs or data, nothing to prune, a
            loss_fn for a method without a loss or one that fails.
        NonFiniteScoreError: NaN or infinite weights or scores, named by parameter.
        PathRuleError: the model holds an operation without a path rule.
        The model is unchanged whenever an error is raised.

    Example:
        >>> import torch, paikern as pk
        >>> net = pk.zoo.create("mlp", sizes=(8, 16, 4))
        >>> masks = pk.prune(net, "synflow", sparsity=0.75, example_inputs=torch.ones(1, 8))
        >>> masks.kept, masks.total
        (48, 192)
    """
    started = time.perf_counter()
    scorer = _scorer(method, method_options)
    _check_choices(scorer, variant, selection, on_collapse, rounds)
    shape = parse_pattern(pattern)
    check_single_weights(scorer, shape)
    run = prepare_run(model, scorer, example_inputs, ignore, include, seed, variant, data, loss_fn)
    fraction = target_sparsity(
        shape,
        sparsity=sparsity,
        density=density,
        amount=amount,
        compression=compression,
        total=_total(run, scorer),
    )
    plan = Plan(
        fraction,
        scope or scorer.default_scope,
        scorer.default_rounds if rounds is None else rounds,
        scorer.default_schedule if schedule is None else schedule,
        selection,
        on_collapse,
        shape,
        scorer.published_rule,
    )
    with registry.using(backend):
        masks, history = run_rounds(run, scorer, plan, progress)
    found = MaskSet(
        masks,
        run.shapes,
        metadata={
            "method": scorer.name,
            "arguments": {
                "scope": plan.scope,
                "rounds": plan.rounds,
                "schedule": plan.schedule,
                "variant": variant,
                "selection": selection,
                "on_collapse": on_collapse,
                **({} if scorer.exact_count else {"exact": False}),
                **_options(scorer),
            },
            "seed": seed,
            "sparsity": fraction,
            "pattern": pattern,
            "seconds": round(time.perf_counter() - started, 4),
            "model": type(run.model).__name__,
            "history": history,
            "notes": run.notes,
            **(channel_metadata(run) if isinstance(scorer, ChannelScorer) else {}),
        },
    )
    found.metadata["achieved_sparsity"] = found.sparsity
    _tell(run, found, on_collapse, isinstance(scorer, MaskBuilder))
    if apply:
        found.apply(model)
    return found


@_on_its_own_device
def score(
    model: nn.Module,
    method: str | Scorer,
    *,
    example_inputs: Any = None,
    data: Any = None,
    loss_fn: str | Callable[[Any, Any], Tensor] | None = None,
    ignore: Filter = (),
    include: Filter = None,
    seed: int = 0,
    variant: str = "paper",
    masks: MaskSet | None = None,
    backend: str | None = None,
    **method_options: Any,
) -> Scores:
    """The scores of one round, under `masks` where given; the model is not changed.

    Higher is kept. `Scores` maps parameter names to dense or factored scores; `.dense(name)` makes
    one layer's tensor. Arguments as in `prune`. A method that trains its scores under a budget
    (DPaI) needs `sparsity=` as well and returns the trained scores.

    Example:
        >>> import torch, paikern as pk
        >>> net = pk.zoo.create("mlp", sizes=(3, 2))
        >>> pk.score(net, "magnitude").dense("layers.1.weight").shape
        torch.Size([2, 3])
    """
    sparsity = method_options.pop("sparsity", None)
    scorer = _scorer(method, method_options)
    _check_choices(scorer, variant, "exact", "warn", None)
    run = prepare_run(model, scorer, example_inputs, ignore, include, seed, variant, data, loss_fn)
    run.masks = packed_of(masks, run.model)
    with registry.using(backend):
        if isinstance(scorer, TrainedScorer):
            if sparsity is None:
                raise SparsityError(
                    f"sparsity: {scorer.name} trains its scores under a budget; pass sparsity="
                )
            fraction = budget.resolve_sparsity(sparsity=sparsity)
            counts = layer_counts(run, fraction, scorer.default_scope)
            assert isinstance(counts, list)
            return scorer.train(run, counts).with_layouts(run.layouts)
        return scorer.score(run).with_layouts(run.layouts)


@_on_its_own_device
def select(
    scores: Scores,
    *,
    sparsity: float | None = None,
    density: float | None = None,
    amount: float | int | None = None,
    compression: float | None = None,
    pattern: str = "unstructured",
    scope: str = "global",
    on_collapse: str = "warn",
    rule: str = "exact",
) -> MaskSet:
    """Masks from scores: exactly k kept, ties to the lower global index.

    Args:
        scores: from `pk.score`, or made of `Dense` and `Factored` entries.
        sparsity, density, amount, compression, pattern, scope, on_collapse: as in `prune`.
        rule: "exact", or "published" for the threshold rule of the published codes.

    Raises:
        SparsityError: the sparsity is out of range or empties a layer with on_collapse="raise".
        NonFiniteScoreError: NaN scores, named by parameter; infinities rank by value.

    Example:
        >>> import torch, paikern as pk
        >>> net = pk.zoo.create("mlp", sizes=(3, 2))
        >>> pk.select(pk.score(net, "magnitude"), sparsity=0.5).kept
        3
        >>> pk.select(pk.score(net, "magnitude"), pattern="1:3").kept
        2
    """
    shape = parse_pattern(pattern)
    fraction = target_sparsity(
        shape,
        sparsity=sparsity,
        density=density,
        amount=amount,
        compression=compression,
        total=scores.total,
    )
    check_pattern(shape, scores.shapes, scope, rule)
    check_rows(scope, rule, scores.shapes)
    counts = budget.layer_budget(
        scores.shapes, fraction, scope, scores=ranked(scores, scope), layouts=scores.layouts
    )
    if scope == "row" and shape is None and isinstance(counts, list):
        packed = select_rows(scores, counts)
    else:
        packed = select_packed(scores, counts, rule, shape)
    packed = apply_collapse_rule(scores, packed, counts, on_collapse, shape)
    found = MaskSet(packed, scores.shapes, metadata={"sparsity": fraction, "pattern": pattern})
    found.metadata["achieved_sparsity"] = found.sparsity
    if (note := left_dense(shape, scores.shapes, scores.layouts)) is not None:
        warnings.warn(note, PaikernWarning, stacklevel=3)
    if rule != "exact" and (note := other_count(found.kept, counts)) is not None:
        warnings.warn(note, PaikernWarning, stacklevel=3)
    _warn_empty(found, on_collapse, stacklevel=4)
    return found


@_on_its_own_device
def analyze(
    model: nn.Module,
    masks: MaskSet | None = None,
    *,
    example_inputs: Any,
    ignore: Filter = (),
    include: Filter = None,
) -> Topology:
    """Log paths, effective nodes, kernels and parameters, per layer and in total.

    `masks` defaults to the dense network; `MaskSet.from_model(model)` reads the zeros of a pruned
    one. Weights are never read, so the model may live on the meta device.

    Args:
        model: any model that `torch.export` can trace.
        masks: the network to look at.
        example_inputs: as in `prune`; required.
        ignore, include: which layers to report; paths run through all of them.

    Raises:
        PathRuleError: the model holds an operation without a path rule.
        ValueError: example_inputs do not fit.

    Source: definitions of the DPaI paper, see `paikern.analysis`.

    Example:
        >>> import torch, paikern as pk
        >>> net = pk.zoo.create("mlp", sizes=(3, 2, 2))
        >>> pk.analyze(net, example_inputs=torch.ones(1, 3)).effective_nodes
        4
    """
    inner = unwrap(model)
    layers = prunable_parameters(inner, ignore=ignore, include=include)
    return topology(
        trace(inner, example_inputs), state_of(inner), packed_of(masks, inner),
        {n: p.kind for n, p in layers.items()},
    )  # fmt: skip


def methods() -> list[dict[str, Any]]:
    """The methods, one row each: what they compute, need and cost, and how they fail.

    "name", "summary", "source", "options" (name -> default), "rounds", "scope" and "variants";
    "needs_inputs", "needs_data" and "needs_labels"; "takes_loss" where `loss_fn` is used, which the
    others refuse; "structured" where whole channels go; "cost"
    in forward passes F over the data, a backward pass being 2F; "weakness", known ways to fail;
    "example", a call that runs where `model` is a model, `inputs` an input of it and `loader` gives
    batches of inputs and labels.
    Methods that prune during training are in `pk.training.pruner_rows()`.

    Example:
        >>> import paikern as pk
        >>> [row["rounds"] for row in pk.methods() if row["name"] in ("force", "snip")]
        [10, 1]
    """
    rows = []
    for name in scorer_names():
        cls = scorer_class(name)
        rows.append(
            {
                "name": name,
                "summary": cls.summary,
                "source": cls.source,
                "needs_inputs": cls.needs_inputs,
                "needs_data": cls.needs_data,
                "structured": issubclass(cls, ChannelScorer),
                "needs_labels": cls.needs_labels,
                "takes_loss": cls.takes_loss,
                "cost": cls.cost,
                "weakness": cls.weakness,
                "rounds": cls.default_rounds,
                "scope": cls.default_scope,
                "variants": cls.variants,
                "options": {f.name: f.default for f in fields(cls)},
                "example": _example(cls),
            }
        )
    return rows


def _example(cls: type[Scorer]) -> str:
    reads = ""
    if cls.needs_data:
        reads = ", data=loader"
    elif cls.needs_inputs:
        reads = ", example_inputs=inputs"
    return f"pk.prune(model, {cls.name!r}, sparsity=0.5{reads})"


# --- the parts of a run ----------------------------------------------------------------------


def _scorer(method: str | Scorer, options: Mapping[str, Any]) -> Scorer:
    if isinstance(method, Scorer):
        if options:
            raise ValueError(
                f"{next(iter(options))}: give options to the scorer itself, not to prune()"
            )
        return method
    return make_scorer(method, options)


def _total(run: Run, scorer: Scorer) -> int:
    """What a sparsity is a fraction of."""
    if isinstance(scorer, ChannelScorer) and scorer.target == "nodes":
        return scorer.groups(run).nodes
    return sum(torch.Size(shape).numel() for shape in run.shapes.values())


def _check_choices(
    scorer: Scorer, variant: str, rule: str, on_collapse: str, rounds: int | None
) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if variant not in scorer.variants:
        raise ValueError(
            f"variant: {scorer.name} has no {variant!r} variant, only {scorer.variants}"
        )
    if rule not in RULES:
        raise ValueError(f"selection must be one of {RULES}, got {rule!r}")
    if on_collapse not in ON_COLLAPSE:
        raise ValueError(f"on_collapse must be one of {ON_COLLAPSE}, got {on_collapse!r}")
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")


def _options(scorer: Scorer) -> dict[str, Any]:
    """Method options as they go into a mask file: numbers and words, tensors by their names."""
    found = {}
    for f in fields(scorer):
        value = getattr(scorer, f.name)
        if isinstance(value, Mapping):
            value = f"given for {len(value)} layers"
        found[f.name] = value
    return found


def _tell(run: Run, masks: MaskSet, on_collapse: str, built: bool) -> None:
    for note in dict.fromkeys(run.notes):
        warnings.warn(note, PaikernWarning, stacklevel=4)
    # What a method that ranks nothing can be asked for instead.
    _warn_empty(masks, on_collapse, cure="use a lower sparsity" if built else _CURES)


_CURES = "use more rounds, a lower sparsity, scope='erk', or on_collapse='floor'"


def _warn_empty(masks: MaskSet, on_collapse: str, stacklevel: int = 5, cure: str = _CURES) -> None:
    empty = [n for n, kept in masks.kept_by_layer.items() if kept == 0 and masks.packed(n).numel()]
    if empty and on_collapse == "warn":
        warnings.warn(
            f"layer collapse: {listed(empty)} {'keeps' if len(empty) == 1 else 'keep'} no weight; "
            f"{cure}",
            PaikernWarning,
            stacklevel=stacklevel,
        )
