"""The state of a pruner as a safetensors file: tensors by name, the rest as JSON in the header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from paikern._files import replacing
from paikern.errors import MaskFormatError

FORMAT = "paikern-pruner"
VERSION = 1
_KEYS = ("format", "version", "pruner", "settings", "epoch", "progress", "metadata", "tensors")


def save_state(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `state` whole or not at all."""
    rest = {key: value for key, value in state.items() if key != "tensors"}
    tensors = {key: value.detach().cpu().contiguous() for key, value in state["tensors"].items()}
    with replacing(path) as file:
        file.write(save(tensors, {"state": json.dumps(rest)}))


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_state` wrote.

    Raises:
        MaskFormatError: missing, truncated, or no state of a pruner.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            state["tensors"] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise MaskFormatError(
            f"{os.fspath(path)!r}: not the state of a pruner ({error}); write it with pruner.save"
        ) from error
    return state


def check(state: Mapping[str, Any], pruner: str, settings: Mapping[str, Any]) -> None:
    """Refuse a state that is none, or one of another method or of other options."""
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state must be what pruner.state_dict() returned, got {type(state).__name__}"
        )
    missing = [key for key in _KEYS if key not in state]
    if missing or state["format"] != FORMAT or state["version"] != VERSION:
        raise ValueError(
            f"state: not a {FORMAT} state of version {VERSION}"
            f"{': no ' + missing[0] if missing else ''}; pass what pruner.state_dict() returned"
        )
    if state["pruner"] != pruner:
        raise ValueError(f"state: of pruner {state['pruner']!r}, but this is {pruner!r}")
    stored = state["settings"]
    for key in settings.keys() | stored.keys():
        if settings.get(key) != stored.get(key):
            raise ValueError(
                f"state: made with {key}={stored.get(key)!r}, but this pruner has "
                f"{key}={settings.get(key)!r}; make it with the same options"
            )
