"""Pretrained transformers pruned in one shot, and what is left of them.

    python -m bench.run_transformers                 both models, about a quarter of an hour
    python -m bench.run_transformers --models minilm --no-write

SmolLM2-135M by its perplexity, all-MiniLM-L6-v2 by how its embeddings move and how often the
first half of a passage still finds its second half. No training before or after, no mask search:
scores are computed once for a model and cut off at three sparsities. Rows are written as they come
and kept: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paikern as pk
from bench.options import fraction
from bench.pretrained import PACKAGES, Pretrained, load, pairs, windows
from bench.selection_report import table
from bench.timing import RESULTS, Row, machine, use_threads, versions, write_results

SPARSITIES = (0.3, 0.5, 0.7)
THREADS = 1
PAGE = Path(__file__).parent / "transformers.md"

#: name in the tables -> (method, scope)
WAYS = {
    "magnitude, local": ("magnitude", "local"),
    "Wanda, row": ("wanda", "row"),
    "SNIP, global": ("snip", "global"),
    "SNIP, local": ("snip", "local"),
    "magnitude, row": ("magnitude", "row"),
}
#: tokens: how many windows of which length, to calibrate with and to measure on
CALIBRATE, MEASURE = (8, 256), (8, 256)
PASSAGES, HALF = {"calibrate": 64, "measure": 128}, 64


def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """exp of the mean cross-entropy of the next token."""
    losses = []
    with torch.no_grad():
        for window in tokens.split(1):
            logits = model(input_ids=window).logits[:, :-1]
            losses.append(F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten()))
    return math.exp(min(700.0, float(torch.stack(losses).mean())))


def embeddings(outputs: Any) -> Tensor:
    """Mean over the tokens, of length 1; nothing is padded."""
    return F.normalize(outputs.last_hidden_state.mean(1), dim=1)


def contrast(outputs: Any, batch: Any) -> Tensor:
    """The loss that the encoder was trained with: each first half against all second halves."""
    first, second = embeddings(outputs).chunk(2)
    return F.cross_entropy(20 * first @ second.T, torch.arange(len(first)))


def embedded(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([embeddings(model(input_ids=part)) for part in tokens.split(64)])


def calibration(name: str, given: Pretrained) -> dict[str, Any]:
    """What methods that read data are given; SNIP has the loss that the model was trained with."""
    if name == "smollm2":
        ids = windows(given.tokenizer, "calibrate", *CALIBRATE)
        return {"data": {"input_ids": ids, "labels": ids}, "batch_size": 2}
    ids = pairs(given.tokenizer, "calibrate", PASSAGES["calibrate"], HALF)
    return {"data": {"input_ids": ids}, "batch_size": len(ids), "loss_fn": contrast}


def measure_of(name: str, given: Pretrained) -> Callable[[nn.Module], Row]:
    """What is measured, as a function of the pruned model."""
    if name == "smollm2":
        tokens = windows(given.tokenizer, "measure", *MEASURE)
        return lambda model: {"perplexity": perplexity(model, tokens)}
    tokens = pairs(given.tokenizer, "measure", PASSAGES["measure"], HALF)
    dense = embedded(given.model, tokens)

    def moved(model: nn.Module) -> Row:
        found = embedded(model, tokens)
        first, second = found.chunk(2)
        right = (first @ second.T).argmax(1) == torch.arange(len(first))
        return {
            "similarity": float((found * dense).sum(1).mean()),
            "found": float(right.float().mean()),
        }

    return moved


Key = tuple[str, str, float]


def key_of(row: Row) -> Key:
    return row["model"], row["method"], row["sparsity"]


def rows_of(name: str, sparsities: Sequence[float], have: set[Key]) -> Iterator[Row]:
    """Every way and sparsity for one model, but those in `have`."""
    ways = {
        way: missing
        for way in WAYS
        if (missing := [s for s in sparsities if (name, way, s) not in have])
    }
    if not ways and (name, "dense", 0.0) in have:
        return
    given = load(name)
    measure, data = measure_of(name, given), calibration(name, given)
    none: Row = {"reference_seconds": None, "ratio": None, "model": name}
    if (name, "dense", 0.0) not in have:
        yield {**none, "method": "dense", "sparsity": 0.0, "seconds": 0.0, **measure(given.model)}
    original = {n: p.detach().clone() for n, p in given.model.named_parameters()}
    scores: dict[str, tuple[pk.scores.Scores, float]] = {}
    for way, missing in ways.items():
        method, scope = WAYS[way]
        if method not in scores:
            start = time.process_time()
            options = {k: v for k, v in data.items() if k != "loss_fn" or method == "snip"}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the output layer shares the embedding's weight
                found = pk.score(given.model, method, **(options if method != "magnitude" else {}))
            scores[method] = found, time.process_time() - start
        found, seconds = scores[method]
        for sparsity in missing:
            start = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a layer that keeps nothing is a column
                masks = pk.select(found, sparsity=sparsity, scope=scope)
            seconds_in_all = seconds + time.process_time() - start
            masks.apply(given.model)
            empty = sum(kept == 0 for kept in masks.kept_by_layer.values())
            yield {
                **none, "method": way, "sparsity": sparsity, "seconds": seconds_in_all,
                "achieved_sparsity": masks.sparsity, "empty_layers": empty,
                **measure(given.model),
            }  # fmt: skip
            with torch.no_grad():
                for n, p in given.model.named_parameters():
                    p.copy_(original[n])


METHOD = """\
Scores of the dense model, one selection a sparsity, no training and no repair. Only the Linear
weights inside the blocks are pruned: embeddings stay, and with them the output layer of SmolLM2.
*local* keeps the same share of every layer, *row* of every output, *global* ranks all layers
together. SNIP differentiates the loss that the model was trained with (next token; each half of a
passage against all others). Calibration and measurement read different topics of Python's
reference. The time is that of the processor for scoring
and one selection.

