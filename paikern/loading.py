"""A model from one line of text, as the command line takes it, with an input that fits.

    resnet20                       a model of the zoo (`pk.zoo.names()`)
    timm:resnet18                  an architecture of timm, without its weights
    hf:path/to/folder              a local transformers folder: config.json, weights if present
    package.module:function        your own code; returns a model, or (model, example_inputs)

Nothing is downloaded. Values come from a seed, from the folder, or from a checkpoint file.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from paikern import zoo
from paikern._names import storage_key, strip_wrappers
from paikern.errors import PaikernError, PaikernWarning

__all__ = ["ModelLoadError", "load_checkpoint", "load_model", "parse_shape"]

# Where training scripts put the state dict inside a checkpoint.
_NESTED_KEYS = ("state_dict", "model_state_dict", "model", "module", "net")
_SHOWN_NAMES = 5
_TOKENS = 16
_keep_alive: list[torch.library.Library] = []


class ModelLoadError(PaikernError, ValueError):
    """A model or a checkpoint that cannot be loaded: one line that names it and the fix."""


def load_model(
    spec: str,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[nn.Module, Any]:
    """The model that `spec` names, and one example input.

    Args:
        spec: a zoo name, ``timm:NAME``, ``hf:DIR`` or ``package.module:function``. The last one
            runs that function, so it has to be code that you trust.
        checkpoint: a file for `load_checkpoint`.
        input_shape: shape of the example input, batch first, instead of the model's own. A model
            that takes token numbers gets zeros of that shape.
        seed: of the initial values; the global generator is left as it was.

    Returns:
        ``(model, example_inputs)``. The inputs are a tensor, a tuple, a dict of keyword inputs, or
        None where nothing is known about them.

    Raises:
        ModelLoadError: an unknown name, a missing package (with the line that installs it), a
            folder, function or checkpoint that does not fit.

    Warns:
        PaikernWarning: an ``hf:`` folder without weights; the values come from `seed` then.

    >>> model, x = load_model("lenet300")
    >>> tuple(model(x).shape)
    (1, 10)
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = _create(spec)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    if input_shape is not None:
        inputs = _reshaped(inputs, tuple(input_shape))
    return model, inputs


def parse_shape(text: str) -> tuple[int, ...]:
    """``1x3x32x32`` -> ``(1, 3, 32, 32)``; commas do as well.

    >>> parse_shape("1x3x32x32")
    (1, 3, 32, 32)
    """
    parts = re.split(r"[x,]", text.strip().lower())
    if not all(re.fullmatch(r"[1-9][0-9]{0,8}", part) for part in parts):
        raise ModelLoadError(
            f"input: a shape is positive sizes joined by 'x', batch first, such as 1x3x32x32; "
            f"got {text!r}"
        )
    return tuple(int(part) for part in parts)


# --- the four kinds of models ----------------------------------------------------------------


def _create(spec: str) -> tuple[nn.Module, Any]:
    prefix, colon, rest = spec.partition(":")
    if not colon:
        return _from_zoo(spec)
    if not rest:
        raise ModelLoadError(f"model: nothing follows the colon in {spec!r}")
    if prefix == "timm":
        return _from_timm(rest)
    if prefix == "hf":
        return _from_folder(Path(rest))
    return _from_function(prefix, rest)


def _from_zoo(name: str) -> tuple[nn.Module, Any]:
    if name not in zoo.names():
        near = difflib.get_close_matches(name.lower(), zoo.names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ModelLoadError(
            f"model: unknown model {name!r}; {hint}known: {', '.join(zoo.names())}, or timm:NAME, "
            "hf:DIR, package.module:function"
        )
    model = zoo.create(name)
    return model, zoo.example_input(model)


def _from_timm(name: str) -> tuple[nn.Module, Any]:
    _repair_torchvision()
    timm = _optional("timm", "timm")
    known = timm.list_models()
    # A tag after the dot names weights ("resnet18.a1_in1k"); the architecture is what is built.
    if name.partition(".")[0] not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean 'timm:{near[0]}'?" if near else "see timm.list_models()"
        raise ModelLoadError(f"model: timm has no model {name!r}; {hint}")
    model = timm.create_model(name, pretrained=False)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", {})
    size = config.get("input_size") if isinstance(config, Mapping) else None
    return model, None if size is None else torch.ones(1, *size)


def _from_folder(folder: Path) -> tuple[nn.Module, Any]:
    if not (folder / "config.json").is_file():
        raise ModelLoadError(
            f"model: hf:{folder} is no local transformers folder, it has no config.json; give the "
            "folder of a downloaded model (nothing is downloaded here)"
        )
    _repair_torchvision()
    transformers = _optional("transformers", "transformers")
    weighted = any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin"))
    with _one_line(f"model: hf:{folder}"):
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        named = (getattr(config, "architectures", None) or [""])[0]
        cls = getattr(transformers, named, None)
        if weighted:
            loader = transformers.AutoModel if cls is None else cls
            model = loader.from_pretrained(folder, local_files_only=True)
        else:
            model = transformers.AutoModel.from_config(config) if cls is None else cls(config)
    if not weighted:
        warnings.warn(
            f"hf:{folder} holds a config only, no weights; the values are fresh ones",
            PaikernWarning,
            stacklevel=4,
        )
    return model, _transformers_input(config)


def _transformers_input(config: Any) -> Any:
    """Pixels for a vision config, token numbers for a text config, None for anything else."""
    size = getattr(config, "image_size", None)
    if isinstance(size, (int, list, tuple)):
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.ones(1, channels, height, width)}
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        return None
    length = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
    return {"input_ids": torch.arange(1, length + 1).remainder(vocabulary).unsqueeze(0)}


