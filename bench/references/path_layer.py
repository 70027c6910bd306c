"""The two sweeps and the score of one linear layer, each as a line of PyTorch.

    forward    |W| x            backward    |W|^T g
    sweep      |W|^T g,  |W| * a * g > threshold  and how many those are

The magnitudes are made anew in every call, as an optimizer or a mask would have changed them.
Source: specification of the path family, section 2.
"""

from __future__ import annotations

from torch import Tensor


def magnitude(weight: Tensor, mask: Tensor | None = None, power: int = 1) -> Tensor:
    """`|W|**power`, times a float mask of the weight's shape and dtype if there is one."""
    positive = weight.abs() if power == 1 else weight.abs().pow_(power)
    return positive if mask is None else positive.mul_(mask)


def forward(weight: Tensor, x: Tensor, mask: Tensor | None = None, power: int = 1) -> Tensor:
    """`[out, in], [in] -> [out]`, in the dtype of the weight."""
    return magnitude(weight, mask, power) @ x.to(weight.dtype)


def backward(weight: Tensor, g: Tensor, mask: Tensor | None = None, power: int = 1) -> Tensor:
    """`[out, in], [out] -> [in]`, in the dtype of the weight."""
    return g.to(weight.dtype) @ magnitude(weight, mask, power)


def sweep(
    weight: Tensor,
    a: Tensor,
    g: Tensor,
    threshold: float,
    mask: Tensor | None = None,
    power: int = 1,
) -> tuple[Tensor, Tensor, int]:
    """The adjoint `[in]`, the bool mask `[out, in]` of the scores above a threshold, its count."""
    positive = magnitude(weight, mask, power)
    score = positive * a.to(weight.dtype)
    kept = score.mul_(g.to(weight.dtype).unsqueeze(1)) > threshold
    return g.to(weight.dtype) @ positive, kept, int(kept.sum())