*Perplexity* is over {tokens} tokens in windows of {length}. *Similarity* is the mean cosine between
the embeddings of the dense and the pruned encoder over {halves} passages of {half} tokens; *found*
says how often the first half of a passage is closest to its own second half among {passages}.
"""


def page_text(results: dict[str, Any]) -> str:
    """The page, from the results file alone."""
    where, rows = results["machine"], results["rows"]
    about = [f"{where['cpu']}, {where['cores']} cores", f"{results['threads']} thread"]
    about += [f"{name} {value}" for name, value in results["versions"].items()]
    lines = [
        "# Pretrained transformers, pruned in one shot", "",
        "Written by `python -m bench.run_transformers` from "
        "[transformers.json](results/transformers.json).", "", "; ".join(about) + ".", "",
        METHOD.format(
            tokens=MEASURE[0] * MEASURE[1], length=MEASURE[1], halves=2 * PASSAGES["measure"],
            half=HALF, passages=PASSAGES["measure"],
        ),
    ]  # fmt: skip
    for model, title, keys in (
        ("smollm2", "SmolLM2-135M: perplexity", ("perplexity",)),
        ("minilm", "all-MiniLM-L6-v2: embeddings", ("similarity", "found")),
    ):
        held = {(r["method"], r["sparsity"]): r for r in rows if r["model"] == model}
        if not held:
            continue
        sparsities = sorted({s for _, s in held if s})
        dense = held["dense", 0.0]
        lines += [f"## {title}", "", f"Dense: {_values(dense, keys)}.", ""]
        body = []
        for way in dict.fromkeys(method for method, s in held if s):
            of_way = {s: row for (method, s), row in held.items() if method == way}
            cells = [_values(of_way[s], keys) if s in of_way else "" for s in sparsities]
            empty = max(row["empty_layers"] for row in of_way.values())
            seconds = f"{max(row['seconds'] for row in of_way.values()):.1f} s"
            body.append([way, *cells, str(empty), seconds])
        header = ["way", *(f"{100 * s:g} %" for s in sparsities), "empty layers", "time"]
        lines += table(header, body)
    return "\n".join(lines).rstrip("\n") + "\n"


def earlier(path: Path, known: dict[str, str]) -> list[Row]:
    """The rows of a run that was stopped, if it was of the same versions and machine."""
    if not path.exists():
        return []
    held = json.loads(path.read_text())
    same = held["versions"] == known and held["machine"] == machine()
    return list(held["rows"]) if same else []


def _place(row: Row) -> tuple[int, int, float]:
    ways = ["dense", *WAYS]
    return list(PACKAGES).index(row["model"]), ways.index(row["method"]), row["sparsity"]


def _values(row: Row, keys: Sequence[str]) -> str:
    shown = {
        "perplexity": lambda v: f"{v:,.1f}" if v < 1e5 else f"{v:.1e}",
        "similarity": lambda v: f"{v:.3f}",
        "found": lambda v: f"{100 * v:.0f} %",
    }
    return ", ".join(f"{shown[key](row[key])}{' found' * (key == 'found')}" for key in keys)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the page, write results and page."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m bench.run_transformers", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--sparsity", nargs="+", type=fraction, default=list(SPARSITIES))
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--no-write", action="store_true", help="leave results and page alone")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an earlier run")
    parser.add_argument("--report-only", action="store_true", help="the page from the results")
    given = parser.parse_args(arguments)
    path = RESULTS / "transformers.json"
    if not given.report_only:
        use_threads("bench.run_transformers", given.threads, arguments)
        import transformers

        known = versions() | {"transformers": transformers.__version__}
        rows = [] if given.fresh or given.no_write else earlier(path, known)
        for name in given.models:
            for row in rows_of(name, given.sparsity, {key_of(row) for row in rows}):
                print(" ".join(f"{key}={value}" for key, value in row.items() if value is not None))
                rows.append(row)
                if not given.no_write:
                    rows.sort(key=_place)
                    write_results(
                        "transformers", rows, threads=given.threads, seeds=[0],
                        more={"versions": known},
                    )  # fmt: skip
        if given.no_write:
            return 0
    text = page_text(json.loads(path.read_text()))
    temporary = PAGE.with_suffix(".md.tmp")
    temporary.write_text(text)
    os.replace(temporary, PAGE)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
