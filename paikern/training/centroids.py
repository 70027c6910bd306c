"""A sparse network in two numbers a layer: the mean of its positive and of its negative weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from paikern import ops
from paikern.errors import MaskFormatError, NonFiniteScoreError, PaikernWarning
from paikern.masks import MaskSet
from paikern.prunable import unwrap
from paikern.selection import listed

_POSITIVE = ":positive"


@dataclass(frozen=True)
class Centroids:
    """The masks of a network, the signs of its survivors, and two means for each layer.

        c+ = mean(w : w > 0)      c- = mean(w : w < 0)

    `values` maps parameter name to (c+, c-), float64; `masks` says which weights survive and
    `positive`, with the same names, which of them become c+. Two bits a weight and 2L numbers are
    all that is stored.

    Source: ASNI, algorithm 2.

    Example:
        >>> import torch, paikern as pk
        >>> layer = torch.nn.Linear(4, 1)
        >>> layer.weight.data = torch.tensor([[1.0, 3.0, -2.0, 0.0]])
        >>> found = pk.training.Centroids.of(layer, pk.MaskSet.from_model(layer))
        >>> found.values
        {'weight': (2.0, -2.0)}
        >>> found.reinitialise(layer)
        >>> layer.weight.tolist()
        [[2.0, 2.0, -2.0, 0.0]]
    """

    values: Mapping[str, tuple[float, float]]
    masks: MaskSet
    positive: MaskSet

    @classmethod
    def of(cls, model: nn.Module, masks: MaskSet) -> Centroids:
        """From a model and its masks; the sums are taken in float64.

        Raises:
            ValueError: a layer keeps no weight.
            NonFiniteScoreError: NaN or infinite survivors.

        Warns:
            PaikernWarning: a layer has no positive or no negative survivor; that mean is stored as
            0.
        """
        values: dict[str, tuple[float, float]] = {}
        positive: dict[str, Tensor] = {}
        one_sided = []
        for name, slot in masks.slots(model).items():
            weight = slot.tensor.detach()
            kept = masks[name].to(weight.device)
            if not bool(kept.any()):
                raise ValueError(
                    f"centroids: {name} keeps no weight and has no mean; prune with "
                    "on_collapse='floor' or a lower sparsity"
                )
            above, below = kept & (weight > 0), kept & (weight < 0)
            sums = []
            for part in (above, below):
                count = int(part.sum())
                total = float(weight.masked_fill(~part, 0).sum(dtype=torch.float64))
                sums.append(total / count if count else 0.0)
                if not count:
                    one_sided.append(name)
            alive = weight.masked_fill(~kept, 0)
            if not bool(torch.isfinite(alive).all()):
                raise NonFiniteScoreError(f"centroids: {name} holds NaN or infinite weights")
            values[name] = (sums[0], sums[1])
            positive[name] = ops.pack_mask(above.cpu())
        if one_sided:
            warnings.warn(
                f"centroids: {listed(one_sided)} have survivors of one sign only; the mean of the "
                "other is stored as 0",
                PaikernWarning,
                stacklevel=2,
            )
        return cls(values, masks, MaskSet(positive, masks.shapes))

    def reinitialise(self, model: nn.Module) -> None:
        """Every positive survivor becomes c+, every other one c-, pruned weights 0.

        Norms get weight 1, bias 0 and new running statistics, all other biases 0. Parameters that
        are neither (embeddings, positions) are left alone.

        Raises:
            MaskFormatError: centroids of another model; it is unchanged then.
        """
        inner = unwrap(model)
        slots = self.masks.slots(inner)
        with torch.no_grad():
            for name, slot in slots.items():
                above, below = self.values[name]
                weight = slot.tensor
                signs = self.positive[name].to(weight.device)
                kept = self.masks[name].to(weight.device)
                weight.zero_().masked_fill_(kept, below).masked_fill_(signs, above)
            for module in inner.modules():
                _reset(module)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a mask file: the masks, the signs, and the means in the header."""
        packed = {name: self.masks.packed(name) for name in self.masks}
        packed |= {name + _POSITIVE: self.positive.packed(name) for name in self.masks}
        shapes = self.masks.shapes
        shapes |= {name + _POSITIVE: shape for name, shape in self.masks.shapes.items()}
        means = {name: list(pair) for name, pair in self.values.items()}
        MaskSet(packed, shapes, {**self.masks.metadata, "centroids": means}).save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Centroids:
        """Read what `save` wrote.

        Raises:
            MaskFormatError: missing, altered, or a mask file without centroids.
        """
        both = MaskSet.load(path)
        means = both.metadata.get("centroids")
        names = [name for name in both if not name.endswith(_POSITIVE)]
        if not isinstance(means, dict) or set(means) != set(names):
            raise MaskFormatError(f"{os.fspath(path)!r}: a mask file without centroids")
        metadata = {key: value for key, value in both.metadata.items() if key != "centroids"}
        shapes = {name: both.shapes[name] for name in names}
        masks = MaskSet({name: both.packed(name) for name in names}, shapes, metadata)
        signs = MaskSet({name: both.packed(name + _POSITIVE) for name in names}, shapes)
        values = {name: (float(means[name][0]), float(means[name][1])) for name in names}
        return cls(values, masks, signs)


def _reset(module: nn.Module) -> None:
    """A norm as it is made; of any other module the biases."""
    is_norm = isinstance(module, _NormBase) or type(module).__name__.endswith("Norm")
    for key, parameter in module._parameters.items():
        if parameter is None:
            continue
        if key.startswith("bias") or key.endswith("_bias"):
            parameter.zero_()
        elif is_norm:
            parameter.fill_(1)
    if isinstance(module, _NormBase):
        module.reset_running_stats()
