"""What each command does. Every function takes (arguments, console) and returns the exit code."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import paikern
from paikern import api, budget
from paikern import report as reports
from paikern._names import storage_key
from paikern.analysis import Topology
from paikern.backends import registry
from paikern.batches import Batches
from paikern.channels import empty_outputs
from paikern.cli.console import Console
from paikern.errors import PathRuleError
from paikern.loading import load_model
from paikern.masks import MaskSet, load_masks
from paikern.pattern import Layout, Pattern, parse_pattern
from paikern.prunable import prunable_parameters
from paikern.report import Column, Table, layer_table, provenance_table, summarize
from paikern.report.tables import log_text, percent
from paikern.samples import fit_samples, load_samples
from paikern.scorers.base import Scorer, TrainedScorer, make_scorer, scorer_class
from paikern.structured import deviations, kept_range, target_sparsity
from paikern.training import pruner_rows

Arguments = argparse.Namespace


def prune(args: Arguments, console: Console) -> int:
    """Everything that can be refused is refused before the model is loaded."""
    fraction = target_sparsity(
        parse_pattern(args.pattern),
        sparsity=args.sparsity,
        density=args.density,
        compression=args.compression,
    )
    scorer = _scorer(args.method, args.set)
    folder = _output_folder(args.out)
    if args.save_weights and folder is None:
        raise ValueError("--save-weights needs --out DIR")
    if scorer.needs_data != (args.data is not None):
        raise ValueError(
            f"--data: method {scorer.name!r} "
            + ("reads samples; give --data FILE" if scorer.needs_data else "reads no samples")
        )
    if args.loss is not None and not scorer.takes_loss:
        raise ValueError(f"--loss: method {scorer.name!r} differentiates no loss")
    data = None if args.data is None else load_samples(args.data)
    if scorer.needs_labels and not _labelled(data):
        raise ValueError(
            f"data: the loss needs labels, which method {scorer.name!r} reads, and {args.data} "
            "holds none; save them as 'labels'"
        )
    model, inputs = load_model(args.model, args.checkpoint, input_shape=args.input, seed=args.seed)
    if data is not None:
        data = fit_samples(data, model, inputs)
        inputs = _example(data) if inputs is None else inputs
    if scorer.needs_inputs and inputs is None:
        raise ValueError(
            f"--input: method {scorer.name!r} traces the model and needs the shape of an input, "
            "for instance --input 1x3x32x32"
        )
    masks = api.prune(
        model,
        scorer,
        sparsity=fraction,
        example_inputs=inputs,
        data=data,
        loss_fn=args.loss,
        pattern=args.pattern,
        scope=args.scope,
        rounds=args.rounds,
        schedule=args.schedule,
        ignore=args.ignore,
        include=args.include,
        seed=args.seed,
        variant=args.variant,
        selection=args.selection,
        on_collapse=args.on_collapse,
        backend=args.backend,
        progress=False if args.quiet else None,
    )
    masks.metadata["model"] = args.model
    topology = _topology(model, masks, inputs, console)
    summary = {**summarize(masks, topology), "warnings": list(console.warnings)}
    written = [] if folder is None else _write_run(folder, args, model, masks, topology, summary)
    if args.json:
        console.json(summary)
        return 0
    _show_run(console, masks, topology)
    for path in written:
        console.line(f"wrote {path}")
    if folder is None:
        console.line("nothing written; --out DIR keeps the masks")
    return 0


def inspect(args: Arguments, console: Console) -> int:
    """A mask file alone: no model is needed."""
    masks = load_masks(args.masks)
    if args.json:
        console.json({**summarize(masks), "history": masks.metadata.get("history", [])})
        return 0
    console.line(f"{args.masks}: kept {masks.kept:,} of {masks.total:,} weights")
    console.line()
    console.table(layer_table(masks))
    console.line()
    console.table(provenance_table(masks))
    return 0


def verify(args: Arguments, console: Console) -> int:
    """Counts, zeros, paths, dead layers; 1 if any check fails."""
    masks = load_masks(args.masks)
    model, inputs = load_model(args.model, args.checkpoint, input_shape=args.input)
    masks.slots(model)  # masks of another model are wrong use, not a failed check
    topology = _topology(model, masks, inputs, console)
    layouts = {n: p.layout for n, p in prunable_parameters(model, include=list(masks)).items()}
    checks = [_count_check(masks, layouts), *_pattern_check(masks, layouts)]
    if args.checkpoint is None:
        checks.append(("pruned weights are zero", None, "not checked, needs --checkpoint"))
    else:
        problems = masks.problems(model)
        checks.append(("pruned weights are zero", not problems, "; ".join(problems)))
    checks += _path_checks(model, inputs, topology)
    failed = [check for check in checks if check[1] is False]
    if args.json:
        rows = [{"check": name, "ok": ok, "detail": detail} for name, ok, detail in checks]
        console.json({"ok": not failed, "checks": rows, **summarize(masks, topology)})
    else:
        words = {True: "ok", False: "FAILED", None: "-"}
        rows_shown = [(name, words[ok], detail) for name, ok, detail in checks]
        console.table(Table((Column("check"), Column("result"), Column("detail")), rows_shown))
        console.line()
        _show_run(console, masks, topology)
    for name, _, detail in failed:
        console.error(f"verify: {name}: failed: {detail}")
    return 1 if failed else 0


def report(args: Arguments, console: Console) -> int:
    """One page beside the masks, or where --out says."""
    masks = load_masks(args.masks)
    path = Path(args.out) if args.out else Path(args.masks).with_suffix(".html")
    if not path.parent.is_dir():
        raise ValueError(f"--out: there is no folder {path.parent}")
    model, inputs = load_model(args.model, args.checkpoint, input_shape=args.input)
    masks.slots(model)
    topology = _topology(model, masks, inputs, console)
    reports.write_report(masks, topology, path, notes=console.warnings)
    if args.json:
        console.json({"report": str(path)})
    else:
        console.line(f"wrote {path}")
    return 0


def methods(args: Arguments, console: Console) -> int:
    """The registry of methods."""
    rows = api.methods()
    if args.json:
        console.json(rows)
        return 0
    columns = (
        "method", "removes", "needs", "rounds", "cost", "scope", "variants", "what it does",
        "source",
    )  # fmt: skip
    cells = [
        (
            row["name"],
            "channels" if row["structured"] else "weights",
            _needs(row),
            "-" if issubclass(scorer_class(row["name"]), TrainedScorer) else str(row["rounds"]),
            row["cost"],
            row["scope"],
            ", ".join(row["variants"]),
            row["summary"],
            row["source"],
        )
        for row in rows
    ]
    console.table(Table(tuple(Column(title, title == "rounds") for title in columns), cells))
    console.line("F: a forward pass over the data; a backward pass counts 2F")
    console.line()
    weak = [(row["name"], row["weakness"]) for row in rows]
    console.table(Table((Column("method"), Column("known weakness")), weak))
    console.line()
    options = [
        (row["name"], name, "-" if default is None else str(default))
        for row in rows
        for name, default in row["options"].items()
    ]
    console.table(Table((Column("method"), Column("option (--set)"), Column("default")), options))
    console.line()
    during = [
        (row["name"], _needs(row) + _by_method(row), row["summary"], row["source"])
        for row in pruner_rows()
    ]
    titles = ("during training (pk.pruner)", "needs", "what it does", "source")
    console.table(Table(tuple(Column(title) for title in titles), during))
    return 0


def _needs(row: Mapping[str, Any]) -> str:
    """What has to be given besides the model."""
    if row["needs_data"]:
        return "data, labels" if row["needs_labels"] else "data"
    return "inputs" if row["needs_inputs"] else "-"


def _by_method(row: Mapping[str, Any]) -> str:
    """The method whose needs these are, where another one may be chosen."""
    method = row["options"].get("method")
    return "" if method is None else f" ({method})"


def backends(args: Arguments, console: Console) -> int:
    """What runs here, and if not, why."""
    rows = registry.backends()
    if args.json:
        console.json(rows)
        return 0
    columns = tuple(Column(title) for title in ("backend", "devices", "usable", "reason"))
    cells = [
        (row["name"], row["devices"], "yes" if row["usable"] else "no", row["reason"])
        for row in rows
    ]
    console.table(Table(columns, cells))
    return 0


def bench(args: Arguments, console: Console) -> int:
    """Hand over to the benchmark of the source tree; its options follow the command."""
    root = Path(paikern.__file__).resolve().parents[1]
    if not (root / "bench" / "run_comparison.py").is_file():
        raise ValueError(
            "bench: the benchmarks are part of the source tree, not of the installed package; run "
            "`make bench` in a clone"
        )
    # From where the user is, so that paths mean what they say.
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen([sys.executable, "-m", "bench", *args.rest], env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # it has had the signal too, and writes what it measured


# --- parts ---------------------------------------------------------------------------------------


def _labelled(data: Any) -> bool:
    return isinstance(data, tuple) or (isinstance(data, dict) and "labels" in data)


def _example(data: Any) -> Any:
    """Inputs of the shape of one sample."""
    example = Batches(data).example()
    return torch.ones_like(example) if isinstance(example, torch.Tensor) else example


def _scorer(name: str, settings: list[str]) -> Scorer:
    cls = scorer_class(name)
    hints = typing.get_type_hints(cls)
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"--set: expected KEY=VALUE, got {setting!r}")
        if key in options:
            raise ValueError(f"--set: {key} is given twice")
        options[key] = _value(key, text, hints[key]) if key in hints else text
    return make_scorer(name, options)


def _value(key: str, text: str, hint: Any) -> Any:
    """`text` as one of the types that the option is declared with."""
    allowed = typing.get_args(hint) or (hint,)
    try:
        value = json.loads(text.lower() if text in ("True", "False", "None") else text)
    except ValueError:
        value = None if text == "none" else text
    if isinstance(value, int) and float in allowed and type(value) not in allowed:
        value = float(value)
    if type(value) not in allowed:
        simple = [t.__name__ for t in allowed if t in (int, float, bool, str)]
        if not simple:
            raise ValueError(f"--set: {key} takes tensors and can be set from Python only")
        raise ValueError(f"--set: {key} must be {' or '.join(simple)}, got {text!r}")
    return value


def _output_folder(out: str | None) -> Path | None:
    """The folder, not yet made; a place that cannot be written to is told before the work."""
    if out is None:
        return None
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out: {out} is a file, give a folder")
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--out: {existing} cannot be written to")
    return folder


def _write_run(
    folder: Path,
    args: Arguments,
    model: nn.Module,
    masks: MaskSet,
    topology: Topology | None,
    summary: dict[str, Any],
) -> list[Path]:
    """Each file appears whole or not at all, the masks first."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "masks.safetensors", folder / "summary.json"]
    masks.save(written[0])
    reports.write_json(written[1], summary)
    if args.save_weights:
        written.append(folder / "model.safetensors")
        reports.write_atomically(written[-1], _weights(model))
    if not args.no_report:
        written.append(folder / "report.html")
        reports.write_report(masks, topology, written[-1], notes=summary["warnings"])
    return written


