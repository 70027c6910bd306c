"""The base class of pruning methods, and how a mask gets onto a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrize import is_parametrized

from paikern import ops
from paikern.torch_prune.buffers import MaskedBuffers, PackedMask, install, pack, uninstall

__all__ = [
    "BasePruningMethod",
    "BitsMethod",
    "PruningContainer",
    "Target",
    "check_scores",
    "combine",
    "knows_bits",
]


class BasePruningMethod(torch_prune.BasePruningMethod):
    """The rule of a pruning method and, as a hook of the module, the sign that it was applied.

    A subclass defines `PRUNING_TYPE` ("unstructured", "structured" with an attribute `dim`, or
    "global") and `compute_mask(t, default_mask)`, as with `torch.nn.utils.prune`, whose class this
    one extends: code that looks for that one among the hooks finds it.

    >>> class EveryOther(BasePruningMethod):
    ...     PRUNING_TYPE = "unstructured"
    ...     def compute_mask(self, t, default_mask):
    ...         mask = default_mask.clone()
    ...         mask.view(-1)[::2] = 0
    ...         return mask
    >>> layer = nn.Linear(3, 2)
    >>> _ = EveryOther.apply(layer, "weight")
    >>> layer.weight_mask
    tensor([[0., 1., 0.],
            [1., 0., 1.]])
    """

    PRUNING_TYPE: str

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Before a forward pass: `weight` is what `weight_orig` and the mask say now."""
        name = self._tensor_name
        buffers = module._buffers
        if isinstance(buffers, MaskedBuffers) and makes_product(self):
            buffers.parameters = module._parameters
            buffers.refresh(name)
            if is_parametrized(module, name):
                raise ValueError(
                    f"{name} of {type(module).__name__} was parametrized after it was pruned, and "
                    f"does not depend on {name}_orig now; parametrize {name}_orig instead"
                )
            if buffers.makes(name) and name not in module._parameters:
                return
        # A replica or a wrapper that keeps parameters elsewhere, or a method with a product of its
        # own: the module holds the tensor, as with torch's pruning.
        setattr(module, name, self.apply_mask(module))

    def apply_mask(self, module: nn.Module) -> Tensor:
        """`weight_orig` where the mask is 1, +0 elsewhere.

        Raises:
            AssertionError: the method has not been applied.
        """
        name = getattr(self, "_tensor_name", None)
        if name is None:
            raise AssertionError(f"apply_mask: {type(self).__name__} has not been applied yet")
        original: Tensor = getattr(module, f"{name}_orig")
        buffers = module._buffers
        held = buffers.mask(name) if isinstance(buffers, MaskedBuffers) else None
        if held is not None:
            return held.apply(original)
        mask: Tensor = getattr(module, f"{name}_mask")
        return mask.to(original.dtype) * original

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        *args: Any,
        importance_scores: Tensor | None = None,
        **kwargs: Any,
    ) -> torch_prune.BasePruningMethod:
        """Prune `module.<name>`, further if it is pruned already. If it fails, nothing changes.

        Args:
            module: holds the parameter.
            name: of the parameter.
            args, kwargs: of the method.
            importance_scores: of the parameter's shape, ranked instead of the parameter.

        Returns:
            The hook: this method, or the container with all methods so far.

        Raises:
            AssertionError: scores of another shape, or several pruning hooks of one parameter.
            TypeError: what is there is no parameter.
        """
        method = cls(*args, **kwargs)
        method._tensor_name = name
        target = Target(module, name)
        return target.commit(method, target.select(method, importance_scores))

    def remove(self, module: nn.Module) -> None:
        """Make the pruning permanent: `weight` is a parameter again, with zeros.

        It is the same Parameter object that was `weight_orig`. The hook is left alone.

        Raises:
            AssertionError: the method has not been applied.
        """
        weight = self.apply_mask(module).detach()
        name = self._tensor_name
        original = module._parameters[f"{name}_orig"]
        assert original is not None
        original.data = weight
        del module._parameters[f"{name}_orig"]
        del module._buffers[f"{name}_mask"]
        module.__dict__.pop(name, None)
        setattr(module, name, original)
        uninstall(module)


class BitsMethod(BasePruningMethod):
    """A method that chooses bits; its dense mask follows from them and is made only on request."""

    def select_kept(self, t: Tensor, kept: Tensor | None, name: str) -> Tensor:
        """The bits that stay of `t`.

        Args:
            t: the weight, masked where channels are pruned, or its importance.
            kept: the bits that are left so far, None for all.
            name: of the weight, for errors.
        """
        raise NotImplementedError

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """`default_mask` with 0 where the method removes an entry of `t`, a new tensor.

        Raises:
            ValueError: an amount above what there is.
            NonFiniteScoreError: NaN where magnitudes are ranked.
        """
        with torch.no_grad():
            bits = self.select_kept(t.detach(), None, "t")
            return torch.where(ops.unpack_mask(bits, t.shape), default_mask, 0)


