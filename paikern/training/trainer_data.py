"""What a trainer's callback gives to a pruner beside what the user has given."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from paikern.scorers.base import scorer_class
from paikern.training.registry import pruner_class


def callback_class(attribute: str, *packages: str) -> tuple[Any, str]:
    """The class of callbacks of the first package that has one; or `object`, and what is wrong.

    Whatever an import raises, from a torchvision that does not fit PyTorch for instance, is told
    when a callback is made and not before.
    """
    wrong = "is not installed"
    for package in packages:
        try:
            return getattr(importlib.import_module(package), attribute), ""
        except Exception as error:
            top = package.split(".")[0]
            if not isinstance(error, ModuleNotFoundError) or error.name not in (package, top):
                first = (str(error).strip() or "no message").splitlines()[0]
                wrong = f"cannot be imported ({type(error).__name__}: {first})"
    return object, wrong


def defaults(
    name: str, options: Mapping[str, Any], loader: Any, example_inputs: Any = None
) -> dict[str, Any]:
    """`options`, with the trainer's own data and example inputs where the method needs some."""
    given = dict(options)
    fields = {field.name: field.default for field in dataclasses.fields(pruner_class(name))}
    if "method" in fields:
        method = scorer_class(given.get("method", fields["method"]))
        if method.needs_inputs and example_inputs is not None:
            given.setdefault("example_inputs", example_inputs)
        if method.needs_data or (method.needs_inputs and "example_inputs" not in given):
            given.setdefault("data", loader)
    elif pruner_class(name).needs_data:
        given.setdefault("data", loader)
    return given