def _weights(model: nn.Module) -> bytes:
    """The state dict as safetensors; a tied weight is stored once."""
    from safetensors.torch import save

    once: dict[Any, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        once.setdefault(storage_key(tensor), (name, tensor))
    # A copy each, since tensors that share a storage in part cannot be stored.
    return save({name: tensor.clone().contiguous() for name, tensor in once.values()})


def _topology(model: nn.Module, masks: MaskSet, inputs: Any, console: Console) -> Topology | None:
    """Path statistics where they can be had; masks are worth having without."""
    if inputs is None:
        console.warn("no path statistics: the shape of an input is not known; give --input")
        return None
    try:
        return api.analyze(model, masks, example_inputs=inputs)
    except PathRuleError as error:
        console.warn(f"no path statistics: {error}")
        return None


def _show_run(console: Console, masks: MaskSet, topology: Topology | None) -> None:
    about = masks.metadata
    seconds = about.get("seconds")
    took = f", {seconds:.2f} s" if isinstance(seconds, (int, float)) else ""
    console.line(
        f"{about.get('method', 'masks')} on {about.get('model', 'model')}: kept {masks.kept:,} of "
        f"{masks.total:,} weights ({percent(masks.kept, masks.total)}){took}"
    )
    if masks.channels:
        console.line(f"channels: {100 * masks.node_sparsity:.2f} % of the outputs removed")
    if topology is not None:
        console.line(
            f"log paths {log_text(topology.log_paths)}, effective nodes "
            f"{topology.effective_nodes:,}, kernels {topology.effective_kernels:,}, params "
            f"{topology.effective_params:,}"
        )
    console.line()
    console.table(layer_table(masks, topology))
    console.line()


Check = tuple[str, bool | None, str]
"""(what, whether it holds or None where it was not checked, detail)"""


def _pattern_of(masks: MaskSet) -> Pattern | None:
    """The recorded pattern; None for no pattern, and for what is none: a file may hold anything."""
    try:
        return parse_pattern(masks.metadata.get("pattern", "unstructured"))
    except (TypeError, ValueError):
        return None


def _pattern_check(masks: MaskSet, layouts: Mapping[str, Layout]) -> list[Check]:
    """Whether the masks have the recorded pattern."""
    pattern = _pattern_of(masks)
    if pattern is None:
        return []
    wrong = deviations(masks, pattern, layouts)
    return [(f"pattern {pattern}", not wrong, ", ".join(wrong))]


def _channel_check(masks: MaskSet, layouts: Mapping[str, Layout]) -> Check:
    """Whether the channels that the file calls removed have no weight."""
    channels = masks.channels
    wrong = [
        name
        for name, kept in channels.items()
        if name not in masks or not empty_outputs(masks[name], layouts[name], ~kept)
    ]
    kept = sum(int(mask.sum()) for mask in channels.values())
    total = sum(mask.numel() for mask in channels.values())
    detail = f"{kept:,} of {total:,} outputs kept"
    if wrong:
        detail += f", but removed ones of {', '.join(wrong)} have weights"
    return "channels", not wrong, detail


def _count_check(masks: MaskSet, layouts: Mapping[str, Layout]) -> Check:
    """Whether as many weights are kept as the recorded sparsity and pattern ask for."""
    if masks.channels:
        return _channel_check(masks, layouts)
    name = "number of kept weights"
    arguments = masks.metadata.get("arguments")
    asked: Any = masks.metadata.get("sparsity")
    detail = f"{masks.kept:,} of {masks.total:,}"
    if not isinstance(arguments, dict):
        arguments = {}
    exact = arguments.get("variant") == "paper" and arguments.get("selection") == "exact"
    exact = exact and arguments.get("exact", True) is not False  # PHEW may keep its last walk whole
    # A file may hold anything, True among it, which Python takes for a number.
    if not exact or type(asked) not in (int, float) or not 0 <= asked < 1:
        return name, None, f"{detail}; no exact count was asked for"
    scope = str(arguments.get("scope"))
    pattern = _pattern_of(masks)
    if pattern is not None:
        low, high = kept_range(pattern, masks.shapes, layouts, float(asked), scope)
        if not low <= masks.kept <= high:
            detail += f", but pattern {pattern} keeps {low:,}" + f" to {high:,}" * (low < high)
        return name, low <= masks.kept <= high, detail
    if scope in ("local", "uniform", "row"):  # rounded layer by layer, or row by row
        budgets = budget.layer_budget(masks.shapes, float(asked), scope, layouts=layouts)
        expected = budgets if isinstance(budgets, int) else sum(budgets)
    else:
        expected = budget.keep_count(masks.total, float(asked))
    if masks.kept != expected:
        detail += f", but sparsity {asked} keeps {expected:,}"
    return name, masks.kept == expected, detail


def _path_checks(model: nn.Module, inputs: Any, topology: Topology | None) -> list[Check]:
    if topology is None:
        return [("paths", None, "not checked")]
    alive = topology.log_paths > -math.inf
    checks: list[Check] = [
        ("a path from input to output", alive, f"log paths {log_text(topology.log_paths)}")
    ]
    dead = list(topology.dead_layers)
    if dead:  # a layer that no path uses in the dense model either is not the masks' doing
        unused = set(api.analyze(model, example_inputs=inputs).dead_layers)
        dead = [name for name in dead if name not in unused]
    checks.append(("no dead layer", not dead, ", ".join(dead)))
    return checks
