"""How large the inputs of every weight are, seen while the model runs.

Products are watched where PyTorch carries them out (matrix products and convolutions of ATen), not
where modules call them: so fused projections, attention modules that call their projections by
function, and layers that are used twice are seen for what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class _Block(NamedTuple):
    """A part of a weight, seen as the matrix `[shape[0], everything else]`.

    `by_rows`: the inputs run along its rows, as in transformers' `Conv1D`.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    by_rows: bool


class InputEnergy(TorchDispatchMode):
    """For each weight the sum of squares of every input that it is multiplied by.

    Args:
        weights: name -> the tensor that the model computes with, at least two dimensions; float64
            weights are summed up in float64, all others in float32.

    Example:
        >>> layer, x = torch.nn.Linear(2, 3), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> with torch.no_grad(), InputEnergy({"w": layer.weight}) as seen:
        ...     _ = layer(x)
        >>> seen.vector("w")
        (tensor([10., 20.]), False)
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._weights = dict(weights)
        self._by_storage: dict[int, list[str]] = {}  # several weights may share one storage
        for name, w in weights.items():
            self._by_storage.setdefault(w.untyped_storage().data_ptr(), []).append(name)
        self._blocks: dict[str, dict[_Block, Tensor]] = {}
        self._taps: dict[str, Tensor] = {}  # of transposed convolutions, `[in, 1, *kernel]`
        # Copies in another dtype, as autocast makes them: the last of each part of a weight, held
        # so that nothing else takes their memory. By storage: the name, and where in the weight.
        self._copies: dict[tuple[str, int], Tensor] = {}
        self._copied: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))  # first, so that it is PyTorch who refuses shapes
        rule = _RULES.get(func)
        if rule is not None:
            rule(self, *args)
        elif func is aten._to_copy.default and isinstance(result, Tensor):
            self._copy(args[0], result)
        return result

    @property
    def seen(self) -> set[str]:
        """The weights that were used."""
        return set(self._blocks) | set(self._taps)

    @property
    def is_zero(self) -> bool:
        """Whether all inputs were 0."""
        sums = [energy for blocks in self._blocks.values() for energy in blocks.values()]
        return not any(bool(energy.any()) for energy in [*sums, *self._taps.values()])

    def non_finite(self) -> str | None:
        """The first of the weights whose sum is NaN or infinite; a single wait for a GPU."""
        sums = [
            (name, energy)
            for name in self._weights
            for energy in [*self._blocks.get(name, {}).values(), *self._of_taps(name)]
        ]
        if not sums:
            return None
        flags = torch.stack([torch.isfinite(energy).all() for _, energy in sums]).tolist()
        return next((n for (n, _), finite in zip(sums, flags, strict=True) if not finite), None)

    def _of_taps(self, name: str) -> list[Tensor]:
        return [self._taps[name]] if name in self._taps else []

    def vector(self, name: str) -> tuple[Tensor, bool] | None:
        """The sums as one vector over the columns of the weight `[shape[0], everything else]`, or
        over its rows where the second value is True; None where rows and columns both matter."""
        blocks, weight = self._blocks.get(name, {}), self._weights[name]
        if len(blocks) != 1 or name in self._taps:
            return None
        (block, energy), *_ = blocks.items()
        rows = weight.shape[0]
        if block[:2] != ((0, rows), (0, weight.numel() // rows)):
            return None
        return energy, block.by_rows

    def dense(self, name: str) -> Tensor:
        """The sums in the shape of the weight; 0 where it was not used."""
        weight = self._weights[name]
        found = torch.zeros(weight.shape, dtype=_wide(weight), device=weight.device)
        matrix = found.view(weight.shape[0], -1)
        for block, energy in self._blocks.get(name, {}).items():
            part = matrix[slice(*block.rows), slice(*block.columns)]
            part += energy[:, None] if block.by_rows else energy
        if name in self._taps:
            found += self._taps[name]
        return found

    # --- what the operations do ------------------------------------------------------------

    def _place(self, operand: Any) -> tuple[str, int] | None:
        """The weight that `operand` is a view of, and where in it the view starts."""
        if not isinstance(operand, Tensor) or operand.is_meta:
            return None
        at, storage = int(operand.storage_offset()), operand.untyped_storage().data_ptr()
        if storage in self._copied:
            name, start = self._copied[storage]
            return name, start + at
        for name in self._by_storage.get(storage, ()):
            first = int(self._weights[name].storage_offset())
            if first <= at < first + self._weights[name].numel():
                return name, at - first
        return None

    def _name(self, operand: Any) -> str | None:
        place = self._place(operand)
        return None if place is None else place[0]

    def _copy(self, operand: Tensor, copy: Tensor) -> None:
        """A copy counts as the weight where its values lie in the same order."""
        place = self._place(operand)
        if place is None or operand.stride() != copy.stride() or not operand.numel():
            return
        if place in self._copies:
            self._copied.pop(self._copies[place].untyped_storage().data_ptr(), None)
        self._copies[place] = copy
        self._copied[copy.untyped_storage().data_ptr()] = place

    def _product(self, a: Tensor, b: Tensor) -> None:
        """`a [..., n, k] @ b [..., k, m]`, or vectors in the place of either."""
        if (name := self._name(b)) is not None and b.dim() >= 2:
            self._add(name, b, b.dim() - 2, _squares(a, -1, self._weights[name]))
        if (name := self._name(a)) is not None and a.dim() >= 2:
            along = -2 if b.dim() >= 2 else -1
            self._add(name, a, a.dim() - 1, _squares(b, along, self._weights[name]))

    def _add(self, name: str, operand: Tensor, inner: int, energy: Tensor) -> None:
        """`energy` belongs to the dimension `inner` of `operand`, a view of the weight."""
        weight = self._weights[name]
        sizes = [n for d, n in enumerate(operand.shape) if d >= operand.dim() - 2]
        strides = operand.stride()[-2:]
        along = inner - operand.dim() + 2
        columns = weight.numel() // weight.shape[0]
        if not weight.is_contiguous():
            return
        place = self._place(operand)
        assert place is not None
        row, column = divmod(place[1], columns)
        k, m = sizes[along], sizes[1 - along]
        by_columns = strides[along] == 1 or (k == 1 and strides[1 - along] == columns)
        if by_columns and (strides[1 - along] == columns or m == 1):
            block = _Block((row, row + m), (column, column + k), False)
        elif strides[along] == columns and (strides[1 - along] == 1 or m == 1):
            block = _Block((row, row + k), (column, column + m), True)
        else:
            return
        self._sum(name, block, energy)

    def _sum(self, name: str, block: _Block, energy: Tensor) -> None:
        held = self._blocks.setdefault(name, {})
        held[block] = held[block] + energy if block in held else energy

    def _convolution(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
    ) -> None:
        name = self._name(w)
        if name is None or w.shape != self._weights[name].shape:
            return
        # How often a kernel position meets an input is the derivative, by a kernel of one channel,
        # of the sum of a convolution: so padding and strides are counted as they are.
        channels = x.shape[1]
        energy = x.to(_wide(w)).square().sum(0, keepdim=True)  # [1, in, *size]
        taps = energy.new_ones((channels, 1, *w.shape[2:]))
        how = (stride, padding, dilation, transposed, output_padding, channels)
        out = aten.convolution(energy, taps, None, *how)
        found = aten.convolution_backward(
            torch.ones_like(out), energy, taps, None, *how, (False, True, False)
        )[1]  # [in, 1, *kernel]
        if transposed:
            self._taps[name] = self._taps[name] + found if name in self._taps else found
            return
        outputs, columns = w.shape[0] // groups, w.numel() // w.shape[0]
        for group, part in enumerate(found.reshape(groups, columns)):
            rows = group * outputs, (group + 1) * outputs
            self._sum(name, _Block(rows, (0, columns), False), part)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _squares(x: Tensor, along: int, weight: Tensor) -> Tensor:
    """Sums of squares over all dimensions but one."""
    others = [d for d in range(x.dim()) if d != along % x.dim()]
    wide = _wide(weight)
    if not others:
        return x.to(wide).square()
    return torch.linalg.vector_norm(x, dim=others, dtype=wide).square()


_Rule = Callable[..., None]
_RULES: dict[Any, _Rule] = {
    aten.mm.default: lambda seen, a, b: seen._product(a, b),
    aten.addmm.default: lambda seen, bias, a, b: seen._product(a, b),
    aten.bmm.default: lambda seen, a, b: seen._product(a, b),
    aten.baddbmm.default: lambda seen, bias, a, b: seen._product(a, b),
    aten.mv.default: lambda seen, a, b: seen._product(a, b),
    aten.addmv.default: lambda seen, bias, a, b: seen._product(a, b),
    aten.convolution.default: InputEnergy._convolution,
}
