"""Iterative magnitude pruning with rewinding: train, remove the smallest, go back, train again.

Level 0 trains the dense network. At the end of each level the smallest 20 % of the survivors are
removed over all layers together,

    k_{l+1} = max(ceil((1 - fraction) * k_l), k)      k = N - floor(sparsity * N)

everything else goes back to what it was at the rewind point, the optimizer starts anew, and the
whole schedule is trained again. The last level ends with exactly k weights, trained.

Source: Frankle and Carbin 2019 (arXiv:1803.03635) for the rewind to initialisation; Renda et al.
2020 (arXiv:2003.02389) and Frankle et al. 2020 (arXiv:1912.05671) for a later rewind point. With
`levels`, the densities are those of the code of Tanaka et al. 2020: d ** ((l + 1) / levels).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paikern.budget import keep_count
from paikern.errors import MaskFormatError
from paikern.masks import MaskSet
from paikern.training.base import Event, Pruner, check_finite
from paikern.training.registry import register_pruner
from paikern.training.restart import Restart
from paikern.training.survivors import keep_largest

_UNITS = ("step", "epoch")


@register_pruner("imp")
class IMP(Pruner):
    """Prune the smallest |w| of a trained network, rewind the others, train again.

    Args:
        fraction: of the survivors that a level removes.
        levels: prune in so many levels of equal compression instead; `fraction` is not used then.
        rewind: to the weights after so many steps or epochs of level 0; 0: to those before
            training.
        unit: "step" (of the first optimizer) or "epoch".

    `pk.pruner`'s `epochs` is the length of one level. The event at the end of a level is `rewound`,
    the one at the end of the last level says `stop`. A rewind puts all parameters and buffers
    (batch-norm statistics) back, empties the state of the optimizers, and gives them and the
    schedulers the settings that they had when the pruner was made.
    """

    fraction: float = 0.2
    levels: int | None = None
    rewind: int = 0
    unit: str = "epoch"

    summary = "removes 20 % of the trained weights a level and rewinds the others"
    source = "Frankle and Carbin 2019"

    def begin(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction must be in (0, 1), got {self.fraction}")
        if self.levels is not None and self.levels < 1:
            raise ValueError(f"levels must be >= 1 or None, got {self.levels}")
        if self.unit not in _UNITS:
            raise ValueError(f"unit must be one of {_UNITS}, got {self.unit!r}")
        if self.rewind < 0:
            raise ValueError(f"rewind must be >= 0, got {self.rewind}")
        if self.unit == "epoch" and self.rewind > self.settings.epochs:
            raise ValueError(
                f"rewind: level 0 has {self.settings.epochs} epochs, so rewind={self.rewind} never "
                "comes; use a lower one"
            )
        if self.rewind and self.unit == "step" and not self.settings.optimizers:
            raise ValueError(
                f"rewind={self.rewind} counts steps of the optimizer; pass optimizer=, or use "
                "unit='epoch'"
            )
        self.level, self._in_level, self._steps = 0, 0, 0
        self._rewind_state: dict[str, Tensor] = {}
        self._restart = Restart(self.settings.optimizers, self.settings.schedulers)
        self._counter: Any = None
        if self.rewind == 0:
            self._rewind_state = _snapshot(self.model)
        else:
            self._start_counting()

    def kept_at(self, level: int) -> int:
        """How many weights are kept while `level` is trained."""
        kept = self.total
        for done in range(1, level + 1):
            kept = self._next(done, kept)
        return kept

    def epoch_end(self, model: nn.Module, epoch: int, data: Any) -> Event:
        if self._finished:
            return self.event(epoch, f"level {self.level} was the last", stop=True)
        captured = self._rewind_state
        in_level = self._in_level + 1
        if self.unit == "epoch" and self.level == 0 and in_level == self.rewind:
            captured = _snapshot(model)
        if in_level < self.settings.epochs:
            self._in_level, self._rewind_state = in_level, captured
            return self.event(epoch, f"level {self.level}", values={"level": self.level})
        when = f"level {self.level}"
        weights = self.weights(model)
        check_finite(weights, when)
        last = self.masks.kept <= self.final_count
        kept = self.masks.kept if last else self._next(self.level + 1, self.masks.kept)
        if last or kept == self.masks.kept:
            self._in_level, self._rewind_state = in_level, captured
            why = "the sparsity is reached" if last else f"{kept} survivors are too few to remove"
            return self.event(
                epoch, f"{when} has ended: {why}", stop=True, values={"level": self.level}
            )
        _check_rewind(captured, model, self.rewind, self.unit)
        packed = keep_largest(
            weights, self.masks, kept, on_collapse=self.settings.on_collapse, when=when
        )
        level = self.level + 1
        found = MaskSet(packed, self.shapes, self.provenance(level=level))
        self._in_level, self._rewind_state, self.level = 0, captured, level
        self._stop_counting()
        self._detach()
        _put_back(captured, model)
        self.restart()
        self.set_masks(model, found)
        return self.event(
            epoch,
            f"{when} has ended: rewound to {self.unit} {self.rewind}",
            pruned=True,
            rewound=True,
            values={"level": level},
        )

    def restart(self) -> None:
        self._restart.now()

    def remove(self) -> None:
        super().remove()
        self._stop_counting()

    def progress(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "in_level": self._in_level,
            "steps": self._steps,
            "restart": self._restart.progress(),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {f"rewind/{name}": value for name, value in self._rewind_state.items()}

    def restore(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        found = {
            key.removeprefix("rewind/"): value
            for key, value in tensors.items()
            if key.startswith("rewind/")
        }
        if found:
            _check_rewind(found, self.model, self.rewind, self.unit)
        self._restart.restore(progress["restart"])
        self._rewind_state = found
        self.level, self._in_level = int(progress["level"]), int(progress["in_level"])
        self._steps = int(progress["steps"])
        self._stop_counting()
        if self.level == 0:
            self._start_counting()

    @property
    def _finished(self) -> bool:
        return self._in_level >= self.settings.epochs

    def _next(self, level: int, kept: int) -> int:
        if self.levels is None:
            survivors = math.ceil(round((1 - self.fraction) * kept, 9))
        else:
            density = (1 - self.sparsity) ** (level / self.levels)
            survivors = keep_count(self.total, 1 - density)
        return min(kept, max(survivors, self.final_count))

    def _start_counting(self) -> None:
        if self.rewind and self.unit == "step":
            first = self.settings.optimizers[0]
            self._counter = first.register_step_post_hook(self._count_step)

    def _stop_counting(self) -> None:
        if self._counter is not None:
            self._counter.remove()

    def _count_step(self, *_: object) -> None:
        self._steps += 1
        if self._steps == self.rewind:
            self._rewind_state = _snapshot(self.model)


@register_pruner("ltr")
class LTR(IMP):
    """`imp` with a rewind to the weights after 1000 steps: lottery ticket rewinding.

    Args:
        fraction, levels, rewind, unit: as in `imp`.
    """

    rewind: int = 1000
    unit: str = "step"

    summary = "imp, rewound to an early step instead of the initialisation"
    source = "Frankle et al. 2020; Renda et al. 2020"


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, in the memory of the host."""
    state = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state}


def _check_rewind(state: Mapping[str, Tensor], model: nn.Module, rewind: int, unit: str) -> None:
    if not state:
        raise ValueError(
            f"rewind: level 0 has ended before {unit} {rewind}, so there is nothing to go back to; "
            "use a lower rewind="
        )
    now = {n: tuple(t.shape) for n, t in (*model.named_parameters(), *model.named_buffers())}
    for name in state.keys() | now.keys():
        then = tuple(state[name].shape) if name in state else None
        if then != now.get(name):
            raise MaskFormatError(
                f"rewind: {name!r} had shape {then} at the rewind point and has {now.get(name)} "
                "now; rewinding needs the same model"
            )


def _put_back(state: Mapping[str, Tensor], model: nn.Module) -> None:
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(state[name])
