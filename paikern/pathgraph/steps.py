"""The linear steps that a path graph is made of, each with its forward map and its adjoint.

A step knows shapes and geometry but no method: it takes path counts that came in, `a`, and
returns those that go out; its adjoint takes the outgoing counts `g` the other way. Power-of-two
exponents are handled by `flow.py`, which is possible because every step is homogeneous: scaling
all inputs by a constant scales the output by it.

Weight steps only describe their operation here; the arithmetic is in `paikern.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = Mapping[str, Tensor]


@dataclass
class Step:
    """One operation of the graph: reads the values `inputs`, writes the value `output`.

    `where` is the module path and `op` the ATen name it came from, for error messages.
    """

    inputs: tuple[int, ...]
    output: int
    where: str
    op: str

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """Incoming counts -> (outgoing counts, what the adjoint needs to remember)."""
        raise TypeError(f"{type(self).__name__} is run by the flow, not by itself")

    def adjoint(self, g: Tensor, saved: Any) -> list[Tensor]:
        """Counts that leave the output -> counts that leave each input."""
        raise TypeError(f"{type(self).__name__} is run by the flow, not by itself")


@dataclass
class Reshape(Step):
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: the same values in another shape."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        return xs[0].reshape(self.out_shape), None

    def adjoint(self, g: Tensor, saved: Any) -> list[Tensor]:
        return [g.reshape(self.in_shape)]


@dataclass
class Permute(Step):
    """permute, transpose, movedim."""

    dims: tuple[int, ...]

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        return xs[0].permute(self.dims), None

    def adjoint(self, g: Tensor, saved: Any) -> list[Tensor]:
        inverse = [0] * len(self.dims)
        for position, dim in enumerate(self.dims):
            inverse[dim] = position
        return [g.permute(inverse)]


@dataclass
class Expand(Step):
    """Broadcasting: one value seen by many; the adjoint adds what the many send back."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        return xs[0].expand(self.out_shape), None

    def adjoint(self, g: Tensor, saved: Any) -> list[Tensor]:
        return [g.sum_to_size(self.in_shape)]


@dataclass
class Slice(Step):
    """slice, select, narrow, chunk, split: a part along one dimension."""

    in_shape: tuple[int, ...]
    dim: int
    start: int
    stop: int
    step: int
    out_shape: tuple[int, ...]

    def _index(self) -> tuple[slice, ...]:
        return (slice(None),) * self.dim + (slice(self.start, self.stop, self.step),)

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        return xs[0][self._index()].reshape(self.out_shape), None

    def adjoint(self, g: Tensor, saved: Any) -> list[Tensor]:
        whole = g.new_zeros(self.in_shape)
        part = whole[self._index()]
        part.copy_(g.reshape(part.shape))
        return [whole]


@dataclass
class Mean(Step):
    """Mean or sum over dimensions; global average pooling is the common case."""

    in_shape: tuple[int, ...]
    dims: tuple[int, ...]
    out_shape: tuple[int, ...]
    average: bool

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        y = xs[0].mean(self.dims) if self.average else xs[0].sum(self.dims)
        return y.reshape(self.out_shape), None

    def adjoint(self, g: Tensor, saved: Any) -> list[Tensor]:
        kept = [1 if d in self.dims else n for d, n in enumerate(self.in_shape)]
        if self.average:
            count = 1
            for d in self.dims:
                count *= self.in_shape[d]
            g = g / count
        return [g.reshape(kept).expand(self.in_shape)]


