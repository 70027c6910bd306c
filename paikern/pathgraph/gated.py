"""Two networks on samples: f, the model itself, and g, which counts the paths that f leaves open.

    f: the model in eval mode with weights theta * M; every ReLU notes where its output is positive
    g: the same program with input x**2, weights M, no bias, norms left out, means and max pools as
       they are, and the gates of f in place of the ReLUs

Both run the model's own forward on a copy of its modules: parameters that are not pruned are
shared and never written, theta * M is held by the copy. A function mode sees every call, so
functional code and modules are treated alike. This is the general way; `paikern.backends.cpu_gated`
runs the same two networks several times faster where a path graph says all there is to know.

Numbers: counts pass float32 (ResNet-20 reaches 9e50), so a tensor of g has one power-of-two
exponent, an attribute that also marks what carries paths. Where tensors meet, the one with the
smaller exponent is shifted. Source: PX, equations 6 to 9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from paikern import ops
from paikern._copying import copied
from paikern.errors import NonFiniteScoreError, PaikernError

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6}
_POOLS = {F.max_pool1d: F.max_pool1d_with_indices, F.max_pool2d: F.max_pool2d_with_indices,
          F.max_pool3d: F.max_pool3d_with_indices}  # fmt: skip
_NORMS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm, torch.batch_norm}
_CONVS = {torch.conv1d, torch.conv2d, torch.conv3d}
_TRANSPOSED = {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_SUMS = frozenset("add add_ __add__ __radd__ __iadd__ sub sub_ __sub__ __rsub__ __isub__".split())
_SCALES = frozenset(
    "mul mul_ __mul__ __rmul__ __imul__ div div_ __truediv__ __itruediv__ true_divide".split()
)
# Everything else that may meet a count: it moves counts, adds them or takes their maximum.
_PLAIN = frozenset(
    "view reshape flatten unflatten squeeze unsqueeze permute transpose swapaxes movedim t expand "
    "expand_as view_as reshape_as contiguous clone detach to float type_as cat concat concatenate "
    "stack chunk split unbind tensor_split narrow select index_select __getitem__ mean sum amax "
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d interpolate upsample pad pixel_shuffle pixel_unshuffle channel_shuffle "
    "native_channel_shuffle unfold fold roll flip repeat repeat_interleave tile dropout dropout1d "
    "dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout".split()
)
_TOP = 2.0**40  # far from the ends of float32 even after a sum over 2**60 terms


class GatedModel:
    """f and g of one model; `load` takes the masks of a round, `totals` a batch.

    Args:
        model: any module; never written to.
        names: prunable weight -> its name in `model.named_parameters()`.
        pool_gate: max pools of g take the position of f's maximum instead of their own.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, str], pool_gate: bool = False) -> None:
        held = dict(model.named_parameters())
        self._weights = {}
        memo: dict[int, Any] = {id(p): p for p in model.parameters()}
        for name, source in names.items():
            own = nn.Parameter(torch.empty_like(held[source]), requires_grad=False)
            memo[id(held[source])] = self._weights[name] = own
        self._names = {id(own): name for name, own in self._weights.items()}
        self._model = copied(model, memo).eval()
        self._pool_gate = pool_gate
        self._ones: dict[str, Tensor] = {}
        self._where: list[str] = []
        for name, module in self._model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._where.append(name))
            module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _leave(self) -> None:
        self._where.pop()

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Take theta and M of one round; a weight that `masks` does not name is dense."""
        self._ones = {}
        for name, own in self._weights.items():
            own.copy_(state[name])
            if name in masks:
                kept = ops.unpack_mask(masks[name], own.shape).to(own.device)
                own.masked_fill_(~kept, 0)
                self._ones[name] = kept.to(own.dtype)

    @torch.no_grad()
    def totals(self, x: Tensor) -> list[tuple[Tensor, int]]:
        """`sum_n g(x_n**2)` of each output, `[1, ...]` in float64 with an exponent."""
        self._where.clear()
        gates = _Gates(self._pool_gate)
        with gates:
            self._model(x)
        square = x * x
        paths = _Paths(self, gates.found, square)
        with paths:
            output = self._model(square)
        if missed := [name for name in self._ones if name not in paths.used]:
            raise PaikernError(
                f"px: {missed[0]} is not used as the weight of a Linear, a convolution or a matrix "
                "product; leave it out with ignore="
            )
        found = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        found = [t for t in found if _exponent(t) is not None]
        for t in found:
            if t.dim() == 0 or len(t) != len(x):
                raise PaikernError(
                    f"px: an output of shape {tuple(t.shape)} for {len(x)} samples has no row for "
                    "each sample; return [n, ...] from the model"
                )
        return [(t.double().sum(0, keepdim=True), _exponent(t) or 0) for t in found]

    @torch.no_grad()
    def output(self, x: Tensor) -> Tensor | None:
        """f(x), for a model that returns one tensor."""
        found: Any = self._model(x)
        return found if isinstance(found, Tensor) else None

    @property
    def where(self) -> str:
        return repr(self._where[-1]) if self._where and self._where[-1] else "the model's forward"

    def ones(self, weight: Tensor, used: set[str]) -> Tensor:
        """The mask of a weight as numbers, ones where there is none."""
        name = self._names.get(id(weight))
        if name is not None:
            used.add(name)
        mask = None if name is None else self._ones.get(name)
        return torch.ones_like(weight) if mask is None else mask


class _Gates(TorchFunctionMode):
    """f: what its ReLUs let through, and where its max pools looked, in order."""

    def __init__(self, pool_gate: bool) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self._pool_gate = pool_gate

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._pool_gate and func in _POOLS:
            y, indices = _POOLS[func](*args, **_without_indices(kwargs))
            self.found.append(indices)
            return y
        y = func(*args, **kwargs)
        if _is_relu(func, args, kwargs):
            self.found.append(y > 0)  # a copy: the output may be written to later
        return y


class _Paths(TorchFunctionMode):
    """g: the meaning of every call for the counts that flow through it."""

    def __init__(self, owner: GatedModel, gates: list[Tensor], start: Tensor) -> None:
        super().__init__()
        self.used: set[str] = set()
        self._owner = owner
        self._gates = iter(gates)
        _mark(start, 0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        paths = [t for t in leaves if isinstance(t, Tensor) and _exponent(t) is not None]
        if not paths:
            return func(*args, **kwargs)
        if _is_relu(func, args, kwargs):
            return self._gated(args[0] if args else kwargs["input"])
        if func in _NORMS or func is nn.Identity.forward:
            return args[0]
        if func is F.linear or func in _CONVS or func in _TRANSPOSED or func in _PRODUCTS:
            return self._weighted(func, *args, **kwargs)
        if func is torch.addmm:
            return self._weighted(torch.matmul, args[1], args[2])
        if self._owner._pool_gate and func in _POOLS:
            return self._pooled(args[0])
        return self._plain(func, args, kwargs, paths)

    def _gated(self, x: Tensor) -> Tensor:
        gate = self._next(x.shape)
        return _mark(x * gate, _exponent(x) or 0)

    def _next(self, shape: torch.Size) -> Tensor:
        gate = next(self._gates, None)
        if gate is None or gate.shape != shape:
            raise PaikernError(
                f"px: the activation in {self._owner.where} ran in another order on x**2 than on "
                "x; the model's forward must not depend on the values of its input"
            )
        return gate

    def _pooled(self, x: Tensor) -> Tensor:
        indices = next(self._gates)
        spatial = x.flatten(x.dim() - indices.dim() + 2) if indices.dim() > 2 else x
        lead = indices.shape[:2]
        y = spatial.reshape(*lead, -1).gather(-1, indices.reshape(*lead, -1))
        return _mark(y.reshape(indices.shape), _exponent(x) or 0)

    def _weighted(
        self, func: Callable[..., Tensor], input: Tensor, weight: Tensor | None = None,
        bias: Tensor | None = None, *args: Any, other: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        weight = other if weight is None else weight
        exponent = _exponent(input)
        if exponent is None or weight is None or _exponent(weight) is not None:
            raise PaikernError(
                f"px: the product of two activations in {self._owner.where} has no gates; px is "
                "defined for networks of Linear, convolution, norm, ReLU and pooling layers"
            )
        ones = self._owner.ones(weight, self.used)
        if func is F.linear or func in _CONVS or func in _TRANSPOSED:
            y = func(input, ones, None, *args, **kwargs)
        else:
            y = func(input, ones)
        top = float(y.max()) if y.numel() else 0.0
        if not math.isfinite(top):
            raise NonFiniteScoreError(
                f"px: path counts overflow in {self._owner.where}: the data are too large; "
                "normalise them"
            )
        if top > _TOP or 0.0 < top < 1 / _TOP:
            shift = math.frexp(top)[1] - 1
            y.mul_(2.0**-shift)
            exponent += shift
        return _mark(y, exponent)

    def _plain(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], paths: list[Tensor]
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _SUMS or name in _SCALES:
            return self._binary(name, func, args, kwargs, paths)
        top = max(_exponent(t) or 0 for t in paths)
        if len(paths) > 1:
            args, kwargs = pytree.tree_map_only(
                Tensor, lambda t: _shifted(t, top), (args, kwargs)
            )  # fmt: skip
        result = func(*args, **kwargs)
        tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        if tensors and name not in _PLAIN:
            raise PaikernError(
                f"px: {name.strip('_')} in {self._owner.where} has no ReLU-like gate; replace the "
                "activation by nn.ReLU, or use synflow_l2, which ignores activations"
            )
        for t in tensors:
            _mark(t, top)
        return result

    def _binary(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
        paths: list[Tensor],
    ) -> Tensor:  # fmt: skip
        """Branches are added, whatever their sign; what carries no path adds none."""
        u, v = args[0], args[1] if len(args) > 1 else kwargs["other"]
        if len(paths) > 1:
            if name in _SCALES:
                raise PaikernError(
                    f"px: the product of two activations in {self._owner.where} has no ReLU-like "
                    "gate; use synflow_l2, which adds the paths of both"
                )
            top = max(_exponent(t) or 0 for t in paths)
            return _mark(_shifted(u, top) + _shifted(v, top), top)
        x, other = (u, v) if isinstance(u, Tensor) and _exponent(u) is not None else (v, u)
        exponent = _exponent(x) or 0
        shape = torch.broadcast_shapes(x.shape, other.shape if isinstance(other, Tensor) else ())
        if name in _SUMS or isinstance(other, nn.Parameter):  # a learned scale belongs to the norms
            return _mark(x.expand(shape), exponent)
        factor = abs(other)
        divides = "div" in name
        return _mark(x / factor if divides else x * factor, exponent)


def _is_relu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func is F.hardtanh:  # how nn.ReLU6 is written
        return bool((args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)) == 0)
    return func in _RELUS


def _mark(t: Tensor, exponent: int) -> Tensor:
    t._paikern_exponent = exponent  # type: ignore[attr-defined]
    return t


def _exponent(t: Tensor) -> int | None:
    return getattr(t, "_paikern_exponent", None)


def _shifted(t: Tensor, top: int) -> Tensor:
    """The values of `t` under the exponent `top`; a tensor without paths as it is."""
    exponent = _exponent(t)
    if exponent is None or exponent == top:
        return t
    return t * 2.0 ** max(-1000, exponent - top)


def _without_indices(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "return_indices"}
