"""The architectures that the pruning papers and the benchmarks use, written from their papers.

Every model takes a batch, works with ``torch.export`` and under ``torch.device("meta")``, and
imports nothing but torch:

>>> import torch
>>> from paikern import zoo
>>> with torch.device("meta"):  # shapes only: no memory, no initial values
...     model = zoo.create("resnet20", num_classes=10)
>>> model(zoo.example_input(model)).shape
torch.Size([1, 10])
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from paikern.zoo._common import InputSpec
from paikern.zoo.gpt2 import gpt2
from paikern.zoo.llama import llama_7b, llama_160m, llama_tiny
from paikern.zoo.mlp import lenet300, mlp
from paikern.zoo.resnet import resnet18, resnet20, resnet50
from paikern.zoo.vgg import vgg16_bn, vgg19_bn
from paikern.zoo.vit import vit_b_16

__all__ = ["InputSpec", "create", "example_input", "names"]

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "lenet300": lenet300,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vgg16_bn": vgg16_bn,
    "vgg19_bn": vgg19_bn,
    "vit_b_16": vit_b_16,
    "gpt2": gpt2,
    "llama-tiny": llama_tiny,
    "llama-160m": llama_160m,
    "llama-7b": llama_7b,
}


def names() -> list[str]:
    """Names that :func:`create` knows."""
    return list(_BUILDERS)


def create(name: str, *, seed: int | None = None, **kwargs: Any) -> nn.Module:
    """Build a zoo model, freshly initialised, in training mode.

    Args:
        name: one of :func:`names`.
        seed: seeds the initial values and leaves the global generator as it was; ``None`` draws
            from the global generator.
        **kwargs: of the architecture, for example ``num_classes``, ``image_size``, ``in_channels``,
            ``layers``; ``help(paikern.zoo.resnet.resnet20)`` and its neighbours list them.

    Raises:
        ValueError: an unknown name (the nearest one is suggested) or an argument out of range.
        TypeError: an argument that the architecture does not have.

    >>> sum(p.numel() for p in create("lenet300").parameters() if p.ndim > 1)
    266200
    """
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name.lower(), _BUILDERS, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(_BUILDERS)}"
        raise ValueError(f"zoo.create: no model is named '{name}'; {hint}")
    with _seeded(seed):
        return _BUILDERS[name](**kwargs)


def example_input(
    model: str | nn.Module,
    *,
    batch: int = 1,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """A random input that the model accepts: ``[batch, ...]``, normal values or token numbers.

    Args:
        model: a model from :func:`create`, or a name (the input of that name's default arguments).
        batch: size of the first dimension.
        seed: of the values.
        device: default is that of the model's first parameter (meta included), the CPU for a name.

    Raises:
        TypeError: a model that is not of the zoo.

    >>> example_input("lenet300", batch=2).shape
    torch.Size([2, 784])
    """
    if isinstance(model, str):
        with torch.device("meta"):
            spec_owner = create(model)
        device = "cpu" if device is None else device
    else:
        spec_owner = model
        device = next(model.parameters()).device if device is None else device
    spec = getattr(spec_owner, "input_spec", None)
    if not isinstance(spec, InputSpec):
        raise TypeError(
            f"zoo.example_input: {type(spec_owner).__name__} is not a model of the zoo; "
            "build an input of its own shape"
        )
    return spec.sample(batch, seed, torch.device(device))


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
