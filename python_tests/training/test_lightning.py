"""The Lightning callback against a plain loop, and its checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import paikern as pk
from python_tests.training import nets

lightning = pytest.importorskip("lightning.pytorch")
from paikern.training.lightning import LightningPruner  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nets.make("residual")
        self.rates: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        if index == 0:
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = nets.sgd(self)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*nets.samples("residual")), batch_size=8)


def fit(
    callback: LightningPruner, epochs: int, folder: Path, resume: str | None = None, **more: Any
) -> tuple[Module, Any]:
    module = Module()
    saver = lightning.callbacks.ModelCheckpoint(
        folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[callback, saver],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.fit(module, loader(), ckpt_path=resume)
    return module, trainer


def test_same_masks_as_a_plain_loop(tmp_path: Path) -> None:
    callback = LightningPruner("asni", sparsity=0.8)
    module, trainer = fit(callback, 4, tmp_path)
    assert trainer.callback_metrics["sparsity"] == pytest.approx(0.8, abs=1e-2)

    plain = Module()
    [optimizer], [scheduler] = plain.configure_optimizers()
    pruner = pk.pruner("asni", plain, sparsity=0.8, epochs=4, optimizer=optimizer)
    for _ in range(4):
        nets.train_epoch(plain.net, optimizer, "residual")
        scheduler.step()
        event = pruner.on_epoch_end(plain)
    assert callback.pruner is not None
    assert callback.pruner.masks == pruner.masks
    assert callback.event == event
    assert nets.equal_states(nets.copy_of(module), nets.copy_of(plain))
    assert next(iter(pruner.masks)) == "net.stem.weight"


@pytest.mark.parametrize("cut", [0, 2, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("asni", {"sparsity": 0.8}),
        ("imp", {"sparsity": 0.3, "epochs": 2}),
        ("earlycrop_u", {"sparsity": 0.5, "latest": 3, "method": "snip"}),
        ("one_shot", {"sparsity": 0.5, "at": 2, "method": "synflow"}),
    ],
)
def test_training_goes_on_from_a_checkpoint(
    name: str, options: dict[str, Any], cut: int, tmp_path: Path
) -> None:
    whole = LightningPruner(name, **options)
    module, _ = fit(whole, 5, tmp_path)
    rest = LightningPruner(name, **options)
    again, _ = fit(rest, 5, tmp_path / "again", str(tmp_path / f"epoch={cut}.ckpt"))
    assert whole.pruner is not None
    assert rest.pruner is not None
    assert rest.pruner.masks == whole.pruner.masks
    assert rest.event == whole.event
    assert rest.pruner.masks.sparsity > 0
    assert nets.equal_states(nets.copy_of(again), nets.copy_of(module))
    assert module.rates[cut + 1 :] == again.rates


def test_rewinding_starts_the_schedule_again_and_stops(tmp_path: Path) -> None:
    callback = LightningPruner("imp", sparsity=0.3, epochs=2, log=False)
    module, trainer = fit(callback, 100, tmp_path)
    assert callback.event is not None
    assert callback.event.stop
    assert callback.pruner is not None
    assert callback.pruner.level == 2  # type: ignore[attr-defined]
    assert trainer.current_epoch == 6
    assert module.rates == pytest.approx([0.05, 0.025] * 3)
    callback.pruner.masks.verify(module)


def test_a_checkpoint_of_another_epoch_is_refused(tmp_path: Path) -> None:
    fit(LightningPruner("asni", sparsity=0.8), 3, tmp_path)
    path = tmp_path / "epoch=1.ckpt"
    content = torch.load(path, weights_only=False)
    content["callbacks"]["paikern.asni"]["epoch"] = 1
    torch.save(content, path)
    with pytest.raises(ValueError, match="has ended 2 epochs, its pruner 1; write checkpoints"):
        fit(LightningPruner("asni", sparsity=0.8), 3, tmp_path / "again", str(path))


def test_endless_training_needs_epochs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_epochs=-1; give epochs= to LightningPruner"):
        fit(LightningPruner("asni", sparsity=0.8), -1, tmp_path, max_steps=3)


def test_unknown_names_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="did you mean 'asni'"):
        LightningPruner("asny", sparsity=0.8)
