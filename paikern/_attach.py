"""Keeping masks applied while an optimizer trains the model.

The masks stay outside the model: a hook after every optimizer step writes zeros over whatever the
step put under a mask, in the weights and in the optimizer's own tensors of the same shape
(momentum, both moments of Adam). Nothing is added to the state dict, ``deepcopy`` and
``torch.save`` of the model work, and gradients stay dense for whoever looks at them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paikern import ops
from paikern._names import Slot, slots, unwrap
from paikern.sparse.packed_weight import PackedWeight

if TYPE_CHECKING:
    from paikern.masks import MaskSet


class AttachedMasks:
    """What ``MaskSet.attach`` returns; ``remove()`` ends it. Also a context manager.

    >>> from paikern import MaskSet
    >>> layer = nn.Linear(4, 2)
    >>> masks = MaskSet.from_bool({"weight": torch.rand(2, 4) > 0.5})
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    >>> with masks.attach(layer, optimizer):
    ...     layer(torch.ones(1, 4)).sum().backward()
    ...     optimizer.step()
    >>> masks.verify(layer)
    """

    def __init__(self, masks: MaskSet, model: nn.Module, optimizer: Any) -> None:
        self.masks = masks
        self._model = unwrap(model)
        self._optimizer = plain_optimizer(optimizer, "attach")
        if isinstance(self._optimizer, torch.optim.LBFGS):
            raise ValueError(
                "attach: LBFGS evaluates the model inside one step, where pruned weights would be "
                "back; use SGD, Adam or another first-order optimizer"
            )
        self._slots: dict[str, Slot] = {}
        self._values: list[Slot] = []
        self._device_masks: dict[tuple[str, torch.device], Tensor] = {}
        self._find()
        _check_held(self._slots, self._values, self._model, self._optimizer)
        self._handles: list[Any] = []
        masks.apply(self._model)
        self.mask_optimizer_state()
        self._handles = [
            self._optimizer.register_step_post_hook(self._after_step),
            self._optimizer.register_load_state_dict_post_hook(self._after_load),
            self._model.register_load_state_dict_post_hook(ApplyAfterLoad(masks)),
        ]

    def remove(self) -> None:
        """Stop masking; weights and optimizer state stay as they are. Calling it again is fine."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def active(self) -> bool:
        """Whether the masks are still applied after each step."""
        return bool(self._handles)

    def __enter__(self) -> AttachedMasks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def mask_optimizer_state(self) -> None:
        """Zero the optimizer's tensors of the same shape as a masked weight, where it is masked."""
        for name, slot in self._slots.items():
            self._mask_state(name, slot.tensor)

    def _after_step(self, *_: object) -> None:
        self._refresh()
        for name, slot in self._slots.items():
            tensor = slot.tensor
            ops.apply_mask_(tensor.detach(), self._packed(name, tensor.device))
            self._mask_state(name, tensor)

    def _after_load(self, *_: object) -> None:
        self.mask_optimizer_state()

    def _refresh(self) -> None:
        """Find the modules again if someone has replaced one since (wrapping keeps them)."""
        if any(slot.is_stale(self._model) for slot in (*self._slots.values(), *self._values)):
            self._find()

    def _find(self) -> None:
        self._slots = self.masks.slots(self._model)
        # Nothing to do for these, until they are made dense again.
        self._values = [s for s in slots(self._model) if isinstance(s.owner, PackedWeight)]

    def _mask_state(self, name: str, parameter: Tensor) -> None:
        # get() and not []: the state is a defaultdict, and an entry means "initialised" to Adam.
        for value in self._optimizer.state.get(parameter, {}).values():
            if (
                isinstance(value, Tensor)
                and value.shape == parameter.shape
                and value.dtype.is_floating_point
            ):
                ops.apply_mask_(value.detach(), self._packed(name, value.device))

    def _packed(self, name: str, device: torch.device) -> Tensor:
        packed = self.masks.packed(name)
        if packed.device == device:
            return packed
        key = (name, device)
        if key not in self._device_masks:
            self._device_masks[key] = packed.to(device)
        return self._device_masks[key]


class ApplyAfterLoad:
    """Hook after ``load_state_dict``: a dense checkpoint must not bring pruned weights back.

    A class and not a closure, so that a model that carries it can be pickled.
    """

    def __init__(self, masks: MaskSet) -> None:
        self._masks = masks

    def __call__(self, module: nn.Module, incompatible_keys: object) -> None:
        self._masks.apply(module)


def plain_optimizer(optimizer: Any, operation: str) -> Optimizer:
    """The torch optimizer itself, out of Accelerate's or Lightning's wrapper."""
    given = optimizer
    # A wrapper may be a subclass of Optimizer that never ran its constructor.
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{operation}: optimizer must be a torch.optim.Optimizer, got {type(given).__name__}"
        )
    return optimizer


def _check_held(
    masked: dict[str, Slot], packed: list[Slot], model: nn.Module, optimizer: Optimizer
) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lost = [s.name for s in packed if s.tensor.requires_grad and id(s.tensor) not in held]
    # An optimizer of some layers only is fine; one of tensors that the model no longer has is not.
    if lost and not held <= {id(p) for p in model.parameters()}:
        raise ValueError(
            f"attach: the optimizer does not hold '{lost[0]}', which pk.sparsify made; make the "
            "optimizer after it, or pass optimizer= to it"
        )
    if masked and not any(id(slot.tensor) in held for slot in masked.values()):
        raise ValueError(
            "attach: the optimizer holds none of the masked parameters; make it from "
            "model.parameters() of this model, after the model is on its device"
        )