class PruningContainer(BasePruningMethod):
    """The pruning methods that were applied to one parameter, in order.

    Args:
        methods: of one parameter; a single iterable of them will do.

    >>> from paikern.torch_prune import l1_unstructured, random_unstructured
    >>> layer = nn.Linear(4, 4)
    >>> _ = l1_unstructured(layer, "weight", 4), random_unstructured(layer, "weight", 0.5)
    >>> [type(method).__name__ for hook in layer._forward_pre_hooks.values() for method in hook]
    ['L1Unstructured', 'RandomUnstructured']
    >>> int(layer.weight_mask.sum())
    6
    """

    def __init__(self, *methods: Any) -> None:
        self._pruning_methods: tuple[torch_prune.BasePruningMethod, ...] = ()
        if len(methods) == 1 and not isinstance(methods[0], torch_prune.BasePruningMethod):
            methods = tuple(methods[0])
        if methods:
            self._tensor_name = methods[0]._tensor_name
        for method in methods:
            self.add_pruning_method(method)

    def add_pruning_method(self, method: Any) -> None:
        """Append a method.

        Raises:
            TypeError: no pruning method.
            ValueError: a method of another parameter.
        """
        if not isinstance(method, torch_prune.BasePruningMethod):
            raise TypeError(f"method: must be a BasePruningMethod, got {type(method).__name__}")
        if method._tensor_name != self._tensor_name:
            raise ValueError(
                f"method: prunes '{method._tensor_name}', this container '{self._tensor_name}'"
            )
        self._pruning_methods += (method,)

    def __len__(self) -> int:
        return len(self._pruning_methods)

    def __iter__(self) -> Iterator[torch_prune.BasePruningMethod]:
        return iter(self._pruning_methods)

    def __getitem__(self, index: int) -> torch_prune.BasePruningMethod:
        return self._pruning_methods[index]

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """`default_mask`, pruned further by the method that came last; see `combine`."""
        return combine(self._pruning_methods[-1], t, default_mask)


def combine(method: torch_prune.BasePruningMethod, t: Tensor, default_mask: Tensor) -> Tensor:
    """`default_mask`, pruned further by `method`, which sees only what is left.

    That is, by its `PRUNING_TYPE`: the entries whose mask is 1, as a vector ("unstructured"); the
    channels along `dim` that are not all masked ("structured"); everything ("global").

    Raises:
        AttributeError: a structured method without `dim`. IndexError: no such dimension.
        ValueError: another `PRUNING_TYPE`.
    """
    kind = getattr(method, "PRUNING_TYPE", None)
    left: Any
    if kind == "unstructured":
        left = default_mask == 1
    elif kind == "structured":
        if not hasattr(method, "dim"):
            raise AttributeError(
                f"{type(method).__name__}: structured pruning needs an attribute dim"
            )
        dim = method.dim + t.dim() if method.dim < 0 else method.dim
        if not 0 <= dim < t.dim():
            raise IndexError(f"dim: must be in [{-t.dim()}, {t.dim() - 1}], got {method.dim}")
        alive = default_mask.sum([d for d in range(t.dim()) if d != dim]) != 0
        left = (slice(None),) * dim + (alive,)
    elif kind == "global":
        left = (slice(None),) * t.dim()
    else:
        raise ValueError(
            f"{type(method).__name__}: PRUNING_TYPE must be 'unstructured', 'structured' or "
            f"'global', got {kind!r}"
        )
    mask = default_mask.to(t.dtype, copy=True)
    mask[left] = method.compute_mask(t[left], default_mask=default_mask[left]).to(t.dtype)
    return mask


