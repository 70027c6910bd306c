"""ResNet-20 pruned four ways, side by side: `make prune`, or `python -m paikern.demo --out out`.

Leaves under `out/`: METHOD.safetensors (the masks), METHOD.html (a page each), index.html (the
comparison), summary.json, summary.md, summary.txt, and the plots as PNG.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paikern import api, zoo
from paikern.analysis import Topology
from paikern.cli.console import Console, log_lines
from paikern.errors import PaikernWarning
from paikern.masks import MaskSet
from paikern.report import Column, Table, plots, summarize, write_json, write_report
from paikern.report.files import write_atomically
from paikern.report.html import page, section, table_html
from paikern.report.tables import log_text
from paikern.version import __version__

MODEL = "resnet20"
METHODS = ("dpai", "synflow", "magnitude", "random")
_DESCRIPTION = "The same network, the same number of weights kept, four ways to choose them."


@dataclass(frozen=True)
class Result:
    """One method on the network."""

    method: str
    seconds: float
    masks: MaskSet
    topology: Topology
    warnings: tuple[str, ...]


def run(
    methods: Sequence[str] = METHODS,
    *,
    sparsity: float = 0.98,
    seed: int = 0,
    console: Console | None = None,
    **options: Any,
) -> list[Result]:
    """Prune a fresh ResNet-20 (10 classes, 3 x 32 x 32) with each method.

    `options` go to every `pk.prune`, for instance ``rounds=10``. The clock runs for `pk.prune`
    alone, tracing of the model included.

    >>> found = run(["magnitude", "random"], sparsity=0.9)
    >>> [(r.method, r.masks.kept, r.masks.total) for r in found]
    [('magnitude', 27090, 270896), ('random', 27090, 270896)]
    """
    results = []
    for method in methods:
        if console is not None:
            console.progress(f"{method} on {MODEL} at {100 * sparsity:g} % ...")
        model = zoo.create(MODEL, seed=seed, num_classes=10)
        inputs = zoo.example_input(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PaikernWarning)
            started = time.perf_counter()
            masks = api.prune(
                model,
                method,
                sparsity=sparsity,
                example_inputs=inputs,
                seed=seed,
                progress=False if console is None else None,
                **options,
            )
            seconds = time.perf_counter() - started
        told = tuple(str(w.message) for w in caught if issubclass(w.category, PaikernWarning))
        topology = api.analyze(model, masks, example_inputs=inputs)
        results.append(Result(method, seconds, masks, topology, told))
    return results


def comparison_table(results: Sequence[Result]) -> Table:
    """One row a method; the totals of the dense network stand in the headings."""
    layers = results[0].topology.layers
    titles = (
        "seconds",
        "log paths",
        f"effective nodes of {sum(layer.nodes for layer in layers):,}",
        f"kernels of {sum(layer.kernels for layer in layers):,}",
        "params",
        "kept",
        "of",
    )
    rows = [
        (
            r.method,
            f"{r.seconds:.2f}",
            log_text(r.topology.log_paths),
            f"{r.topology.effective_nodes:,}",
            f"{r.topology.effective_kernels:,}",
            f"{r.topology.effective_params:,}",
            f"{r.masks.kept:,}",
            f"{r.masks.total:,}",
        )
        for r in results
    ]
    return Table((Column("method"), *(Column(title, right=True) for title in titles)), rows)


def write(results: Sequence[Result], folder: Path) -> None:
    """Everything that a reader looks at afterwards; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for r in results:
        r.masks.save(folder / f"{r.method}.safetensors")
        write_report(r.masks, r.topology, folder / f"{r.method}.html", notes=r.warnings)
        figure = plots.density_figure(r.masks, r.topology)
        if figure is not None:
            write_atomically(folder / f"{r.method}_density.png", plots.png(figure))
    table = comparison_table(results)
    figures = _figures(results)
    for name, _, figure in figures:
        write_atomically(folder / f"{name}.png", plots.png(figure, dpi=110))
    about = _about(results)
    write_json(
        folder / "summary.json",
        {
            **about,
            "rows": [
                {"model": MODEL, "seconds": r.seconds, **summarize(r.masks, r.topology)}
                for r in results
            ],
        },
    )
    text = f"ResNet-20 at {100 * results[0].masks.sparsity:.2f} % sparsity"
    where = f"{about['machine']}, {about['threads']} threads, torch {about['torch_version']}"
    write_atomically(folder / "summary.md", f"# {text}\n\n{table.markdown()}\n\n{where}\n")
    write_atomically(folder / "summary.txt", f"{text}\n\n{table.plain()}\n\n{where}\n")
    body = [section("Comparison", table_html(table), where)]
    body += [
        section(title, f"<figure>{plots.svg(figure, name)}</figure>")
        for name, title, figure in figures
    ]
    body += [
        section(f"Masks of {r.method}", f"<figure>{plots.svg(figure, r.method)}</figure>")
        for r in results
        if (figure := plots.mask_figure(r.masks)) is not None
    ]
    write_atomically(folder / "index.html", page(text, _DESCRIPTION, body))


def _figures(results: Sequence[Result]) -> list[tuple[str, str, Any]]:
    """(file name, title, figure)"""
    topologies = {r.method: r.topology for r in results}
    found = [("comparison", "Along the depth", plots.comparison_figure(topologies))]
    for r in results:
        figure = plots.run_figure({r.method: r.masks.metadata["history"]})
        if figure is not None:
            found.append((f"{r.method}_run", f"The run of {r.method}", figure))
    return found


def _about(results: Sequence[Result]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "paikern_version": __version__,
        "torch_version": torch.__version__,
        "seeds": sorted({r.masks.metadata["seed"] for r in results}),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, write the files; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m paikern.demo", description="Prune ResNet-20 four ways and compare."
    )
    parser.add_argument("--out", default="out", metavar="DIR", help="default: out")
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress, no table")
    args = parser.parse_args(argv)
    console = Console(quiet=args.quiet)
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        console.error(f"--out: {args.out} is a file, give a folder")
        return 2
    try:
        with log_lines(console):
            results = run(sparsity=args.sparsity, seed=args.seed, console=console)
        write(results, folder)
    except KeyboardInterrupt:
        console.error("interrupted")
        return 130
    except (ValueError, OSError) as error:
        console.error(str(error))
        return 2
    for r in results:
        for text in r.warnings:
            console.warn(f"{r.method}: {text}")
    console.table(comparison_table(results))
    console.line()
    console.line(f"masks, plots and pages are in {folder}{os.sep}; open {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
