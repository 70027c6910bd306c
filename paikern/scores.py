"""`Scores`: what a method thinks of every prunable weight, dense, factored or a product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paikern import ops
from paikern.ops.topk_mask_factored import Conv
from paikern.pattern import Layout


@dataclass(frozen=True)
class Dense:
    """A score per weight: `values * 2**exponent`, or its magnitude with `absolute`.

    `values` has the shape of the parameter, any float dtype. Higher is kept; selection breaks ties
    towards the lower index and refuses NaN. With an exponent the scores are at least 0; a negative
    one marks a weight that ranks below all that are not.

    Example:
        >>> import torch, paikern as pk
        >>> score = pk.Dense(torch.tensor([1.0, -3.0]), absolute=True)
        >>> pk.select(pk.Scores({"w": score}, {"w": (2,)}), sparsity=0.5)["w"]
        tensor([False,  True])
    """

    values: Tensor
    exponent: int = 0
    absolute: bool = False


@dataclass(frozen=True)
class Factored:
    """A score that never has to exist: `|weight|**power * (g^T a) * 2**exponent`.

    With vectors `a [in]` and `g [out]` it is rank one, `|weight|**power * a[i] * g[o]`; with maps
    `[batch, in]` and `[batch, out]` a sum of those; with `conv` = (stride, padding, dilation,
    groups) and maps `[batch, in, *size]`, `[batch, out, *size']` the weight gradient of that
    convolution. `weight` is `[out, in]` or `[out, in / groups, *kernel]` (views allowed), float32,
    float16 or bfloat16; the kernel of a convolution whose maps are constant over space enters as
    `[out, in * taps]`, with vectors. `a` and `g` are float32 and at least 0; `power` is 1 or 2.
    `mask` packs the
    weights that may still be kept, or is None for all of them. Ties and NaN as in `Dense`.

    Source: SynFlow, Tanaka et al. 2020 (arXiv:2006.05467), equation 2.

    Example:
        >>> import torch, paikern as pk
        >>> w, a, g = torch.tensor([[1.0, -3.0]]), torch.tensor([2.0, 1.0]), torch.tensor([4.0])
        >>> pk.Factored(w, 1, a, g).dense().values
        tensor([[ 8., 12.]])
    """

    weight: Tensor
    power: int
    a: Tensor
    g: Tensor
    exponent: int = 0
    mask: Tensor | None = None
    conv: Conv | None = None

    def dense(self, pruned: float = 0.0) -> Dense:
        """The score tensor, float32 of the weight's shape; `pruned` where the mask is 0."""
        w, a, g, power, mask = self.weight, self.a, self.g, self.power, self.mask
        if self.conv is None:
            values = ops.path_score(w, a, g, power=power, mask=mask, pruned=pruned)
        else:
            values = ops.path_conv_score(w, a, g, *self.conv, power=power, mask=mask, pruned=pruned)
        return Dense(values, self.exponent)


@dataclass(frozen=True)
class Product:
    """`|weight * gradient|`, which never has to exist either.

    `gradient` has the shape of `weight`, any float dtypes; the product is taken in float32. `mask`
    as in `Factored`. Ties and NaN as in `Dense`.

    Source: SNIP, Lee et al. 2019 (arXiv:1810.02340), equation 6.

    Example:
        >>> import torch, paikern as pk
        >>> pk.Product(torch.tensor([2.0, -3.0]), torch.tensor([-1.0, 0.5])).dense().values
        tensor([2.0000, 1.5000])
    """

    weight: Tensor
    gradient: Tensor
    mask: Tensor | None = None
    exponent: int = 0

    def dense(self, pruned: float = 0.0) -> Dense:
        """The score tensor; `pruned` where the mask is 0."""
        wide = torch.float64 if self.gradient.dtype == torch.float64 else torch.float32
        values = self.weight.to(wide) * self.gradient.to(wide)
        values.abs_()
        if self.mask is not None:
            kept = ops.unpack_mask(self.mask.to(values.device), tuple(values.shape))
            values.masked_fill_(~kept, pruned)
        return Dense(values)


Score = Dense | Factored | Product


class Scores(Mapping[str, Score]):
    """Parameter name -> score, in parameter order.

    Args:
        entries: the scores.
        shapes: parameter name -> shape of the parameter that the score belongs to.
        layouts: parameter name -> which of its dimensions are inputs, for structured patterns;
            where there is none, `[out, in, *kernel]`.

    Scores of different layers are comparable once their exponents are applied; selection does
    that exactly. `dense(name)` gives one layer in the shape of its parameter.

    Example:
        >>> import torch
        >>> s = Scores({"w": Dense(torch.tensor([[1.0, 2.0]]), exponent=3)}, {"w": (1, 2)})
        >>> s.dense("w")
        tensor([[ 8., 16.]])
    """

    def __init__(
        self,
        entries: Mapping[str, Score],
        shapes: Mapping[str, tuple[int, ...]],
        layouts: Mapping[str, Layout] | None = None,
    ) -> None:
        self._entries = dict(entries)
        self.shapes = {name: tuple(shapes[name]) for name in self._entries}
        self.layouts = {name: (layouts or {}).get(name, Layout()) for name in self._entries}

    def __getitem__(self, name: str) -> Score:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{n}: {type(s).__name__}" for n, s in self._entries.items())
        return f"Scores({kinds})"

    def with_layouts(self, layouts: Mapping[str, Layout]) -> Scores:
        """The same scores with these layouts."""
        return Scores(self._entries, self.shapes, layouts)

    def only(self, name: str) -> Scores:
        """The scores of one parameter."""
        return Scores({name: self._entries[name]}, self.shapes, self.layouts)

    @property
    def total(self) -> int:
        """Number of scored weights."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @property
    def exponent(self) -> int:
        """The largest exponent of all layers."""
        return max((score.exponent for score in self._entries.values()), default=0)

    def dense(
        self, name: str, dtype: torch.dtype = torch.float32, *, relative_to: int = 0
    ) -> Tensor:
        """The scores of one parameter, divided by `2**relative_to`.

        Scores beyond the range of `dtype` become infinite or 0: path scores of deep networks pass
        that of float32. Relative to `exponent` nothing that could be kept is lost.
        """
        score = self._entries[name]
        entry = score if isinstance(score, Dense) else score.dense()
        values = entry.values.abs() if entry.absolute else entry.values
        rest = entry.exponent - relative_to
        if rest:
            values = values.double()
        while rest:  # in parts: 0 times a power that overflows would be NaN
            part = max(-1000, min(1000, rest))
            values, rest = values * 2.0**part, rest - part
        return values.to(dtype).reshape(self.shapes[name])