def _from_function(module_name: str, function_name: str) -> tuple[nn.Module, Any]:
    spec = f"{module_name}:{function_name}"
    with _one_line(f"model: {spec}"), _working_folder_importable():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # a package that the module itself wants
            raise ModelLoadError(
                f"model: {spec}: there is no module {error.name!r}; run from the folder that holds "
                "it, or install it (other forms: a zoo name, timm:NAME, hf:DIR)"
            ) from error
        made = _attribute(module, function_name, spec)()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelLoadError(
            f"model: {spec} must return a torch.nn.Module or (module, example_inputs), got "
            f"{type(model).__name__}"
        )
    return model, inputs


def _attribute(module: ModuleType, name: str, spec: str) -> Callable[[], Any]:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ModelLoadError(f"model: {spec}: {module.__name__} has no {part!r}{hint}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise ModelLoadError(f"model: {spec} is no function but a {type(found).__name__}")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # builtins have none
        return found
    needed = [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise ModelLoadError(
            f"model: {spec} wants the argument {needed[0]!r}; name a function that needs none"
        )
    return found


def _reshaped(inputs: Any, shape: tuple[int, ...]) -> Any:
    """`inputs` with the one tensor in it replaced by one of another shape."""
    if isinstance(inputs, Mapping) and len(inputs) == 1:
        return {key: _reshaped(value, shape) for key, value in inputs.items()}
    if isinstance(inputs, tuple) and len(inputs) == 1:
        return (_reshaped(inputs[0], shape),)
    if inputs is not None and not isinstance(inputs, Tensor):
        raise ModelLoadError("input: this model takes several inputs, one shape cannot describe it")
    if isinstance(inputs, Tensor) and not inputs.is_floating_point():
        return torch.zeros(shape, dtype=inputs.dtype)
    return torch.ones(shape)


# --- checkpoints -----------------------------------------------------------------------------


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state dict into `model`; the model is not touched unless everything fits.

    Args:
        model: gets the values, converted to its own dtypes.
        path: a safetensors file, or one of ``torch.save`` that holds tensors only (it is read with
            ``weights_only=True``, so no code in it runs). The state dict may lie under
            ``state_dict``, ``model_state_dict`` or ``model``; prefixes of wrappers such as
            ``module.`` are taken off.

    Raises:
        ModelLoadError: the file cannot be read, or names of missing, unexpected or wrongly shaped
            tensors.

    >>> import tempfile, pathlib
    >>> net = nn.Linear(2, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "net.pt")
    ...     torch.save({"state_dict": {"module.weight": torch.ones(1, 2), "bias": net.bias}}, file)
    ...     load_checkpoint(net, file)
    >>> net.weight.tolist()
    [[1.0, 1.0]]
    """
    found = _read_state(Path(path))
    state = model.state_dict()
    given = {_own_name(name, state): value for name, value in found.items()}
    problems = _misfits(model, state, given)
    if problems:
        raise ModelLoadError(f"checkpoint: {os.fspath(path)} does not fit: {'; '.join(problems)}")
    model.load_state_dict(given, strict=False)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelLoadError(f"checkpoint: there is no file {os.fspath(path)}")
    try:
        if is_safetensors(path):
            from safetensors.torch import load_file

            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelLoadError(
            f"checkpoint: {os.fspath(path)} is damaged or holds more than tensors and is not "
            "unpickled; save model.state_dict() instead, best as safetensors"
        ) from error
    except Exception as error:
        raise ModelLoadError(
            f"checkpoint: {os.fspath(path)} cannot be read ({first_line(error)}); give a "
            "safetensors file or torch.save(model.state_dict())"
        ) from error
    for key in _NESTED_KEYS:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not any(isinstance(v, Tensor) for v in held.values()):
        raise ModelLoadError(
            f"checkpoint: {os.fspath(path)} holds no state dict but a {type(held).__name__}"
        )
    return {str(name): value for name, value in held.items() if isinstance(value, Tensor)}


def is_safetensors(path: Path) -> bool:
    """By content: eight bytes of length, then JSON. Files get renamed."""
    with open(path, "rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or start[8:9] == b"{"


def _own_name(name: str, state: Mapping[str, Tensor]) -> str:
    return name if name in state else strip_wrappers(name)


def _misfits(
    model: nn.Module, state: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> list[str]:
    loaded = {storage_key(state[name]) for name in given if name in state}
    missing = [
        name
        for name, tensor in state.items()
        # A tied weight is stored once, and old checkpoints do not count BatchNorm's batches.
        if name not in given
        and storage_key(tensor) not in loaded
        and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in given if name not in state]
    shapes = [
        f"{name} has shape {list(value.shape)}, the model's is {list(state[name].shape)}"
        for name, value in given.items()
        if name in state and value.shape != state[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"missing {_listed(missing)}")
    if unexpected:
        problems.append(f"unexpected {_listed(unexpected)}")
    return problems + shapes[:_SHOWN_NAMES]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


# --- optional packages -----------------------------------------------------------------------


def _optional(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if importlib.util.find_spec(module) is None:
            raise ModelLoadError(
                f"model: {module} is not installed; pip install {package}"
            ) from error
        raise ModelLoadError(
            f"model: {module} cannot be imported ({first_line(error)}); pip install -U {package}"
        ) from error


def _repair_torchvision() -> None:
    """Declare the two operators without which torchvision does not import beside a CPU torch.

    The torchvision wheel of the same release wants a native library that only CUDA builds of torch
    bring, and timm and transformers fail with it. They need its image transforms at most.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep_alive.append(library)


@contextmanager
def _working_folder_importable() -> Iterator[None]:
    """As with `python -m`: the installed command has its own folder on the path instead."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Errors of other people's code as one line; the cause stays attached for --debug."""
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{what}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
