"""Wanda: magnitudes weighted by the size of the inputs that they meet.

    S[o, i] = |w[o, i]| * ||x_i||_2

x_i are all values that input i takes on the data: over samples and tokens, and in a convolution
over the positions that the kernel tap of the weight meets. A forward pass over the data is all it
needs; the norm factors out, so that no score tensor is made and the rows of a layer are ranked from
its weight and one vector.

Source: Wanda, Sun et al. 2024 (arXiv:2306.11695), equation 1; compared within each output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from paikern import ops
from paikern.activations import InputEnergy
from paikern.batches import Batch
from paikern.errors import NonFiniteScoreError
from paikern.gradients import untouched
from paikern.gradients.holding import holding
from paikern.gradients.refusals import non_finite_state, refused_by
from paikern.scorers.base import Run, register_scorer
from paikern.scorers.data_scorer import DataScorer
from paikern.scores import Dense, Factored, Score, Scores


@register_scorer("wanda")
class Wanda(DataScorer):
    """`|w| * ||x||` on `data`, each output keeping its share of inputs (`scope="row"`).

    Args:
        batches, batch_size: as in `DataScorer`.

    The model runs in eval mode and without gradients. Of a weight that is used several times the
    squares of all its inputs are added. Labels are left out of what the model is given, but where
    an encoder-decoder of transformers makes its decoder's inputs from them.

    Raises:
        NonFiniteScoreError: the inputs of a layer are NaN or infinite, named with the batch.

    Example:
        >>> import torch, paikern as pk
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -4.0]]))
        >>> x = torch.tensor([[3.0, 1.0], [4.0, 0.0]])  # norms 5 and 1
        >>> pk.score(layer, "wanda", data=x).dense("weight")
        tensor([[5., 4.]])
    """

    summary = "magnitude times the norm of the inputs, within each output"
    source = "Sun et al. 2024, eq. 1"
    cost = "F"
    weakness = (
        "each output keeps its share, so no layer is given more; a little more than asked for "
        "is kept"
    )
    default_scope: ClassVar[str] = "row"

    def score(self, run: Run) -> Scores:
        weights = {name: _masked(run, name) for name in run.layers}
        seen = self._watched(run, weights)
        missing = [name for name in run.layers if name not in seen.seen]
        if missing:
            run.notes.append(
                f"no matrix product or convolution on data uses {', '.join(missing)}; their scores "
                "are 0 (use ignore= to leave them dense)"
            )
        if seen.seen and seen.is_zero:
            run.notes.append(
                "wanda: scores carry no information: every input is 0, so weights are kept by "
                "their position; look at the data"
            )
        return Scores({name: _score(run, name, seen) for name in run.layers}, run.shapes)

    def _watched(self, run: Run, weights: Mapping[str, Tensor]) -> InputEnergy:
        swapped = {run.layers[name].source: w for name, w in weights.items()}
        seen = InputEnergy(weights)
        device = next(iter(weights.values())).device
        fused = torch.backends.mha.get_fastpath_enabled()  # one operation for a whole layer
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with (
                untouched(run.model, "eval", run.seed),
                holding(run.model, swapped),
                torch.no_grad(),
                seen,
            ):
                for number, batch in enumerate(self.read(run)):
                    given = batch if _decodes_labels(run.model, batch) else batch.without_labels()
                    inputs = given.to(device).inputs
                    with refused_by(run.model, given):
                        if isinstance(inputs, Mapping):
                            run.model(**inputs)
                        else:
                            run.model(inputs)
                    if (name := seen.non_finite()) is not None:
                        raise _overflow(run, name, number)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
        return seen


def _decodes_labels(model: nn.Module, batch: Batch) -> bool:
    """Whether the inputs of a decoder are made from the labels."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return not batch.inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}


def _overflow(run: Run, name: str, number: int) -> NonFiniteScoreError:
    cause = non_finite_state(run.model)
    fix = f"repair {cause}" if cause else "scale the inputs, or use float32 weights"
    return NonFiniteScoreError(
        f"data: the inputs of {name} on batch {number} hold NaN, infinity, or values too large to "
        f"be squared, in method {run.method!r}; {fix}, or leave the layer out with "
        f"ignore=[{name!r}]"
    )


def _masked(run: Run, name: str) -> Tensor:
    weight, packed = run.weight(name), run.masks.get(name)
    if packed is None:
        return weight
    weight = weight.clone(memory_format=torch.contiguous_format)
    ops.apply_mask_(weight, packed.to(weight.device))
    return weight


def _score(run: Run, name: str, seen: InputEnergy) -> Score:
    weight, mask = run.weight(name), run.masks.get(name)
    found = seen.vector(name)
    if found is None or weight.dtype == torch.float64:
        values = seen.dense(name).sqrt_().mul_(weight.abs())
        if mask is not None:
            kept = ops.unpack_mask(mask.to(values.device), tuple(values.shape))
            values.masked_fill_(~kept, -1.0)
        return Dense(values)
    energy, by_rows = found
    matrix = weight.flatten(1)
    norm = energy.sqrt()
    ones = norm.new_ones(matrix.shape[1] if by_rows else matrix.shape[0])
    a, g = (ones, norm) if by_rows else (norm, ones)
    return Factored(matrix, 1, a, g, mask=mask)
