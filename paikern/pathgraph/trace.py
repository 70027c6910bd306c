"""Model -> `PathGraph`.

The model itself is never touched: a skeleton with the same modules and no weights is traced, so
weights may live on any device, meta included, and nothing has to be restored when a model refuses
to be traced. The skeleton runs once on stand-ins (`capture`); a model that this cannot follow goes
through `torch.export` (`exported`). Either way its ATen calls are read one by one (`interpret`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paikern._copying import copied
from paikern._inputs import fix_for
from paikern._names import slots
from paikern.errors import PathRuleError
from paikern.pathgraph import capture, exported
from paikern.pathgraph.graph import PathGraph, PathValue
from paikern.pathgraph.tracer import Tracer
from paikern.sparse.in_models import packed_weights

_ANY_FIX = "; pass inputs that model(*example_inputs) accepts"


def trace(model: nn.Module, example_inputs: Any) -> PathGraph:
    """Trace `model` on one sample of `example_inputs` into a `PathGraph`.

    Args:
        model: any module that `torch.export` can export; parameters on any device, meta included.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. The
            first dimension is the batch; only shapes matter for floating inputs (they count as
            ones), integer inputs such as token ids are used as they are. One sample is used.

    Returns:
        The graph. Floating outputs are summed; other outputs are ignored.

    Raises:
        PathRuleError: an operation has no path rule, the operation and its module are named; or a
            weight is packed.
        ValueError: `example_inputs` is missing or does not run through the model.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> trace(net, torch.ones(1, 3))
        PathGraph(3 steps, 2 weights)
    """
    args, kwargs = _one_sample(example_inputs)
    for name in packed_weights(model):
        raise PathRuleError(f"trace: '{name}' is packed; use pk.densify first")
    try:
        return _captured(model, args, kwargs)
    except (Exception, capture.UnsupportedError):
        # Whatever it was: torch.export decides, and the message is about the model.
        return _exported(model, args, kwargs)


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PathGraph:
    tracer = Tracer()
    skeleton = _skeleton(model, capture.parameter)
    with torch.random.fork_rng(devices=[]):
        outputs = capture.run(skeleton, *_copies(args, kwargs), tracer)
    return _graph(tracer, outputs, model, (args, kwargs))


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PathGraph:
    tracer = Tracer()
    skeleton = _skeleton(model, _unwritten)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            program = exported.program(skeleton, args, kwargs)
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise ValueError(
                f"example_inputs: {type(model).__name__} could not be traced with inputs "
                f"{_describe(args, kwargs)}: {reason[0] if reason else type(error).__name__}"
                f"{fix_for(model, (args, kwargs)) or _ANY_FIX}"
            ) from error
        outputs = exported.read(program, skeleton, tracer)
    return _graph(tracer, outputs, model, (args, kwargs))


def _graph(tracer: Tracer, outputs: list[Any], model: nn.Module, inputs: Any) -> PathGraph:
    found = [value for value in outputs if isinstance(value, PathValue)]
    if not found:
        raise ValueError(
            f"{type(model).__name__}: no floating output depends on the input, "
            f"so there are no paths to count{fix_for(model, inputs)}"
        )
    return PathGraph(
        steps=tuple(_alive(tracer, [v.id for v in found])),
        inputs=dict(tracer.inputs),
        outputs=tuple(dict.fromkeys(v.id for v in found)),
        notes=tuple(tracer.notes),
        recorded=tuple(tracer.steps),
    )


def _alive(tracer: Tracer, outputs: list[int]) -> list[Any]:
    """Steps that reach an output; what is left over (a pruned auxiliary head) never runs."""
    needed = set(outputs)
    kept = []
    for step in reversed(tracer.steps):
        if step.output in needed:
            needed.update(step.inputs)
            kept.append(step)
    return kept[::-1]


def _one_sample(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is None:
        raise ValueError(
            "example_inputs: a path-based method needs one example input to trace the model, "
            "for instance example_inputs=torch.ones(1, 3, 32, 32)"
        )

    def first(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        sample = value[:1] if value.dim() > 1 else value
        if sample.is_meta:
            return torch.zeros(sample.shape, dtype=sample.dtype)
        return sample.detach().to("cpu").clone()

    if isinstance(example_inputs, Mapping):
        return (), {name: pytree.tree_map(first, value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, Tensor):
        return (first(example_inputs),), {}
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(pytree.tree_map(first, value) for value in example_inputs), {}
    raise ValueError(
        "example_inputs must be a tensor, a tuple of inputs or a dict of keyword inputs, "
        f"got {type(example_inputs).__name__}"
    )


def _describe(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    return ", ".join(str(tuple(x.shape)) for x in leaves if isinstance(x, Tensor)) or "(none)"


def _copies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Inputs that a model may write to without changing those of a second attempt."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    return pytree.tree_map(copied, args), pytree.tree_map(copied, kwargs)


def _unwritten(name: str, parameter: Tensor) -> nn.Parameter:
    """Memory that nobody writes: untouched pages cost nothing, whatever the size."""
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    return nn.Parameter(empty, requires_grad=False)


def _skeleton(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A copy in eval mode whose parameters are `make(name, parameter)`.

    Buffers are copied because they may hold what a constant is computed from.
    """
    memo: dict[int, Any] = {}
    for slot in slots(model):  # by the name that masks use, whatever wraps the blocks inside
        if id(slot.tensor) not in memo:
            memo[id(slot.tensor)] = make(slot.name, slot.tensor)
    for buffer in model.buffers():
        memo[id(buffer)] = (
            torch.zeros(buffer.shape, dtype=buffer.dtype)
            if buffer.is_meta
            else buffer.detach().to("cpu").clone()
        )
    skeleton = copied(model, memo).eval()
    config = getattr(skeleton, "config", None)
    if config is not None and getattr(config, "use_cache", False):
        config.use_cache = False  # cached keys and values are no outputs of the network
    return skeleton


__all__ = ["PathRuleError", "trace"]
