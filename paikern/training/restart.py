"""Optimizers and learning-rate schedules as they were before training."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch


class Restart:
    """What optimizers and schedules were set to when this was made; `now()` goes back to it.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.5)
        >>> restart = Restart([optimizer], [])
        >>> optimizer.param_groups[0]["lr"] = 0.1
        >>> restart.now()
        >>> optimizer.param_groups[0]["lr"]
        0.5
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], schedulers: Sequence[Any]
    ) -> None:
        self._optimizers, self._schedulers = optimizers, schedulers
        self._groups = [[_settings(g) for g in o.param_groups] for o in optimizers]
        self._schedules = [copy.deepcopy(s.state_dict()) for s in schedulers]

    def now(self) -> None:
        """Empty the optimizers' state and go back to the first settings."""
        for optimizer, groups in zip(self._optimizers, self._groups, strict=True):
            optimizer.state.clear()
            for group, was in zip(optimizer.param_groups, groups, strict=True):
                group.update(copy.deepcopy(was))
        for scheduler, state in zip(self._schedulers, self._schedules, strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))

    def progress(self) -> dict[str, Any]:
        """The numbers among the settings, as JSON can hold them."""
        return {"groups": _numbers(self._groups), "schedules": _numbers(self._schedules)}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Take over numbers: this may have been made when training had already begun.

        Raises:
            ValueError: of another number of optimizers, groups or schedules.
        """
        groups = [len(groups) for groups in self._groups]
        stored = [len(groups) for groups in progress["groups"]]
        if groups != stored or len(self._schedules) != len(progress["schedules"]):
            raise ValueError(
                f"state: made with optimizers of {stored} groups and "
                f"{len(progress['schedules'])} schedules, but this pruner has {groups} and "
                f"{len(self._schedules)}; pass the same optimizer= and scheduler="
            )
        self._groups = _merged(self._groups, progress["groups"])
        self._schedules = _merged(self._schedules, progress["schedules"])


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({key: value for key, value in group.items() if key != "params"})


def _numbers(value: Any) -> Any:
    """Numbers and None, within lists and string-keyed mappings; anything else is left out."""
    if isinstance(value, Mapping):
        found = {k: _numbers(v) for k, v in value.items() if isinstance(k, str)}
        return {key: kept for key, kept in found.items() if kept is not _LEFT_OUT}
    if isinstance(value, (list, tuple)):
        items = [_numbers(item) for item in value]
        return _LEFT_OUT if any(item is _LEFT_OUT for item in items) else items
    return value if value is None or isinstance(value, (bool, int, float)) else _LEFT_OUT


_LEFT_OUT = object()


def _merged(now: Any, stored: Any) -> Any:
    """`now` with the numbers of `stored` in the places where both have some."""
    if isinstance(now, Mapping) and isinstance(stored, Mapping):
        both = {key: _merged(now[key], stored[key]) for key in now.keys() & stored.keys()}
        return {**now, **both}
    if isinstance(now, (list, tuple)) and isinstance(stored, list) and len(now) == len(stored):
        return type(now)(_merged(a, b) for a, b in zip(now, stored, strict=True))
    return now if isinstance(now, (Mapping, list, tuple)) else stored
