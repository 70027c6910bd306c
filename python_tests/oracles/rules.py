"""What single torch functions mean for a path, applied while a model runs its own forward.

A function that is not listed here runs as it is: convolutions, linear layers, adds, concatenations,
views, mean pools and max pools of a network whose values are all >= 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: Activations and dropout: the identity on their first argument.
IDENTITIES = (
    F.relu,
    F.relu_,
    F.relu6,
    F.hardtanh,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.mish,
    F.hardswish,
    F.hardsigmoid,
    F.sigmoid,
    F.tanh,
    F.softplus,
    F.log_softmax,
    F.dropout,
    F.dropout2d,
    torch.relu,
    torch.relu_,
    torch.sigmoid,
    torch.tanh,
    Tensor.relu,
    Tensor.relu_,
    Tensor.sigmoid,
    Tensor.tanh,
)

#: The sign of a path does not count: `-x` in a rotary embedding is `x`.
NEGATIONS = (torch.neg, Tensor.neg, Tensor.__neg__)

PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__)

#: Values this close (relative) tie in a max pool: float64 sums of more than 2**53 paths differ by
#: rounding between positions that have the same number of paths.
TIE = 1e-10


class PathSemantics(TorchFunctionMode):
    """Inside this mode norms, activations, attention, gates and embeddings follow the path rules.

    `norm` is "identity", or "scale": a positive factor a channel, |gamma| / sqrt(|var| + eps) for
    BatchNorm and |gamma| for the others, raised to `exponent` like the weights; no centering and
    no offset. `network_input` tells token embeddings from position embeddings.
    """

    def __init__(self, norm: str, network_input: Tensor, exponent: int) -> None:
        super().__init__()
        if norm not in ("identity", "scale"):
            raise ValueError(f"norm must be 'identity' or 'scale', got {norm!r}")
        self.norm = norm
        self.exponent = exponent
        self.input_storage = network_input.untyped_storage().data_ptr()
        self.rules: dict[Any, Callable[..., Any]] = dict.fromkeys(IDENTITIES, _identity)
        self.rules |= dict.fromkeys(NEGATIONS, _negation)
        self.rules |= dict.fromkeys(PRODUCTS, _product)
        self.rules |= {
            F.batch_norm: self._batch_norm,
            F.layer_norm: self._last_dim_norm,
            F.rms_norm: self._last_dim_norm,
            F.group_norm: self._group_norm,
            F.embedding: self._embedding,
            F.scaled_dot_product_attention: scaled_dot_product_attention,
            F.multi_head_attention_forward: multi_head_attention,
            torch.max_pool2d: max_pool2d,
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.rules.get(func, func)(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if self.norm == "identity" or running_var is None:
            return x
        scale = (running_var.abs() + eps).rsqrt()  # [C]
        return _per_channel(x, (scale if weight is None else weight.abs() * scale) ** self.exponent)

    def _group_norm(self, x: Tensor, groups: int, weight: Tensor | None = None, *_: Any) -> Tensor:
        return (
            x
            if self.norm == "identity" or weight is None
            else _per_channel(x, weight.abs() ** self.exponent)
        )

    def _last_dim_norm(
        self, x: Tensor, shape: Any, weight: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        return x if self.norm == "identity" or weight is None else x * weight.abs() ** self.exponent

    def _embedding(self, tokens: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        """`[*tokens.shape, dim]`: ones for the model's input, no paths for positions."""
        size = (*tokens.shape, weight.shape[1])
        if tokens.untyped_storage().data_ptr() == self.input_storage:
            return torch.ones(size, dtype=weight.dtype)
        return torch.zeros(size, dtype=weight.dtype)


def _per_channel(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale.view(-1, *(1,) * (x.dim() - 2))


def _identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _has_paths(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _negation(x: Tensor) -> Tensor:
    return x if x.requires_grad else -x


def _product(x: Any, y: Any, **_: Any) -> Tensor:
    """A gate adds the paths of both sides; a factor without paths scales by its magnitude."""
    if _has_paths(x) and _has_paths(y):
        return x + y
    if _has_paths(x) or _has_paths(y):
        return abs(x) * y if _has_paths(y) else x * abs(y)
    return x * y


def _uniform(queries: int, keys: int, causal: bool) -> Tensor:
    """Attention weights `[queries, keys]`: the mean over the keys that a query may see."""
    seen = torch.ones(queries, keys, dtype=torch.float64)
    if causal:
        seen = seen.tril()
    return seen / seen.sum(dim=1, keepdim=True)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`mix(value) + query + mix(key)`, mix = mean over the visible keys; `[..., T, d]`."""
    if attn_mask is not None:
        seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask >= 0
        mix = seen.double() / seen.double().sum(dim=-1, keepdim=True).clamp(min=1)
    else:
        mix = _uniform(query.shape[-2], key.shape[-2], is_causal)
    if key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (part.repeat_interleave(repeats, dim=-3) for part in (key, value))
    return mix @ value + query + mix @ key


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`nn.MultiheadAttention` with one packed projection; inputs are `[T, B, dim]`.

    The head split does not matter here: keys are mixed alike in every head.
    """
    wq, wk, wv = in_proj_weight.chunk(3)
    mix = _uniform(query.shape[0], key.shape[0], causal=False)
    values = torch.einsum("ts,sbd->tbd", mix, value @ wv.T)
    keys = torch.einsum("ts,sbd->tbd", mix, key @ wk.T)
    return (values + query @ wq.T + keys) @ out_proj_weight.T, None


def max_pool2d(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    **_: Any,
) -> Tensor:
    """Max pool whose gradient goes to the first position, row-major, that ties for the maximum."""
    if ceil_mode or dilation not in (1, (1, 1), [1, 1]):
        raise ValueError("max_pool2d oracle: ceil_mode and dilation are not covered")
    (kh, kw), (ph, pw) = _pair(kernel_size), _pair(padding)
    sh, sw = _pair(stride) if stride is not None else (kh, kw)
    x = F.pad(x, (pw, pw, ph, ph), value=-float("inf"))
    windows = x.unfold(2, kh, sh).unfold(3, kw, sw).flatten(4)  # [N, C, H', W', kh * kw]
    largest = windows.detach().amax(dim=-1, keepdim=True)
    first = (windows.detach() >= largest * (1.0 - TIE)).int().argmax(dim=-1, keepdim=True)
    return windows.gather(-1, first).squeeze(-1)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
