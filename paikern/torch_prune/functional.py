"""The functions of `torch.nn.utils.prune`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from paikern._names import storage_key
from paikern.torch_prune.base import Target, check_scores, combine, knows_bits
from paikern.torch_prune.buffers import PackedMask, pack
from paikern.torch_prune.methods import (
    CustomFromMask,
    Identity,
    L1Unstructured,
    LnStructured,
    RandomStructured,
    RandomUnstructured,
)
from paikern.torch_prune.select import keep_largest, keep_random

M = TypeVar("M", bound=nn.Module)


def identity(module: M, name: str) -> M:
    """Give a parameter a mask of ones: `<name>_orig` and `<name>_mask` appear, nothing changes.

    Args:
        module: holds the parameter; changed in place.
        name: of the parameter.

    Returns:
        `module`.

    >>> layer = identity(nn.Linear(2, 3), "bias")
    >>> layer.bias_mask
    tensor([1., 1., 1.])
    """
    Identity.apply(module, name)
    return module


def random_unstructured(module: M, name: str, amount: Any) -> M:
    """Remove weights at random, of those that are left.

    Args:
        module: holds the parameter; changed in place.
        name: of the parameter.
        amount: an int is the number to remove, a float the fraction, rounded half to even.

    Returns:
        `module`.

    Raises:
        TypeError: `amount` is no number. ValueError: more than is left, or out of range.

    >>> layer = random_unstructured(nn.Linear(2, 3), "weight", amount=1)
    >>> int(layer.weight_mask.sum())
    5
    """
    RandomUnstructured.apply(module, name, amount)
    return module


def l1_unstructured(
    module: M, name: str, amount: Any, importance_scores: Tensor | None = None
) -> M:
    """Remove the weights of smallest magnitude, of those that are left. Ties keep the lower index.

    Args:
        module: holds the parameter; changed in place.
        name: of the parameter.
        amount: an int is the number to remove, a float the fraction, rounded half to even.
        importance_scores: of the parameter's shape; their magnitude is ranked instead.

    Returns:
        `module`.

    Raises:
        TypeError: `amount` is no number. ValueError: more than is left, or out of range.
        AssertionError: scores of another shape. NonFiniteScoreError: NaN in what is left.

    >>> layer = l1_unstructured(nn.Linear(2, 3), "weight", amount=0.5)
    >>> sorted(layer.state_dict())
    ['bias', 'weight_mask', 'weight_orig']
    """
    L1Unstructured.apply(module, name, amount=amount, importance_scores=importance_scores)
    return module


def random_structured(module: M, name: str, amount: Any, dim: int) -> M:
    """Remove channels at random, of those that are left.

    Args:
        module: holds the parameter; changed in place.
        name: of the parameter, of two or more dimensions.
        amount: an int is the number of channels, a float the fraction, rounded half to even.
        dim: along which the channels lie.

    Returns:
        `module`.

    Raises:
        TypeError: `amount` is no number. ValueError: more than is left, or no channels.
        IndexError: no such dimension.

    >>> layer = random_structured(nn.Linear(5, 3), "weight", amount=3, dim=1)
    >>> int((layer.weight == 0).all(dim=0).sum())
    3
    """
    RandomStructured.apply(module, name, amount, dim)
    return module


def ln_structured(
    module: M,
    name: str,
    amount: Any,
    n: Any,
    dim: int,
    importance_scores: Tensor | None = None,
) -> M:
    """Remove the channels of smallest `n`-norm, of those that are left. Ties keep the lower index.

    Args:
        module: holds the parameter; changed in place.
        name: of the parameter, of two or more dimensions.
        amount: an int is the number of channels, a float the fraction, rounded half to even.
        n: as `p` of `torch.norm`: a number, inf, -inf, "fro" or "nuc".
        dim: along which the channels lie.
        importance_scores: of the parameter's shape, measured instead.

    Returns:
        `module`.

    Raises:
        TypeError: `amount` is no number. ValueError: more than is left, or no channels.
        IndexError: no such dimension. AssertionError: scores of another shape.
        NonFiniteScoreError: a norm is NaN.

    >>> layer = ln_structured(nn.Conv2d(5, 3, 2), "weight", amount=0.3, n=float("-inf"), dim=1)
    >>> int((layer.weight == 0).all(dim=3).all(dim=2).all(dim=0).sum())
    2
    """
    LnStructured.apply(module, name, amount, n, dim, importance_scores=importance_scores)
    return module


def custom_from_mask(module: M, name: str, mask: Tensor | PackedMask) -> M:
    """Remove what a given mask removes, beside what is removed already.

    Args:
        module: holds the parameter; changed in place.
        name: of the parameter.
        mask: ones and zeros, of the parameter's shape.

    Returns:
        `module`.

    Raises:
        ValueError: values other than 0 and 1. AssertionError: another shape.

    >>> layer = custom_from_mask(nn.Linear(5, 3), "bias", torch.tensor([0, 1, 0]))
    >>> layer.bias_mask
    tensor([0., 1., 0.])
    """
    CustomFromMask.apply(module, name, mask)
    return module


def remove(module: M, name: str) -> M:
    """Make the pruning of a parameter permanent and take the hook away. Nothing comes back to life.

    Args:
        module: holds the parameter; changed in place.
        name: of the parameter.

    Returns:
        `module`.

    Raises:
        ValueError: the parameter is not pruned.

    >>> layer = remove(l1_unstructured(nn.Linear(2, 3), "weight", amount=4), "weight")
    >>> type(layer.weight).__name__, int((layer.weight == 0).sum())
    ('Parameter', 4)
    """
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, torch_prune.BasePruningMethod) and hook._tensor_name == name:
            hook.remove(module)
            del module._forward_pre_hooks[key]
            return module
    raise ValueError(f"name: '{name}' of {type(module).__name__} is not pruned")


def is_pruned(module: nn.Module) -> bool:
    """Whether the module or one inside it has a pruned parameter, by torch's pruning or this one.

    >>> is_pruned(nn.Linear(2, 3)), is_pruned(nn.Sequential(identity(nn.Linear(2, 3), "weight")))
    (False, True)
    """
    return any(
        isinstance(hook, torch_prune.BasePruningMethod)
        for inner in module.modules()
        for hook in inner._forward_pre_hooks.values()
    )


def global_unstructured(
    parameters: Iterable[tuple[nn.Module, str]],
    pruning_method: Callable[..., torch_prune.BasePruningMethod],
    importance_scores: Mapping[tuple[nn.Module, str], Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Prune over several parameters together: the amount is one of all that is left in them.

    With `L1Unstructured` the parameters are read in place, first time and again: the memory taken
    is the bits and what selection needs. A parameter that several modules share counts once, under
    the scores that come first, and gets one mask.

    Args:
        parameters: `(module, name)` each; changed in place, all of them or none.
        pruning_method: a class of this package, or one with `PRUNING_TYPE = "unstructured"`.
        importance_scores: a dict from `(module, name)` to what is ranked instead.
        kwargs: of the method, such as `amount`.

    Raises:
        TypeError: `parameters` or `importance_scores` of a wrong type, parameters on different
            devices, another `PRUNING_TYPE`, or a bad amount.
        ValueError: more than is left, or out of range, or no parameters.
        AssertionError: scores of another shape.
        NonFiniteScoreError: NaN in what is left, naming the parameter.

    >>> net = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 1))
    >>> weights = [(net[0], "weight"), (net[1], "weight")]
    >>> global_unstructured(weights, pruning_method=L1Unstructured, amount=10)
    >>> int(sum((mask == 0).sum() for mask in net.buffers()))
    10
    """
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters: must be iterable, got {type(parameters).__name__}")
    given = importance_scores if importance_scores is not None else {}
    if not isinstance(given, dict):
        raise TypeError(f"importance_scores: must be a dict, got {type(given).__name__}")
    targets = _unique_pairs(parameters)
    method = pruning_method(**kwargs)
    method._tensor_name = "all"
    kind = getattr(method, "PRUNING_TYPE", None)
    if kind != "unstructured":
        raise TypeError(
            f"pruning_method: global_unstructured needs PRUNING_TYPE 'unstructured', "
            f"{type(method).__name__} has {kind!r}"
        )
    shared: dict[tuple[object, ...], list[Target]] = {}
    for target in targets:
        shared.setdefault(storage_key(target.original), []).append(target)
    groups = list(shared.values())
    kept = [_kept_by_all(group) for group in groups]
    scores = []
    for target, *_ in groups:
        score = given.get((target.module, target.name))
        if score is not None:
            check_scores(score, target.original, target.label)
        scores.append(score)
    for group, bits in zip(groups, _select(method, groups, kept, scores), strict=True):
        for target in group:
            mask = PackedMask(bits, target.original.shape, target.original.dtype)
            hook = CustomFromMask(mask.copy())
            hook._tensor_name = target.name
            target.commit(hook, mask)


