"""A DPaI run on disk: interrupted runs go on where they stopped, bit for bit.

One safetensors file: scores, Adam's moments, the statistics of every step so far, and in the
header what the run was made with. Nothing else is needed: a step depends on the scores alone, and
its mask is the top-k of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from paikern._files import replacing
from paikern.errors import PaikernError
from paikern.scorers.dpai_trainer import DPaITrainer, StepStatistics

_FORMAT = "paikern-dpai-state-1"
_SAVE_EVERY_SECONDS = 60.0


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b of a header and of tensors in the order of their names."""
    found = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.view(-1).numpy().data)
    return found.hexdigest()


def _network(trainer: DPaITrainer) -> str:
    """A digest of what paths run through: every step with its shapes, and the inputs."""
    graph = trainer.run.graph
    plain = (int, float, str, tuple, type(None))
    steps = [
        (type(step).__name__, [(f.name, getattr(step, f.name)) for f in fields(step)])
        for step in graph.steps
    ]
    told = [(kind, [(n, v) for n, v in held if isinstance(v, plain)]) for kind, held in steps]
    text = repr((told, sorted(graph.inputs.items()), graph.outputs))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class SavedRun:
    """Keeps the file `path` of one trainer; a context manager that saves when it is left.

    Example:
        >>> import tempfile, pathlib, torch, paikern as pk
        >>> net = pk.zoo.create("mlp", sizes=(8, 16, 4))
        >>> folder = tempfile.TemporaryDirectory()
        >>> options = dict(sparsity=0.5, example_inputs=torch.ones(1, 8), apply=False)
        >>> file = pathlib.Path(folder.name) / "run.safetensors"
        >>> first = pk.prune(net, "dpai", steps=3, state=file, **options)
        >>> longer = pk.prune(net, "dpai", steps=5, state=file, **options)
        >>> straight = pk.prune(net, "dpai", steps=5, **options)
        >>> all(torch.equal(longer[n], straight[n]) for n in straight)
        True
        >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str], trainer: DPaITrainer) -> None:
        self.path = Path(path)
        self.trainer = trainer
        self._saved_at = time.monotonic()
        given = trainer.settings.init_scores is not None
        self._start = _digest({}, trainer.s) if given else None
        self._network = _network(trainer)
        folder = self.path.absolute().parent
        if not folder.is_dir():  # found out now, not after an hour of training
            raise ValueError(f"state: folder {str(folder)!r} does not exist; create it first")
        if not os.access(folder, os.W_OK):
            raise ValueError(f"state: folder {str(folder)!r} cannot be written; name another")
        if self.path.is_dir():
            raise ValueError(f"state: {str(self.path)!r} is a folder; name a file in it")

    def __enter__(self) -> SavedRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A run that broke (dead, NaN) leaves the last good file; an interrupted one is saved.
        broke = kind is not None and issubclass(kind, (PaikernError, ValueError))
        if not broke:
            self.trainer.settle()
        if self.trainer.whole and not broke:
            self.save()

    def tick(self) -> None:
        """Save once a minute."""
        if time.monotonic() - self._saved_at > _SAVE_EVERY_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the file, as a whole or not at all."""
        t = self.trainer
        tensors = {f"s.{name}": s for name, s in t.s.items()}
        tensors |= {f"m.{name}": m for name, m in t.m.items()}
        tensors |= {f"v.{name}": v for name, v in t.v.items()}
        rows = [[r.objective, r.nodes, r.kernels, r.params] for r in t.history]
        tensors["history"] = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
        header = {
            "format": _FORMAT,
            "steps": t.steps,
            "unchanged": t.unchanged,
            "settings": self._settings(),
        }
        header["digest"] = _digest(header, tensors)
        content = save(tensors, metadata={"paikern": json.dumps(header)})
        with replacing(self.path) as file:
            file.write(content)
        self._saved_at = time.monotonic()

    def resume(self, steps: int) -> list[StepStatistics]:
        """Put the trainer where the file left it; returns the steps done so far.

        Raises:
            ValueError: the file is of another run, or has done more than `steps` steps.
        """
        if not self.path.exists():
            return []
        header, tensors = self._read()
        self._compare(header["settings"])
        if header["steps"] > steps:
            raise ValueError(
                f"state: {str(self.path)!r} has done {header['steps']} steps, more than "
                f"steps={steps}; ask for at least as many or use another file"
            )
        t = self.trainer
        for key, held in (("s", t.s), ("m", t.m), ("v", t.v)):
            for name, tensor in held.items():
                tensor.copy_(tensors[f"{key}.{name}"])
        history = [
            StepStatistics(i, row[0], int(row[1]), int(row[2]), int(row[3]), t.published)
            for i, row in enumerate(tensors["history"].tolist(), 1)
        ]
        t.restore(history, header["unchanged"])
        return list(history)

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["paikern"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if header["format"] != _FORMAT:
                raise ValueError(header["format"])
            if header.pop("digest") != _digest(header, tensors):
                raise ValueError("its digest is that of other content")
            expected = dict(self._shapes())
            for key, shape in expected.items():
                if tuple(tensors[key].shape) != shape:
                    raise ValueError(key)
            if len(tensors["history"]) != header["steps"]:
                raise ValueError("history")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            self._compare_if_readable()
            raise ValueError(
                f"state: {str(self.path)!r} is no saved run of this model and method "
                f"({type(error).__name__}: {error}); remove it or use another file"
            ) from error
        return header, tensors

    def _compare_if_readable(self) -> None:
        """Where only the settings differ, say that rather than what follows from it."""
        try:
            with safe_open(self.path, framework="pt") as file:
                settings = json.loads(file.metadata()["paikern"])["settings"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return
        self._compare(settings)

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        t = self.trainer
        for key, held in (("s", t.s), ("m", t.m), ("v", t.v)):
            for name, tensor in held.items():
                yield f"{key}.{name}", tuple(tensor.shape)

    def _settings(self) -> dict[str, Any]:
        t, s = self.trainer, self.trainer.settings
        return {
            "variant": t.run.variant,
            "alpha": s.alpha,
            "beta": s.beta,
            "lr": s.lr,
            "optimizer": s.optimizer,
            "keep_nodes": s.keep_nodes,
            "revive": s.revive,
            "seed": t.run.seed if s.init_scores is None else None,
            "init_scores": self._start,
            "network": self._network,
            "kept": dict(zip(t.s, t.kept, strict=True)),
        }

    def _compare(self, saved: dict[str, Any]) -> None:
        for name, value in self._settings().items():
            if saved.get(name) != value:
                if name == "kept":
                    raise ValueError(
                        f"state: {str(self.path)!r} was made with other layers or another "
                        "sparsity; use another file or the same settings"
                    )
                if name in ("network", "init_scores"):
                    what = "network or input size" if name == "network" else "init_scores"
                    raise ValueError(
                        f"state: {str(self.path)!r} was made with another {what}; use another "
                        "file or the same"
                    )
                raise ValueError(
                    f"state: {str(self.path)!r} was made with {name}={saved.get(name)!r}, this run "
                    f"has {name}={value!r}; use another file or the same settings"
                )
