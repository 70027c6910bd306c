"""list_positions, transpose_positions: where the kept weights of a packed weight are."""

from __future__ import annotations

import torch
from torch import Tensor

from paikern.ops._library import define, fake
from paikern.ops._transforms import outside
from paikern.ops.unpack_mask import check_packed

COLUMNS = 1 << 16  # that 16 bits can tell apart
MOST_KEPT = 2**31 - 1  # 32-bit starts

define(
    "list_positions(Tensor mask, int kept, int rows, int columns, int panel) -> (Tensor, Tensor)"
)
define(
    "transpose_positions(Tensor positions, Tensor starts, int rows, int columns, int panel)"
    " -> (Tensor, Tensor, Tensor)"
)


def panels(columns: int, panel: int) -> int:
    return -(-columns // panel)


@fake("list_positions")
def _listed(mask: Tensor, kept: int, rows: int, columns: int, panel: int) -> tuple[Tensor, Tensor]:
    starts = rows * panels(columns, panel) + 1
    return mask.new_empty(kept, dtype=torch.int16), mask.new_empty(starts, dtype=torch.int32)


@fake("transpose_positions")
def _transposed(
    positions: Tensor, starts: Tensor, rows: int, columns: int, panel: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        positions.new_empty(positions.shape),
        starts.new_empty(columns * panels(rows, panel) + 1),
        starts.new_empty(positions.shape),
    )


def list_positions(
    mask: Tensor, kept: int, rows: int, columns: int, panel: int = 4096
) -> tuple[Tensor, Tensor]:
    """The bits of a packed mask as 16-bit columns, row by row.

    Args:
        mask: packed bits of a `[rows, columns]` weight, see `pack_mask`.
        kept: how many of them are set.
        panel: columns of a panel, a power of two up to 65,536.

    Returns:
        positions `[kept]`, int16: the low 16 bits of the columns (`& 0xFFFF` undoes the sign), in
        row-major order; and starts `[rows * panels + 1]`, int32: those of panel p of row r are
        `starts[r * panels + p]` up to the next start. int16, because torch cannot pickle uint16.

    Raises:
        ValueError: another number of bits is set, too few bits, another panel.

    Example:
        >>> import torch
        >>> list_positions(torch.tensor([0b110101], dtype=torch.uint8), 4, 2, 3)[0].tolist()
        [0, 2, 1, 2]
    """
    check_packed("list_positions", mask, rows * columns)
    _check_panel("list_positions", panel)
    if not 0 <= kept <= MOST_KEPT:
        raise ValueError(f"list_positions: kept must be in [0, {MOST_KEPT}], got {kept}")
    return torch.ops.paikern.list_positions(mask, kept, rows, columns, panel)


def transpose_positions(
    positions: Tensor, starts: Tensor, rows: int, columns: int, panel: int = 4096
) -> tuple[Tensor, Tensor, Tensor]:
    """The positions of the transposed weight, and where each came from.

    Args:
        positions, starts, rows, columns, panel: of `list_positions`.

    Returns:
        positions and starts of the `[columns, rows]` weight; and source `[kept]`, int32: entry i
        of the transposed weight is entry `source[i]` of the other.

    Raises:
        ValueError: sizes that do not fit, another panel.

    Example:
        >>> import torch
        >>> mask = torch.tensor([0b110101], dtype=torch.uint8)
        >>> positions, starts = list_positions(mask, 4, 2, 3)
        >>> [t.tolist() for t in transpose_positions(positions, starts, 2, 3)]
        [[0, 1, 0, 1], [0, 1, 2, 4], [0, 2, 1, 3]]
    """
    _check_panel("transpose_positions", panel)
    if starts.numel() != rows * panels(columns, panel) + 1:
        raise ValueError(
            f"transpose_positions: starts must hold {rows * panels(columns, panel) + 1} entries "
            f"for [{rows}, {columns}] in panels of {panel}, got {starts.numel()}"
        )
    if torch.compiler.is_compiling():
        return torch.ops.paikern.transpose_positions(positions, starts, rows, columns, panel)
    with outside():  # a weight keeps them for later calls
        return torch.ops.paikern.transpose_positions(positions, starts, rows, columns, panel)


def _check_panel(name: str, panel: int) -> None:
    known = isinstance(panel, (int, torch.SymInt))
    if not known or panel < 1 or panel > COLUMNS or panel & (panel - 1):
        raise ValueError(f"{name}: panel must be a power of two up to {COLUMNS}, got {panel!r}")
