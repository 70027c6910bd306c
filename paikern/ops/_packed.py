"""What the layers and operations on packed weights check of their arguments."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from paikern.backends.masked_arguments import refuse_dtype, refuse_values

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def check_given(name: str, x: Any, weight: Any, bias: Any, fix: str) -> Tensor:
    """The values of `weight`; all three are what they should be, whatever their shapes."""
    values = getattr(weight, "values", None)
    if not isinstance(values, Tensor) or not hasattr(weight, "where"):
        if isinstance(values, fx.Proxy) or isinstance(weight, fx.Proxy):
            _refuse_proxy(name, "weight")
        raise TypeError(
            f"{name}: weight must be a PackedWeight, got {type(weight).__name__}; {fix}"
        )
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        _refuse_tensor(name, "x", x)
    if bias is not None and (not isinstance(bias, Tensor) or bias.layout is not torch.strided):
        _refuse_tensor(name, "bias", bias)
    return values


def check_values(name: str, values: Tensor, where: tuple[Any, ...]) -> None:
    """One value for every position of `PackedWeight.where`."""
    positions, kept = where[0], where[8]
    if positions.dtype is torch.int16:
        kept = positions.shape[0]
    if values.dim() != 1 or values.numel() != kept:
        starts = where[1]
        if starts.is_cpu and not torch.compiler.is_compiling():
            kept = int(starts[-1])
        refuse_values(name, kept, values)


def check_dtype(name: str, values: Tensor) -> None:
    if values.dtype not in _DTYPES:
        refuse_dtype(name, values.dtype)


def _refuse_tensor(name: str, argument: str, value: Any) -> NoReturn:
    if isinstance(value, fx.Proxy):
        _refuse_proxy(name, argument)
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name}: {argument} must be a dense tensor, got one of {value.layout}; "
            f"pass {argument}.to_dense()"
        )
    none = " or None" if argument == "bias" else ""
    raise TypeError(
        f"{name}: {argument} must be a torch.Tensor{none}, got {type(value).__name__}; "
        "make it one with torch.as_tensor"
    )


def _refuse_proxy(name: str, argument: str) -> NoReturn:
    raise TypeError(
        f"{name}: {argument} is a torch.fx.Proxy, and packed weights take tensors alone; "
        "use torch.export, or a Tracer whose is_leaf_module keeps packed layers whole"
    )
