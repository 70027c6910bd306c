"""What a trainer's callback gives to a pruner beside what the user has given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from paikern.scorers.base import scorer_class
from paikern.training.registry import pruner_class


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