@dataclass
class MaxPool(Step):
    """Max pooling. The adjoint goes to the first maximum of each window, as in PyTorch."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    spatial: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[self.spatial - 1]
        x = xs[0].reshape(self.in_shape)
        y, indices = pool(
            x,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            return_indices=True,
        )
        return y.reshape(self.out_shape), indices

    def adjoint(self, g: Tensor, saved: Any) -> list[Tensor]:
        indices: Tensor = saved
        lead = self.in_shape[: -self.spatial]
        flat = g.new_zeros((*lead, _numel(self.in_shape[-self.spatial :])))
        windows = (*lead, -1)
        if g.is_cuda:  # scatter_add_ adds by atomics there, in no order; this sorts
            rows = torch.arange(flat[..., 0].numel(), device=g.device).view(*lead, 1)
            at = rows * flat.shape[-1] + indices.reshape(windows)
            flat.view(-1).index_put_((at.flatten(),), g.reshape(-1), accumulate=True)
        else:
            flat.scatter_add_(-1, indices.reshape(windows), g.reshape(windows))
        return [flat.reshape(self.in_shape)]


@dataclass
class Replay(Step):
    """Any other homogeneous operation of one tensor, run as it is.

    Its adjoint comes from autograd on this one operation; no weight takes part, so what is
    recorded has the size of one activation. `keep_input` is for maxima, whose adjoint depends on
    where the maximum was; for a linear operation any input of the same shape will do.
    """

    fn: Callable[[Tensor], Tensor]
    in_shape: tuple[int, ...]
    keep_input: bool

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        return self.fn(xs[0]), xs[0] if self.keep_input else None

    def adjoint(self, g: Tensor, saved: Any) -> list[Tensor]:
        with torch.enable_grad():
            x = saved if saved is not None else g.new_zeros(self.in_shape)
            x = x.detach().requires_grad_()
            (gx,) = torch.autograd.grad(self.fn(x), x, g.contiguous())
        return [gx]


@dataclass
class Scale(Step):
    """Product with something that carries no path, entered by its absolute value.

    `factor` maps the model's state to the tensor. `learned` marks a factor made from parameters
    (LayerScale, a hand-written norm weight): it belongs to the norms, so it is 1 where the method
    takes norms as identity. A constant is replayed in every method. `factor_shape` is the tensor's.
    """

    factor: Callable[[State], Tensor]
    learned: bool
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    factor_shape: tuple[int, ...]


@dataclass
class Norm(Step):
    """BatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm as a module.

    Identity, or the positive scale |weight| (divided by sqrt(var + eps) where running statistics
    exist) along `shape`, which is the broadcast shape of the per-channel vectors.
    """

    shape: tuple[int, ...]
    weight: Callable[[State], Tensor] | None
    bias: Callable[[State], Tensor] | None
    mean: Callable[[State], Tensor] | None
    var: Callable[[State], Tensor] | None
    eps: float


@dataclass
class Rectify(Step):
    """ReLU and its kin: identity on counts, a real threshold only where offsets are kept."""


@dataclass
class Add(Step):
    """Sum of branches (residual adds, gates); inputs are broadcast to `out_shape`."""

    in_shapes: tuple[tuple[int, ...], ...]
    out_shape: tuple[int, ...]

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        y = xs[0] + xs[1]
        for x in xs[2:]:
            y = y + x
        return y, None

    def adjoint(self, g: Tensor, saved: Any) -> list[Tensor]:
        return [g if s == self.out_shape else g.sum_to_size(s) for s in self.in_shapes]


@dataclass
class Cat(Step):
    """Concatenation. A part without a path (a class token) is a block of zeros: input -1."""

    dim: int
    in_shapes: tuple[tuple[int, ...], ...]
    carries: tuple[bool, ...]

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        given = iter(xs)
        parts = [
            next(given) if carries else xs[0].new_zeros(shape)
            for carries, shape in zip(self.carries, self.in_shapes, strict=True)
        ]
        return torch.cat(parts, self.dim), None

    def adjoint(self, g: Tensor, saved: Any) -> list[Tensor]:
        parts = g.split([shape[self.dim] for shape in self.in_shapes], self.dim)
        return [part for part, carries in zip(parts, self.carries, strict=True) if carries]


@dataclass
class Attention(Step):
    """Softmax attention: `out = U v + q + U k`.

    `U[t, s] = visible[t, s] / sum_s visible[t, s]` mixes uniformly over the keys that query t may
    see. Query and key paths of the same head run beside the value path, so that neither their
    matrices nor the gate they form is without paths. Shapes `[..., T, E]`; where E of q and k
    differs from that of v they are averaged over E; grouped keys and values are repeated per head.
    """

    visible: Tensor | None
    out_shape: tuple[int, ...]
    in_shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    _mixer: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    def _mix(self, t: Tensor) -> Tensor:
        queries = self.out_shape[-2]
        if self.visible is None:
            return t.mean(-2, keepdim=True).expand(*t.shape[:-2], queries, t.shape[-1])
        return torch.matmul(self._uniform(t), t)

    def _mix_back(self, g: Tensor, keys: int) -> Tensor:
        if self.visible is None:
            total = g.sum(-2, keepdim=True) / keys
            return total.expand(*g.shape[:-2], keys, g.shape[-1])
        return torch.matmul(self._uniform(g).transpose(-1, -2), g)

    def _uniform(self, like: Tensor) -> Tensor:
        if like.dtype not in self._mixer and self.visible is not None:
            seen = self.visible.to(like.device, like.dtype)
            self._mixer[like.dtype] = seen / seen.sum(-1, keepdim=True).clamp(min=1)
        return self._mixer[like.dtype]

    def _repeat(self, t: Tensor) -> Tensor:
        """Grouped-query attention: `[..., Hk, T, E] -> [..., H, T, E]`."""
        if t.dim() < 3 or t.shape[-3] in (1, self.out_shape[-3]):
            return t
        return t.repeat_interleave(self.out_shape[-3] // t.shape[-3], -3)

    def _fit(self, t: Tensor) -> Tensor:
        width = self.out_shape[-1]
        if t.shape[-1] == width:
            return t
        return t.mean(-1, keepdim=True).expand(*t.shape[:-1], width)

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        q, k, v = xs
        mixed = self._mix(self._repeat(v)) + self._mix(self._fit(self._repeat(k)))
        return (mixed + self._fit(q)).expand(self.out_shape), None

    def adjoint(self, g: Tensor, saved: Any) -> list[Tensor]:
        q_shape, k_shape, v_shape = self.in_shapes
        mixed = self._mix_back(g, v_shape[-2])
        return [
            self._fold(self._narrow(g, q_shape[-1]), q_shape),
            self._fold(self._narrow(mixed, k_shape[-1]), k_shape),
            self._fold(mixed, v_shape),
        ]

    @staticmethod
    def _narrow(g: Tensor, width: int) -> Tensor:
        if g.shape[-1] == width:
            return g
        return (g.sum(-1, keepdim=True) / width).expand(*g.shape[:-1], width)

    @staticmethod
    def _fold(g: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Adjoint of `_repeat` and of broadcasting over leading dimensions."""
        if len(shape) >= 3 and shape[-3] not in (1, g.shape[-3]):
            g = g.unflatten(-3, (shape[-3], -1)).sum(-3)
        return g.sum_to_size(shape)


@dataclass
class Weight(Step):
    """Linear or convolution by a parameter, or by the rows `rows` of one (fused projections).

    `kind` is "linear" or "conv". With `transposed` the stored matrix is used the other way round:
    HF `Conv1D` and `x @ W` (stored `[in, out]`) and transposed convolutions run the adjoint kernel
    forwards. `in_shape` and `out_shape` are those of the activations; `kernel` is the size of a
    convolution's kernel. A "linear" step by a parameter of more dimensions sees it as a matrix,
    `weight.flatten(1)`.
    """

    parameter: str
    kind: str
    transposed: bool
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: Callable[[State], Tensor] | None = None
    kernel: tuple[int, ...] = ()

    @property
    def positions(self) -> int:
        """How many input columns the weight meets: the rank of its score."""
        if self.kind == "linear":
            return _numel(self.in_shape[:-1])
        spatial = len(self.stride)
        mapped = self.in_shape if self.transposed else self.out_shape
        return self.in_shape[0] * _numel(mapped[-spatial:])


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
