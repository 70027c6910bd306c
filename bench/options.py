"""Numbers on the command lines of the benchmarks, refused in one line where they do not fit."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def fraction(text: str) -> float:
    return float(_number(text, float, lambda value: 0 < value < 1, "in (0, 1)"))


def positive(text: str) -> float:
    return float(_number(text, float, lambda value: value > 0, "> 0"))


def count(text: str) -> int:
    return int(_number(text, int, lambda value: value >= 1, ">= 1"))


def _number(text: str, kind: Callable[[str], Any], fits: Callable[[Any], bool], rule: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"must be a number {rule}, got {text!r}")
    return value
