"""What the layers with a packed weight share: their parameters, state dicts, the way back."""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from paikern.sparse.in_models import pack_keys
from paikern.sparse.packed_weight import PackedWeight

_Module = TypeVar("_Module", bound=nn.Module)

# What `nn.Module.__init__` makes, and no dense layer brings along: modules, parameters, hooks.
_INTERNALS = frozenset(nn.Module().__dict__)
# Hooks that users register on a layer go with it; handles keep the dictionaries, so these move.
# `hand_over` moves those that run before a state dict is loaded.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class MaskedModule(nn.Module):
    """A layer whose weight is a `PackedWeight`.

    State dicts hold `weight.values`, `weight.mask` and `bias`; within `dense_keys` they hold
    `weight` as the dense layer does. `load_state_dict` takes either; what a dense weight holds
    where nothing is kept is dropped.
    """

    weight: PackedWeight
    bias: nn.Parameter | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None, outputs: int = 0) -> None:
        """`outputs` is the axis of the weight along which the bias lies."""
        super().__init__()
        name = type(self).__name__
        if not isinstance(weight, PackedWeight):
            raise TypeError(
                f"{name}: weight must be a PackedWeight, got {type(weight).__name__}; make one "
                "with PackedWeight.from_dense(weight, mask)"
            )
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(f"{name}: bias must be a tensor or None, got {type(bias).__name__}")
        if bias is not None and tuple(bias.shape) != (weight.shape[outputs],):
            raise ValueError(
                f"{name}: bias must be [{weight.shape[outputs]}] for a weight of shape "
                f"{tuple(weight.shape)}, got {tuple(bias.shape)}"
            )
        self.weight = weight
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)
        self._dense: tuple[type[nn.Module], dict[str, Any]] | None = None

    def extra_repr(self) -> str:
        weight = self.weight
        held = "on the meta device" if weight.values.is_meta else f"{weight.nbytes:,} bytes"
        return (
            f"bias={self.bias is not None}, nnz={weight.nnz:,} of {weight.shape.numel():,} "
            f"({weight.density:.2%}), {held}"
        )

    def to_dense(self, weight: nn.Parameter | None = None) -> nn.Module:
        """The layer that this one was made from, its weight dense with zeros, its bias shared.

        Args:
            weight: the dense weight, if it exists already (a tied one).

        Raises:
            ValueError: a `MaskedConv1D` that was made from a packed weight alone.
        """
        if self._dense is None:
            name = type(self).__name__
            raise ValueError(
                f"{name}.to_dense: no dense layer is known for one made from a PackedWeight alone; "
                f"make it with {name}.from_conv1d(layer, weight=packed)"
            )
        cls, attributes = self._dense
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.__dict__.update(attributes)
        if weight is None:
            trained = self.weight.values.requires_grad
            weight = nn.Parameter(self.weight.to_dense().detach(), requires_grad=trained)
        layer.register_parameter("weight", weight)
        layer.register_parameter("bias", self.bias)
        return carry_over(self, layer)

    def _remember(self, layer: nn.Module) -> None:
        """The class and the plain attributes of `layer`, for `to_dense`."""
        plain = {k: v for k, v in layer.__dict__.items() if k not in _INTERNALS}
        self._dense = (type(layer), plain)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        # `state_dict` is a copy of which the modules inside get their part next. Hooks have run
        # by now: a dense weight may have its key from one of them.
        key = prefix + "weight"
        if key in state_dict:
            unexpected_keys[:] = [name for name in unexpected_keys if name != key]
            dense = state_dict.pop(key)
            try:
                packed = pack_keys(self.weight, {"weight": dense})
            except ValueError as error:
                if self.weight.positions.is_meta or not isinstance(dense, Tensor):
                    error_msgs.append(f"{key}: {error}")
                    return
                own = tuple(self.weight.shape)
                error_msgs.append(f"{key}: {tuple(dense.shape)} in the state dict, {own} here")
                packed = self.weight.state_dict()
            state_dict.update({f"{key}.{name}": value for name, value in packed.items()})


def carry_over(old: nn.Module, new: _Module) -> _Module:
    """`new` in the place of `old`: its hooks and whether it is being trained."""
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    new.training = old.training
    return new


def hand_over(old: nn.Module, new: nn.Module) -> None:
    """What can belong to one of two modules only, when `new` takes the place of `old` in a model.

    Hooks that run before a state dict is loaded know the module that they were registered on.
    """
    hooks: dict[int, Any] = old._load_state_dict_pre_hooks
    new.__dict__["_load_state_dict_pre_hooks"] = hooks
    for hook in hooks.values():
        if hook.with_module:
            hook.module = weakref.ref(new)


def pack_weight_of(
    layer: nn.Module, mask: Tensor | None, weight: PackedWeight | None
) -> PackedWeight:
    """`weight` if it is given, else that of `layer`, packed by `mask`."""
    dense = getattr(layer, "weight", None)
    if not isinstance(dense, Tensor) or dense.dim() < 2:
        raise TypeError(
            f"layer must be a dense layer with a weight, got {type(layer).__name__}; pass the "
            "nn.Linear, Conv1D or nn.Conv2d to pack"
        )
    if weight is not None:
        if not isinstance(weight, PackedWeight) or tuple(weight.shape) != tuple(dense.shape):
            found = tuple(weight.shape) if isinstance(weight, PackedWeight) else type(weight)
            raise ValueError(
                f"{type(layer).__name__} needs a weight of shape {tuple(dense.shape)}, got {found}"
            )
        return weight
    if mask is None:
        raise ValueError(f"{type(layer).__name__}: give a mask, or the weight packed already")
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"mask must be a tensor of shape {tuple(dense.shape)}, got {type(mask).__name__}"
        )
    return PackedWeight.from_dense(dense, mask.to(dense.device))


def cast_for_autocast(
    x: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast makes of the arguments of a product."""
    kind = values.device.type
    # There is no autocast for the meta device, and asking raises.
    if kind == "meta" or not torch.is_autocast_enabled(kind) or values.dtype == torch.float64:
        return x, values, bias
    wanted = torch.get_autocast_dtype(kind)
    return x.to(wanted), values.to(wanted), None if bias is None else bias.to(wanted)
