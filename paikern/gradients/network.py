"""The model of a run as a function of its prunable weights, differentiated once or twice.

Nothing is written to the model: the weights that are differentiated are aliases of its parameters,
or masked copies where a round has masks, and gradients are handed over one parameter at a time, as
soon as the backward pass has made them, so that no second set of them ever exists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from paikern import ops
from paikern.batches import Batch
from paikern.gradients.lean import lean_derivatives
from paikern.gradients.loss import Loss
from paikern.gradients.refusals import (
    named_derivatives,
    non_finite_state,
    refuse_non_finite,
    refuse_once_differentiable,
    refused_by,
)
from paikern.gradients.untouched import untouched

if TYPE_CHECKING:
    from paikern.scorers.base import Run

_CAUSES = "inputs that are not scaled, wrong labels, or an overflow in float16"
Consumer = Callable[[str, Tensor], None]
"""Called as `consume(name, gradient)`; the gradient is the consumer's to keep or to change."""


class NonFiniteLossError(ValueError):
    """The loss of a batch is `value`, NaN or infinite."""

    def __init__(self, message: str, value: float) -> None:
        super().__init__(message)
        self.value = value


class Network:
    """The model under `run.masks`, for `with network.running():`.

    Args:
        run: the pruning run; frozen weights are refused.
        loss: of one batch.
        mode: "train" or "eval", of every module while it runs.
        others: further parameters to differentiate by, by their names in `named_parameters()`.

    `weights` maps the names of the prunable weights to what the model computes with: leaves that
    gradients are taken of, w * m in the weight's dtype.

    Raises:
        ValueError: a prunable weight is frozen, or a parameter was made in inference mode.
    """

    def __init__(
        self, run: Run, loss: Loss, mode: str = "train", others: Sequence[str] = ()
    ) -> None:
        self._parameters = _parameters(run)
        frozen = [n for n, p in self._parameters.items() if not p.requires_grad]
        if frozen:
            raise ValueError(
                f"{frozen[0]} is frozen (requires_grad=False), so the method cannot tell what it "
                f"is worth; unfreeze it, or leave it out with ignore=[{frozen[0]!r}]"
            )
        made = next((n for n, p in run.model.named_parameters() if p.is_inference()), None)
        if made is not None:
            raise ValueError(
                f"{made} was made in torch.inference_mode(), so nothing can be differentiated by "
                "it; build or load the model outside of it"
            )
        self.run, self.loss_function, self.mode = run, loss, mode
        self._method = f" in method {run.method!r}" if run.method else ""  # for messages
        self.device = next(iter(self._parameters.values())).device
        with torch.inference_mode(False):
            self.weights = {name: _leaf(run, name) for name in run.layers}
            for name in others:
                self._parameters[name] = run.model.get_parameter(name)
                self.weights[name] = self._parameters[name].detach().requires_grad_()

    @contextlib.contextmanager
    def running(self) -> Iterator[Network]:
        """The model holds `weights`, in the mode, random from the run's seed; all is put back.

        The weights stay in the model from the forward to the backward pass, because blocks that are
        checkpointed compute their forward pass again during the latter.
        """
        with untouched(self.run.model, self.mode, self.run.seed), torch.enable_grad():
            leaves = {id(p): self.weights[name] for name, p in self._parameters.items()}
            places = [
                (module, key, parameter)
                for module in self.run.model.modules()
                for key, parameter in module._parameters.items()
                if id(parameter) in leaves
            ]
            try:
                for module, key, parameter in places:
                    module._parameters[key] = leaves[id(parameter)]  # type: ignore[assignment]
                yield self
            finally:
                for module, key, parameter in places:
                    module._parameters[key] = parameter

    def outputs(self, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> Any:
        """What the model returns for a batch, computed with `weights` (default: its own).

        Other parameters go by their names in `model.named_parameters()`.

        Raises:
            ValueError: the model does not take the batch; the layer and its error are named.
        """
        model, inputs = self.run.model, batch.to(self.device).inputs
        args, keywords = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
        with refused_by(model, batch):
            if weights is None:
                return model(*args, **keywords)
            layers = self.run.layers
            swapped = {layers[n].source if n in layers else n: w for n, w in weights.items()}
            return functional_call(model, swapped, args, keywords)

    def loss(
        self, batch: Batch, number: int = 0, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The loss of a batch; `number` is for the message.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
            ValueError: the loss is no number, or its function raises an error.
        """
        batch = batch.to(self.device)
        place = f" on batch {number}{self._method}"
        value = self.loss_function(self.outputs(batch, weights), batch, place)
        if not bool(torch.isfinite(value)):
            cause = non_finite_state(self.run.model)
            found = float(value.detach())
            raise NonFiniteLossError(
                f"loss_fn: the loss of batch {number} is {found}{self._method}; "
                + (f"look at {cause}: repair it" if cause else f"look for {_CAUSES}"),
                found,
            )
        if not value.requires_grad:
            raise self.independent(number)
        return value

    def differentiate(
        self, batch: Batch, consume: Consumer, number: int = 0, scale: float = 1.0
    ) -> None:
        """`scale * dL / dW` of one batch, handed over as by `backward`.

        Raises:
            ValueError: as `loss` does, and where the loss depends on none of the weights.
        """
        if not self.backward(self.loss(batch, number) * scale, consume, number):
            raise self.independent(number)

    def independent(self, number: int) -> ValueError:
        """The error of a loss that has no gradient."""
        return ValueError(
            f"loss_fn: the loss of batch {number} does not depend on the weights{self._method}; "
            "return a loss computed from the outputs, without .detach() or .item()"
        )

    def backward(self, value: Tensor, consume: Consumer, number: int = 0) -> int:
        """Differentiate `value` by the weights, each gradient handed over as soon as it is made.

        Weights that `value` does not depend on are left out; the number of the others is returned.

        Raises:
            NonFiniteScoreError: a gradient holds NaN or infinity, named.
            PaikernError: an operation has no derivative, named, or the backward pass fails.
        """
        handles, reached = [], 0

        def count(name: str, gradient: Tensor) -> None:
            nonlocal reached
            reached += 1
            consume(name, gradient)

        for name, leaf in self.weights.items():
            handles.append(leaf.register_post_accumulate_grad_hook(_hand_over(name, count)))
        try:
            with named_derivatives(f" of batch {number}{self._method}"):
                value.backward(inputs=list(self.weights.values()))
        finally:
            for handle in handles:
                handle.remove()
            for leaf in self.weights.values():
                leaf.grad = None
        return reached

    def gradients(
        self, batches: Sequence[Batch], *, mean: bool = False, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """`scale * sum_b dL_b / dW`, in the order of the batches; float32 at least.

        Batches of another size than the first count in proportion to it, so that equal sizes give
        the plain sum; with `mean` it is divided by the sum of those proportions. A weight that no
        loss depends on has a gradient of 0 and is noted.
        """
        total = _Sum()
        if mean:
            scale /= sum(share for _, share in weighted(batches))
        for number, (batch, share) in enumerate(weighted(batches)):
            self.differentiate(batch, total, number, share * scale)
        return self.complete(total.values)

    def hessian_product(
        self, vectors: Mapping[str, Tensor], batches: Sequence[Batch], *, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """`scale * sum_b H_b v`: derivatives of `z_b = sum_l <v_l, dL_b / dW_l>`, batch by batch.

        Attention runs on the path that can be differentiated twice, batch norm and ReLU with second
        derivatives of their own (`paikern.gradients.lean`). The passes hold four maps a layer:
        what norm and convolution read, and the gradients of what both return.

        Raises:
            PaikernError: an operation cannot be differentiated twice, named.
        """
        total = _Sum()
        with twice_differentiable(self.run.model, self.weights.values()):
            for number, (batch, share) in enumerate(weighted(batches)):
                z = self._along(self.loss(batch, number) * (share * scale), vectors, number)
                if z is not None:
                    refuse_once_differentiable(z)
                    self.backward(z, total, number)
        return self.complete(total.values, note=False)

    def _along(self, value: Tensor, vectors: Mapping[str, Tensor], number: int) -> Tensor | None:
        """What has the derivative of `sum_l <v_l, dvalue / dW_l>`; None if that is 0 everywhere.

        A hook takes each dvalue / dW as soon as it is made and leaves a 0 in its place, so that
        they never exist together.
        """
        parts: list[Tensor] = []
        handles = []
        for name, leaf in self.weights.items():
            handles.append(leaf.register_hook(_taken(vectors[name].to(leaf.dtype), parts)))
        try:
            with named_derivatives(f" of batch {number}{self._method}"):
                torch.autograd.grad(
                    value, list(self.weights.values()), create_graph=True, allow_unused=True
                )
        finally:
            for handle in handles:
                handle.remove()
        return sum(parts[1:], start=parts[0]) if parts else None

    def mask_(self, values: Mapping[str, Tensor]) -> None:
        """Zero the entries of pruned weights, in place."""
        for name, packed in self.run.masks.items():
            if name in values:
                ops.apply_mask_(values[name], packed.to(values[name].device))

    def complete(self, found: dict[str, Tensor], note: bool = True) -> dict[str, Tensor]:
        """In layer order, with zeros for weights that no gradient has reached."""
        missing = [name for name in self.weights if name not in found]
        if missing and note:
            self.run.notes.append(
                f"no gradient reaches {', '.join(missing)}; their scores are 0 (use ignore= to "
                "leave them dense)"
            )
        return {
            name: found[name]
            if name in found
            else torch.zeros_like(leaf, dtype=_wide(leaf), requires_grad=False)
            for name, leaf in self.weights.items()
        }


def weighted(batches: Sequence[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch and its size relative to the first."""
    first = batches[0].size if batches else 1
    for batch in batches:
        yield batch, batch.size / first


@contextlib.contextmanager
def twice_differentiable(model: nn.Module, by: Iterable[Tensor] | None = None) -> Iterator[None]:
    """Attention on PyTorch's plain path, as the fused ones have a first derivative only, and
    second derivatives that take little memory: `lean_derivatives(model, by)`."""
    with sdpa_kernel(SDPBackend.MATH), lean_derivatives(model, by):
        yield


class _Sum:
    """Adds what it is given by name, in float32 at least."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def __call__(self, name: str, gradient: Tensor) -> None:
        if name in self.values:
            self.values[name].add_(gradient)
        else:
            self.values[name] = gradient.to(_wide(gradient))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _parameters(run: Run) -> dict[str, Tensor]:
    held = dict(run.model.named_parameters())
    return {name: held[layer.source] for name, layer in run.layers.items()}


def _leaf(run: Run, name: str) -> Tensor:
    weight, packed = run.weight(name), run.masks.get(name)
    if packed is not None:
        weight = weight.clone(memory_format=torch.contiguous_format)
        ops.apply_mask_(weight, packed.to(weight.device))
    return weight.requires_grad_()


class _Along(torch.autograd.Function):
    """Stands for `<slope, v>` in a graph: the derivative by the slope is v itself, no copy of it.

    The value, which nobody needs, is 0.
    """

    @staticmethod
    def forward(ctx: Any, slope: Tensor, v: Tensor) -> Tensor:
        ctx.v = v
        return slope.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.v, None


def _taken(v: Tensor, parts: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def take(slope: Tensor) -> Tensor:
        if slope.requires_grad:
            parts.append(_Along.apply(slope, v))
        return slope.new_zeros(()).expand_as(slope)

    return take


def _hand_over(name: str, consume: Consumer) -> Callable[[Tensor], None]:
    def take(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        gradient = gradient.detach()
        if gradient.numel() and not torch.isfinite(gradient.sum()):
            refuse_non_finite(name, gradient)  # or only the sum is too large
        consume(name, gradient)

    return take
