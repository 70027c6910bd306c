"""scatter_kept, gather_kept: packed values to a dense tensor and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paikern.ops._library import autograd, define, fake
from paikern.ops._path import run
from paikern.ops._transforms import register
from paikern.ops.positions import _check_panel, panels

_WHERE = "Tensor positions, Tensor starts, int rows, int columns, int panel, int kept"

define(f"scatter_kept(Tensor values, {_WHERE}) -> Tensor")
define(f"gather_kept(Tensor dense, {_WHERE}) -> Tensor")


@fake("scatter_kept")
def _scattered(values: Tensor, *where: Any) -> Tensor:
    return values.new_empty(where[2], where[3])


@fake("gather_kept")
def _gathered(dense: Tensor, *where: Any) -> Tensor:
    return dense.new_empty(where[5])


_NOTHING = (None,) * 6


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, starts, *sizes = inputs
    ctx.save_for_backward(positions, starts)
    ctx.sizes = sizes


def _scatter_derivative(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return _by_values((), g, None, None, (*ctx.saved_tensors, *ctx.sizes))[0], *_NOTHING


def _gather_derivative(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return _by_dense((), g, None, None, (*ctx.saved_tensors, *ctx.sizes))[0], *_NOTHING


def _by_values(
    wanted: Any, g: Tensor, first: Any, second: Any, where: tuple[Any, ...]
) -> tuple[Tensor, None, None]:
    return run("gather_kept", g, *where, differentiable=True), None, None


def _by_dense(
    wanted: Any, g: Tensor, first: Any, second: Any, where: tuple[Any, ...]
) -> tuple[Tensor, None, None]:
    return run("scatter_kept", g, *where, differentiable=True), None, None


autograd("scatter_kept", _scatter_derivative, _setup)
autograd("gather_kept", _gather_derivative, _setup)
register("scatter_kept", _by_values, factors=1)
register("gather_kept", _by_dense, factors=1)


def scatter_kept(
    values: Tensor,
    positions: Tensor,
    starts: Tensor,
    rows: int,
    columns: int,
    panel: int,
    kept: int,
) -> Tensor:
    """`dense = zeros(rows, columns); dense[mask] = values`: a packed weight made dense.

    Args:
        values: `[kept]`, any dtype, in row-major order.
        positions: int16 columns of `list_positions`, or the packed bits of the mask (uint8).
        starts: int32, `[rows * panels + 1]`, of `list_positions`.
        rows, columns, panel, kept: of the weight, as for `list_positions`.

    Returns:
        `[rows, columns]`, the dtype of the values, exact zeros where nothing is kept.
        Differentiable: the derivative is `gather_kept`.

    Raises:
        ValueError: values, positions or starts of another length, another panel.
        TypeError: positions that are neither int16 nor uint8.

    Example:
        >>> import torch, paikern as pk
        >>> bits = torch.tensor([0b110101], dtype=torch.uint8)
        >>> where = (*pk.ops.list_positions(bits, 4, 2, 3), 2, 3, 4096, 4)
        >>> scatter_kept(torch.tensor([1.0, 2.0, 3.0, 4.0]), *where).tolist()
        [[1.0, 0.0, 2.0], [0.0, 3.0, 4.0]]
    """
    if tuple(values.shape) != (kept,):
        raise ValueError(f"scatter_kept: values must be [{kept}], got {tuple(values.shape)}")
    _check("scatter_kept", positions, starts, rows, columns, panel, kept)
    where = (positions, starts, rows, columns, panel, kept)
    return run("scatter_kept", values, *where, differentiable=True)


def gather_kept(
    dense: Tensor,
    positions: Tensor,
    starts: Tensor,
    rows: int,
    columns: int,
    panel: int,
    kept: int,
) -> Tensor:
    """`dense[mask]`: the kept values of a dense tensor.

    Args:
        dense: `[rows, columns]`, any dtype, any strides. What is not kept is not looked at.
        positions, starts, rows, columns, panel, kept: as for `scatter_kept`.

    Returns:
        `[kept]`, the dtype of `dense`, in row-major order. Differentiable: the derivative is
        `scatter_kept`.

    Raises:
        ValueError: a tensor of another shape, another panel. TypeError: as for `scatter_kept`.

    Example:
        >>> import torch, paikern as pk
        >>> bits = torch.tensor([0b110101], dtype=torch.uint8)
        >>> where = (*pk.ops.list_positions(bits, 4, 2, 3), 2, 3, 4096, 4)
        >>> gather_kept(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), *where).tolist()
        [1.0, 3.0, 5.0, 6.0]
    """
    if tuple(dense.shape) != (rows, columns):
        raise ValueError(
            f"gather_kept: dense must be [{rows}, {columns}], got {tuple(dense.shape)}"
        )
    _check("gather_kept", positions, starts, rows, columns, panel, kept)
    where = (positions, starts, rows, columns, panel, kept)
    return run("gather_kept", dense, *where, differentiable=True)


def _check(
    name: str, positions: Tensor, starts: Tensor, rows: int, columns: int, panel: int, kept: int
) -> None:
    _check_panel(name, panel)
    if positions.dtype not in (torch.int16, torch.uint8):
        raise TypeError(
            f"{name}: positions must be int16 columns or packed bits (uint8), got {positions.dtype}"
        )
    wanted = kept if positions.dtype == torch.int16 else -(-rows * columns // 8)
    for argument, tensor, length in (
        ("positions", positions, wanted),
        ("starts", starts, rows * panels(columns, panel) + 1),
    ):
        if tuple(tensor.shape) != (length,):
            raise ValueError(
                f"{name}: {argument} must be [{length}] for [{rows}, {columns}] with {kept} kept "
                f"in panels of {panel}, got {tuple(tensor.shape)}"
            )