def _unique_pairs(parameters: Iterable[tuple[nn.Module, str]]) -> list[Target]:
    """What is to be pruned, each once, on one device."""
    pairs = {(id(module), name): (module, name) for module, name in parameters}
    if not pairs:
        raise ValueError("parameters: there are none; give (module, name) pairs")
    targets = [Target(module, name) for module, name in pairs.values()]
    devices = {target.original.device for target in targets}
    if len(devices) > 1:
        raise TypeError(f"parameters: must be on one device, got {sorted(map(str, devices))}")
    return targets


def _kept_by_all(group: list[Target]) -> Tensor | None:
    """What is left of a shared parameter: what every module keeps."""
    kept = None
    for target in group:
        if target.kept is not None:
            kept = target.kept if kept is None else kept & target.kept
    return kept


def _select(
    method: torch_prune.BasePruningMethod,
    groups: list[list[Target]],
    kept: list[Tensor | None],
    scores: list[Tensor | None],
) -> list[Tensor]:
    """The bits of each group."""
    first = [group[0] for group in groups]
    originals: list[Tensor] = [target.original.detach() for target in first]
    if knows_bits(method) and isinstance(method, L1Unstructured):
        ranked = [t if s is None else s for t, s in zip(originals, scores, strict=True)]
        return keep_largest(ranked, kept, method.amount, [target.label for target in first])
    if knows_bits(method) and isinstance(method, RandomUnstructured):
        with torch.no_grad():
            return keep_random(originals, kept, method.amount)
    for target, bits in zip(first, kept, strict=True):
        target.kept = bits
    t = torch.cat(
        [
            (target.masked() if score is None else score).detach().reshape(-1)
            for target, score in zip(first, scores, strict=True)
        ]
    )
    mask = combine(method, t, torch.cat([target.dense().reshape(-1) for target in first]))
    parts = mask.split([target.original.numel() for target in first])
    return [pack(part) for part in parts]
