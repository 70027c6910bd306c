"""`pk.pruner`: a method that prunes during training, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

from torch import Tensor, nn

from paikern import budget
from paikern._lookup import by_name, check_options
from paikern.prunable import Filter
from paikern.scorers.base import check_loss, scorer_class
from paikern.selection import ON_COLLAPSE
from paikern.training.base import Pruner, Settings, as_optimizers, as_schedulers

_PRUNERS: dict[str, type[Pruner]] = {}
_T = TypeVar("_T", bound=type[Pruner])


def register_pruner(name: str) -> Callable[[_T], _T]:
    """Make a `Pruner` available as `pk.pruner(name, model)`; its fields are the method's options.

    Example:
        >>> import torch, paikern as pk
        >>> from paikern.training import Pruner, register_pruner
        >>> @register_pruner("patient")
        ... class Patient(Pruner):
        ...     summary = "waits"
        ...     def epoch_end(self, model, epoch, data):
        ...         return self.event(epoch, "waited")
        >>> pruner = pk.pruner("patient", torch.nn.Linear(2, 2), sparsity=0.5, epochs=3)
        >>> pruner.on_epoch_end().reason
        'waited'
    """

    def register(cls: _T) -> _T:
        cls.name = name
        _PRUNERS[name] = dataclasses.dataclass(eq=False)(cls)
        return cls

    return register


def pruner_names() -> list[str]:
    """The methods that prune during training."""
    return sorted(_PRUNERS)


def pruner_class(name: str) -> type[Pruner]:
    """The pruner registered under `name`; ValueError suggests the nearest."""
    return by_name(
        _PRUNERS,
        name,
        parameter="pruner",
        what="name",
        example="asni",
        fix="see pk.training.pruner_rows()",
        more="; any method of pk.methods() prunes during training as pruner('one_shot', "
        "method=..., at=...)",
    )


def pruner_rows() -> list[dict[str, Any]]:
    """The methods, one row each: name, summary, source, options (name -> default), and what they
    need as in `pk.methods()`; those with an option `method` what that one needs by default.

    Example:
        >>> [row["name"] for row in pruner_rows() if row["needs_labels"]]
        ['earlycrop_s', 'earlycrop_u', 'gate_decorators']
    """
    rows = []
    for name, cls in sorted(_PRUNERS.items()):
        options = {f.name: _default(f) for f in dataclasses.fields(cls)}
        scorer = scorer_class(options["method"]) if "method" in options else None
        rows.append(
            {
                "name": name,
                "summary": cls.summary,
                "source": cls.source,
                "needs_inputs": scorer is not None and scorer.needs_inputs,
                "needs_data": cls.needs_data if scorer is None else scorer.needs_data,
                "needs_labels": cls.takes_loss if scorer is None else scorer.needs_labels,
                "options": options,
            }
        )
    return rows


def pruner(
    name: str,
    model: nn.Module,
    *,
    epochs: int,
    sparsity: float | None = None,
    density: float | None = None,
    compression: float | None = None,
    optimizer: Any = None,
    scheduler: Any = None,
    data: Any = None,
    loss_fn: str | Callable[[Any, Any], Tensor] | None = None,
    example_inputs: Any = None,
    ignore: Filter = (),
    include: Filter = None,
    seed: int = 0,
    on_collapse: str = "warn",
    **options: Any,
) -> Pruner:
    """A method that prunes while the model is trained; call its `on_epoch_end` after every epoch.

    In a distributed run every process makes a pruner and calls it; where the method reads data, the
    masks of the first process count.

    Args:
        name: "asni", "imp", "ltr", "earlycrop_u", ... (`paikern.training.pruner_names()`).
        model: the model before its training; it is not changed here.
        epochs: epochs of a training run; of one level where the method rewinds.
        sparsity: fraction removed in the end, in [0, 1); or `density` or `compression`, as
            in `pk.prune`.
        optimizer: the optimizer, or several; pruned weights and their state stay 0 after every
            step. Without one they are zeroed at the ends of epochs only: use
            `pruner.masks.attach`, or `pruner.masks.apply` after each step.
        scheduler: learning-rate schedules, for methods that rewind to start them again.
        data, loss_fn, example_inputs: as in `pk.prune`, read by methods with `needs_data` in the
            epoch in which they prune. A loss_fn is refused where the method has no loss.
        ignore, include, seed, on_collapse: as in `pk.prune`.
        **options: options of the method.

    Returns:
        The pruner: `.on_epoch_end(model) -> Event`, `.masks`, `.state_dict()`,
        `.load_state_dict(state)`, `.save(path)`, `.load(path)`.

    Raises:
        ValueError: unknown name or option, an option out of range, missing data, a loss_fn for a
            method without a loss, nothing to prune.
        SparsityError: the sparsity is out of range or keeps nothing.
        The model is unchanged.

    Example:
        >>> import torch, paikern as pk
        >>> net = pk.zoo.create("mlp", sizes=(8, 16, 4))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> pruner = pk.pruner("asni", net, sparsity=0.75, epochs=5, optimizer=optimizer)
        >>> for epoch in range(5):
        ...     net(torch.randn(4, 8)).square().mean().backward()  # one epoch of training
        ...     optimizer.step()
        ...     event = pruner.on_epoch_end(net)
        >>> event.kept, event.total
        (48, 192)
    """
    cls = pruner_class(name)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_options(cls, options)
    if isinstance(epochs, bool) or not isinstance(epochs, Integral) or epochs < 1:
        raise ValueError(f"epochs must be an integer >= 1, got {epochs!r}")
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    if on_collapse not in ON_COLLAPSE:
        raise ValueError(f"on_collapse must be one of {ON_COLLAPSE}, got {on_collapse!r}")
    if cls.needs_data and data is None:
        raise ValueError(
            f"data: pruner {cls.name!r} reads samples when it prunes; pass data=, the training "
            "loader for instance"
        )
    check_loss("pruner", cls.name, cls.takes_loss, loss_fn)
    fraction = None
    given = (sparsity, density, compression)
    if cls.needs_sparsity or any(value is not None for value in given):
        fraction = budget.resolve_sparsity(sparsity, density, compression=compression)
    settings = Settings(
        fraction,
        int(epochs),
        as_optimizers(optimizer),
        as_schedulers(scheduler),
        data,
        loss_fn,
        example_inputs,
        ignore,
        include,
        int(seed),
        on_collapse,
    )
    made = cls(**options)
    made.start(model, settings)
    return made


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _check_options(cls: type[Pruner], options: Mapping[str, Any]) -> None:
    check_options("pruner", cls.name, {f.name for f in dataclasses.fields(cls)}, options)
    for field in dataclasses.fields(cls):
        if field.name in options:
            _check_type(field.name, str(field.type), options[field.name])


_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((Integral,), "an integer"),
    "float": ((Real,), "a number"),
    "str": ((str,), "a string"),
    "Mapping[str, Any]": ((Mapping,), "a dict of options"),
}


def _check_type(name: str, annotation: str, value: Any) -> None:
    """Refuse what the annotation of an option does not allow; others than these allow anything."""
    plain = annotation.removesuffix(" | None")
    if plain not in _TYPES or (value is None and plain != annotation):
        return
    types, what = _TYPES[plain]
    if isinstance(value, bool) or not isinstance(value, types):
        either = " or None" if plain != annotation else ""
        raise TypeError(f"{name} must be {what}{either}, got {value!r}")
