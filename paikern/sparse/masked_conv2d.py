"""MaskedConv2d: a convolution of which only the kept weights are stored."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from paikern.ops.masked_conv2d import masked_conv2d
from paikern.sparse.masked_module import MaskedModule, carry_over, pack_weight_of
from paikern.sparse.packed_weight import PackedWeight


class MaskedConv2d(MaskedModule):
    """`nn.Conv2d` with a packed weight, see `pk.ops.masked_conv2d`.

    Attributes:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as
            of `nn.Conv2d`.
        weight: the `PackedWeight` `[out, in / groups, height, width]`.
        bias: Parameter `[out]`, or None.

    Example:
        >>> import torch
        >>> dense = nn.Conv2d(4, 6, 3, padding="same", groups=2)
        >>> layer = MaskedConv2d.from_conv(dense, torch.rand(6, 2, 3, 3) < 0.2)
        >>> layer(torch.ones(1, 4, 8, 9)).shape
        torch.Size([1, 6, 8, 9])
    """

    def __init__(self, conv: nn.Conv2d, weight: PackedWeight) -> None:
        """`from_conv` is the usual way; this one takes a weight that is packed already.

        Raises:
            ValueError: a weight of another shape than that of `conv`. TypeError: no convolution, or
            a weight that is not packed.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"MaskedConv2d: conv must be an nn.Conv2d, got {type(conv).__name__}")
        super().__init__(weight, conv.bias)
        shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"MaskedConv2d: the convolution needs a weight of shape {shape}, got "
                f"{tuple(weight.shape)}"
            )
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self.dilation, self.groups = conv.dilation, conv.groups
        self._amount, self._around = _paddings(conv)
        self._remember(conv)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, mask: Tensor | None = None, *, weight: PackedWeight | None = None
    ) -> MaskedConv2d:
        """Pack the weight of `conv`, which is left as it is; the bias is shared.

        Args:
            conv: the dense layer.
            mask: bool of the shape of its weight, or its packed bits.
            weight: its packed weight, if it exists already (a tied one, for instance).

        Raises:
            ValueError, TypeError: as `PackedWeight.from_dense`.
        """
        return carry_over(conv, cls(conv, pack_weight_of(conv, mask, weight)))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, in, height, width]` or `[in, height, width]`, as `nn.Conv2d`."""
        if self._around is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = functional.pad(x, self._around, mode=mode)
        return masked_conv2d(
            x,
            self.weight,
            self.bias,
            kernel=self.kernel_size,
            stride=self.stride,
            padding=self._amount,
            dilation=self.dilation,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        for name, usual in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
            if getattr(self, name) != usual:
                text += f", {name}={getattr(self, name)}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return f"{text}, {super().extra_repr()}"


def _paddings(conv: nn.Conv2d) -> tuple[tuple[int, int], list[int] | None]:
    """What the operation pads, and what `functional.pad` has to put around x before it.

    The operation pads zeros, as many on either side. "same" may need one more behind than before,
    as for an even kernel.
    """
    before, after = [0, 0], [0, 0]
    for axis in range(2):
        if conv.padding == "same":
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            before[axis], after[axis] = total // 2, total - total // 2
        elif not isinstance(conv.padding, str):
            before[axis] = after[axis] = conv.padding[axis]
    if conv.padding_mode == "zeros" and before == after:
        return (before[0], before[1]), None
    return (0, 0), [before[1], after[1], before[0], after[0]]
