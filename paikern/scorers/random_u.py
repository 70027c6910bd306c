"""Random-U: every weight is kept by a throw of its own.

    m ~ Bernoulli(1 - sparsity), independently

The number kept is random too: its standard deviation is sqrt(N (1 - r) r). `masks.sparsity` is what
came out, `metadata["sparsity"]` what was asked for; method "random" keeps an exact number.

Source: the Random-U baseline of Rachwan et al. 2022 (arXiv:2206.10451).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from paikern import ops
from paikern.scorers.base import MaskBuilder, Report, Run, register_scorer


@register_scorer("random_u")
class RandomU(MaskBuilder):
    """Bernoulli masks, drawn on the CPU layer by layer from `seed`: the same on any device.

    With a budget a layer (scope "local" or "erk") the probability is the layer's own.

    Example:
        >>> import torch, paikern as pk
        >>> masks = pk.prune(torch.nn.Linear(100, 100), "random_u", sparsity=0.9)
        >>> abs(masks.kept - 1000) < 4 * 30
        True
    """

    summary = "each weight kept with probability 1 - sparsity; the count is not exact"
    source = "baseline of Rachwan et al. 2022"
    cost = "one draw a weight"
    weakness = "the count is not exact; empties a layer of an eighth-width VGG-16 at 95 %"
    reads_weights = False
    exact_count: ClassVar[bool] = False

    def build(
        self, run: Run, kept: int | list[int], report: Report = lambda done, values: None
    ) -> dict[str, Tensor]:
        generator = run.generator()
        sizes = [torch.Size(shape).numel() for shape in run.shapes.values()]
        counts = [kept] * len(sizes) if isinstance(kept, int) else kept
        totals = [sum(sizes)] * len(sizes) if isinstance(kept, int) else sizes
        masks = {}
        for done, (name, k, n) in enumerate(zip(run.layers, counts, totals, strict=True), 1):
            drawn = torch.rand(run.shapes[name], generator=generator, dtype=torch.float64)
            mask = drawn < k / max(n, 1)
            masks[name] = ops.pack_mask(mask)
            report(done, {"kept": float(mask.sum())})
        return masks
