"""MaskedLinear and MaskedConv1D: linear layers of which only the kept weights are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paikern.ops._packed import check_dtype, check_given, check_values
from paikern.ops._path import nothing_intercepts, run
from paikern.ops.masked_linear import masked_linear
from paikern.sparse.masked_module import (
    MaskedModule,
    carry_over,
    cast_for_autocast,
    pack_weight_of,
)
from paikern.sparse.packed_weight import PackedWeight

_PLAIN = (Tensor, nn.Parameter)


class MaskedLinear(MaskedModule):
    """`nn.Linear` with a packed weight: `x (W * M)^T + b`, see `pk.ops.masked_linear`.

    Attributes:
        in_features, out_features: as of `nn.Linear`.
        weight: the `PackedWeight` `[out_features, in_features]`; `weight.values` is the parameter.
        bias: Parameter `[out_features]`, or None.

    Example:
        >>> dense = nn.Linear(3, 2)
        >>> layer = MaskedLinear.from_linear(dense, torch.tensor([[1, 0, 1], [0, 0, 1]]).bool())
        >>> layer
        MaskedLinear(
          in_features=3, out_features=2, bias=True, nnz=3 of 6 (50.00%), 30 bytes
          (weight): PackedWeight([2, 3], nnz=3 (50.0%), index, torch.float32)
        )
        >>> list(layer.state_dict())
        ['bias', 'weight.values', 'weight.mask']
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        if len(weight.shape) != 2:
            raise ValueError(f"MaskedLinear: weight must be [out, in], got {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        self._dense = (nn.Linear, sizes)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mask: Tensor | None = None, *, weight: PackedWeight | None = None
    ) -> MaskedLinear:
        """Pack the weight of `linear`, which is left as it is; the bias is shared.

        Args:
            linear: the dense layer.
            mask: bool `[out, in]` or its packed bits; what is pruned is never looked at.
            weight: its packed weight, if it exists already (a tied one, for instance).

        Raises:
            ValueError, TypeError: as `PackedWeight.from_dense`.
        """
        layer = cls(pack_weight_of(linear, mask, weight), linear.bias)
        layer._remember(linear)
        return carry_over(linear, layer)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        return masked_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {super().extra_repr()}"


class MaskedConv1D(MaskedModule):
    """transformers' `Conv1D` with a packed weight: `x (W * M) + b` with W `[in, out]`.

    The weight is packed as it lies; what multiplies x are its transposed positions, which exist for
    the gradient of every other layer.

    Attributes:
        nx, nf: input and output features, as transformers names them.
        weight: the `PackedWeight` `[nx, nf]`.
        bias: Parameter `[nf]`, or None.

    Example:
        >>> from paikern.zoo.gpt2 import Conv1D
        >>> dense = Conv1D(3, 2)
        >>> layer = MaskedConv1D.from_conv1d(dense, torch.tensor([[1, 0], [0, 1], [0, 0]]).bool())
        >>> layer(torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias, outputs=-1)
        if len(weight.shape) != 2:
            raise ValueError(f"MaskedConv1D: weight must be [in, out], got {tuple(weight.shape)}")
        self.nx, self.nf = weight.shape

    @classmethod
    def from_conv1d(
        cls, layer: nn.Module, mask: Tensor | None = None, *, weight: PackedWeight | None = None
    ) -> MaskedConv1D:
        """Pack the weight of a `Conv1D`, which is left as it is; the bias is shared."""
        bias = layer.bias
        assert bias is None or isinstance(bias, Tensor)
        packed = cls(pack_weight_of(layer, mask, weight), bias)
        packed._remember(layer)
        return carry_over(layer, packed)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., nx]` -> `[..., nf]`."""
        weight = self.weight
        fix = "make one with PackedWeight.from_dense(weight, mask)"
        values = check_given("MaskedConv1D", x, weight, self.bias, fix)
        x, values, bias = cast_for_autocast(x, values, self.bias)
        check_dtype("MaskedConv1D", values)
        if x.dim() == 0 or x.shape[-1] != self.nx:
            raise ValueError(
                f"MaskedConv1D: x must be [..., {self.nx}] for a weight of shape "
                f"{(self.nx, self.nf)}, got {tuple(x.shape)}"
            )
        if x.dtype != values.dtype:
            raise TypeError(
                f"MaskedConv1D: x is {x.dtype} and the weight {values.dtype}; convert one of "
                "them or use torch.autocast"
            )
        if x.device != values.device:
            raise ValueError(
                f"MaskedConv1D: x is on {x.device} and the weight on {values.device}; move them "
                "to one device"
            )
        where = weight.where(transposed=True)
        check_values("MaskedConv1D", values, where)
        y = _product(x, values, where)
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        return f"nx={self.nx}, nf={self.nf}, {super().extra_repr()}"


def _product(x: Tensor, values: Tensor, where: tuple[Any, ...]) -> Tensor:
    recorded = torch.is_grad_enabled() and (x.requires_grad or values.requires_grad)
    plain = x.is_cpu and type(x) in _PLAIN and type(values) in _PLAIN
    if recorded and plain and nothing_intercepts():
        y: Tensor = _Eager.apply(x, values, where)
        return y
    product: Tensor = run("masked_linear_input", x, values, *where, differentiable=True)
    return product


class _Eager(torch.autograd.Function):
    """The derivative of the operation without its way through the dispatcher, as `masked_linear`
    does it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, where: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.where = where
        y: Tensor = run("masked_linear_input", x, values, *where)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (g,), (x, values), where = gradients, ctx.saved_tensors, ctx.where
        by_x, by_values = ctx.needs_input_grad[:2]
        return (
            run("masked_linear", g, values, None, *where, differentiable=True) if by_x else None,
            run("masked_linear_kept", x, g, *where, differentiable=True) if by_values else None,
            None,
        )