class Target:
    """One parameter of a module, pruned or not yet.

    `original` is the parameter, `kept` the bits of its mask (None if there is none), `label` what
    errors call it.

    Raises:
        AttributeError: the module has no such attribute.
        TypeError: it is no parameter. ValueError: it has no shape yet.
        AssertionError: several pruning hooks of one parameter.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        text = str(module)
        self.label = f"{name} of {type(module).__name__ if chr(10) in text else text}"
        hooks = [
            (key, hook)
            for key, hook in module._forward_pre_hooks.items()
            if isinstance(hook, torch_prune.BasePruningMethod)
            and getattr(hook, "_tensor_name", None) == name
        ]
        if len(hooks) > 1:
            raise AssertionError(f"{self.label} has {len(hooks)} pruning hooks; keep one container")
        self._hooks = hooks
        self.kept: Tensor | None = None
        value = getattr(module, name) if not hooks else module._parameters.get(f"{name}_orig")
        if not isinstance(value, nn.Parameter) or value is not module._parameters.get(
            f"{name}_orig" if hooks else name
        ):
            raise TypeError(
                f"name: {self.label} is no parameter but {type(value).__name__}; a parametrized "
                "weight can be pruned once the parametrization is removed"
            )
        if is_lazy(value):
            raise ValueError(f"name: {self.label} has no shape yet; run a forward pass first")
        self.original: nn.Parameter = value
        self.dtype = value.dtype
        if hooks:
            buffers = module._buffers
            held = buffers.mask(name) if isinstance(buffers, MaskedBuffers) else None
            if held is not None:
                self.kept, self.dtype = held.bits, held.dtype
            else:  # pruned by torch
                mask = getattr(module, f"{name}_mask")
                self.kept, self.dtype = pack(mask), mask.dtype

    def select(
        self, method: torch_prune.BasePruningMethod, scores: Tensor | None = None
    ) -> PackedMask:
        """The mask that `method` leaves.

        Raises:
            AssertionError: scores of another shape.
        """
        if scores is not None:
            check_scores(scores, self.original, self.label)
        if knows_bits(method):
            t = scores
            if t is None:
                # What is pruned already does not count for single weights, but does in a channel.
                masked = method.PRUNING_TYPE == "structured" and self.kept is not None
                t = self.masked() if masked else self.original
            with torch.no_grad():
                bits = method.select_kept(t.detach(), self.kept, self.label)
            return PackedMask(bits, self.original.shape, self.original.dtype)
        t = self.masked() if scores is None else scores
        if self.kept is None:
            mask = method.compute_mask(t, default_mask=torch.ones_like(self.original))
        else:
            mask = combine(method, t, self.dense())
        held = PackedMask(pack(mask.detach()), mask.shape, mask.dtype)
        if held.shape != tuple(self.original.shape):
            raise ValueError(
                f"{type(method).__name__}: {self.label} has shape {list(self.original.shape)}, the "
                f"mask of compute_mask {list(held.shape)}"
            )
        return held

    def dense(self) -> Tensor:
        """The mask so far, a new tensor."""
        if self.kept is None:
            return torch.ones_like(self.original, requires_grad=False)
        return PackedMask(self.kept, self.original.shape, self.dtype).dense()

    def masked(self) -> Tensor:
        """What the module computes with."""
        if self.kept is None:
            return self.original
        return PackedMask(self.kept, self.original.shape, self.dtype).apply(self.original)

    def commit(
        self, method: torch_prune.BasePruningMethod, mask: PackedMask
    ) -> torch_prune.BasePruningMethod:
        """Put the mask on the module and the method among its hooks; returns the hook."""
        module, name, hook = self.module, self.name, method
        if not self._hooks:
            module.register_parameter(f"{name}_orig", self.original)
            del module._parameters[name]
        for key, found in self._hooks:
            if not isinstance(found, PruningContainer):
                # Also the container of torch's pruning, whose methods it lists.
                found = PruningContainer(*getattr(found, "_pruning_methods", [found]))
            found.add_pruning_method(method)
            hook = found
            del module._forward_pre_hooks[key]
            module.__dict__.pop(name, None)  # the product that torch's pruning keeps
        install(module).hold(name, mask)
        if not makes_product(hook):
            try:
                setattr(module, name, hook.apply_mask(module))
            except Exception:
                del module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
                uninstall(module)
                module.register_parameter(name, self.original)
                raise
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # its own list of what it computes with
        module.register_forward_pre_hook(hook)
        return hook


def check_scores(scores: Tensor, t: Tensor, label: str) -> None:
    """Raise an AssertionError unless there is a score for each weight."""
    if scores.shape != t.shape:
        raise AssertionError(
            f"importance_scores: {label} has shape {list(t.shape)}, its scores {list(scores.shape)}"
        )


def makes_product(method: torch_prune.BasePruningMethod) -> bool:
    """Whether the masked weight is the usual one, which need not be kept in memory."""
    return type(method).apply_mask is BasePruningMethod.apply_mask


def knows_bits(method: torch_prune.BasePruningMethod) -> TypeGuard[BitsMethod]:
    """Whether `select_kept` says all: nobody has overridden `compute_mask` or `PRUNING_TYPE`."""
    if (
        not isinstance(method, BitsMethod)
        or type(method).compute_mask is not BitsMethod.compute_mask
    ):
        return False
    owner: Any = next(cls for cls in type(method).__mro__ if "select_kept" in vars(cls))
    return bool(method.PRUNING_TYPE == owner.PRUNING_TYPE)
