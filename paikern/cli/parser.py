"""Arguments of every command, with examples."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from paikern import budget
from paikern.cli import commands
from paikern.gradients.loss import LOSSES
from paikern.loading import parse_shape
from paikern.scorers.base import VARIANTS
from paikern.selection import ON_COLLAPSE, RULES
from paikern.version import __version__

_MODEL_HELP = (
    "a zoo name (resnet20, vgg16_bn, ...), timm:NAME, hf:DIR, or package.module:function, which "
    "returns a model or (model, example_inputs) and is run"
)
_PRUNE_EXAMPLES = """examples:
  paikern prune --model resnet20 --method dpai --sparsity 0.98 --out out
  paikern prune --model timm:resnet18 --method synflow --compression 20 --rounds 50 --out out
  paikern prune --model mine.models:build --checkpoint w.safetensors --method magnitude \\
      --sparsity 0.9 --ignore head --ignore 're:.*downsample.*' --out out
  paikern prune --model resnet20 --method dpai --sparsity 0.98 --set steps=100 --set alpha=0.5
  paikern prune --model resnet20 --method px --sparsity 0.9 --data samples.npy
  paikern prune --model resnet20 --method snip --sparsity 0.9 --data samples.npz
  paikern prune --model resnet20 --method l1_filters --sparsity 0.5
  paikern prune --model resnet20 --method magnitude --pattern 2:4
"""
_VERIFY_EXAMPLES = """examples:
  paikern verify out/masks.safetensors --model resnet20
  paikern verify out/masks.safetensors --model resnet20 --checkpoint trained.safetensors

exit code 1 means that the file was read and something is wrong with what it holds.
"""
_MAIN_EXAMPLES = """examples:
  paikern prune --model resnet20 --method dpai --sparsity 0.98 --out out
  paikern inspect out/masks.safetensors
  paikern verify out/masks.safetensors --model resnet20
  paikern methods

exit codes: 0 done, 1 a check failed, 2 wrong use or unreadable input, 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """Errors on one line instead of behind a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser; each command sets `run`, a function of (arguments, console)."""
    parser = _Parser(
        prog="paikern",
        description="Prune neural networks before they are trained: exact, fast, any model.",
        epilog=_MAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"paikern {__version__}")
    every = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_prune(every)
    _add_inspect(every)
    _add_verify(every)
    _add_report(every)
    for name, run, text in (
        ("methods", commands.methods, "list the pruning methods, their options and sources"),
        ("backends", commands.backends, "list the backends and what is usable here"),
    ):
        sub = _command(every, name, run, text)
        _output_options(sub)
    text = "compare with the pure-PyTorch references (source tree)"
    bench = every.add_parser("bench", help=text, add_help=False)  # --help is the benchmark's own
    bench.set_defaults(run=commands.bench, passes_on=True)
    return parser


def _command(every: Any, name: str, run: Any, text: str, epilog: str = "") -> Any:
    sub = every.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(run=run)
    return sub


def _output_options(sub: Any) -> None:
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
    sub.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    sub.add_argument("--debug", action="store_true", help="show tracebacks and all warnings")


def _model_options(sub: Any) -> None:
    sub.add_argument("--model", required=True, help=_MODEL_HELP)
    sub.add_argument(
        "--checkpoint", metavar="FILE", help="weights: safetensors or a torch.save state dict"
    )
    sub.add_argument(
        "--input",
        type=_shape,
        metavar="1x3x32x32",
        help="shape of one example input, batch first, where the model does not bring its own",
    )


def _add_prune(every: Any) -> None:
    sub = _command(every, "prune", commands.prune, "prune a model", _PRUNE_EXAMPLES)
    _model_options(sub)
    sub.add_argument("--method", required=True, help="a name that `paikern methods` lists")
    sub.add_argument(
        "--data",
        metavar="FILE",
        help="samples for methods that read some: .npy, .npz, safetensors or torch.save with "
        "inputs [n, ...] and, for methods that differentiate a loss, labels",
    )
    sub.add_argument(
        "--loss",
        choices=LOSSES,
        help="of methods that differentiate one; default: by the model and the labels",
    )
    amount = sub.add_argument_group("how much to remove (give one)")
    amount.add_argument(
        "--sparsity",
        type=float,
        metavar="F",
        help="fraction removed, in [0, 1); of the outputs of layers where whole channels go",
    )
    amount.add_argument("--density", type=float, metavar="F", help="fraction kept, in (0, 1]")
    amount.add_argument("--compression", type=float, metavar="X", help="10 keeps a tenth")
    how = sub.add_argument_group("how")
    how.add_argument(
        "--pattern",
        default="unstructured",
        help="unstructured, n:m as 2:4 (implies the sparsity), block:RxC, row, column or kernel",
    )
    how.add_argument("--scope", choices=budget.SCOPES, help="default: by method")
    how.add_argument("--rounds", type=int, metavar="N", help="default: by method")
    how.add_argument(
        "--schedule", choices=budget.SCHEDULES, help="curve over the rounds; default: by method"
    )
    how.add_argument(
        "--variant",
        choices=VARIANTS,
        default="paper",
        help="the method as in its paper (default), or as in its published code",
    )
    how.add_argument(
        "--selection",
        choices=RULES,
        default="exact",
        help="exact count (default), or the published rule",
    )
    how.add_argument(
        "--on-collapse",
        choices=ON_COLLAPSE,
        default="warn",
        help="when a layer would keep nothing: name it (default), stop, or keep its best weight",
    )
    how.add_argument(
        "--seed", type=int, default=0, help="of the method, and of initial values (default 0)"
    )
    how.add_argument(
        "--ignore", action="append", default=[], metavar="NAME", help="leave out; 're:...' works"
    )
    how.add_argument(
        "--include", action="append", metavar="NAME", help="take only these; 're:...' works"
    )
    how.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the method (`paikern methods` lists them)",
    )
    how.add_argument("--backend", metavar="NAME", help="force one that `paikern backends` lists")
    out = sub.add_argument_group("output")
    out.add_argument(
        "--out", metavar="DIR", help="write masks.safetensors, summary.json and report.html there"
    )
    out.add_argument("--no-report", action="store_true", help="leave report.html out")
    out.add_argument(
        "--save-weights", action="store_true", help="write the pruned model.safetensors too"
    )
    _output_options(out)


def _add_inspect(every: Any) -> None:
    sub = _command(every, "inspect", commands.inspect, "show what a mask file holds")
    sub.add_argument("masks", metavar="MASKS", help="a mask file")
    _output_options(sub)


def _add_verify(every: Any) -> None:
    sub = _command(
        every, "verify", commands.verify, "check masks against a model", _VERIFY_EXAMPLES
    )
    sub.add_argument("masks", metavar="MASKS", help="a mask file")
    _model_options(sub)
    _output_options(sub)


def _add_report(every: Any) -> None:
    sub = _command(every, "report", commands.report, "write one HTML page with tables and plots")
    sub.add_argument("masks", metavar="MASKS", help="a mask file")
    _model_options(sub)
    sub.add_argument("--out", metavar="FILE", help="default: MASKS with the ending .html")
    _output_options(sub)


def _shape(text: str) -> tuple[int, ...]:
    try:
        return parse_shape(text)
    except ValueError as error:  # argparse would replace its text
        raise argparse.ArgumentTypeError(str(error).removeprefix("input: ")) from error
