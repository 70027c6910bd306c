"""The callback of the Hugging Face Trainer: pruning, checkpoints, stopping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from python_tests.training import nets

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from paikern.training.huggingface import FILE, HFPruner  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:layer collapse", "ignore::UserWarning:torch")


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.x, self.y = nets.samples("bert")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.x[index], "labels": self.y[index]}


def bert() -> nn.Module:
    return nets.make("bert").bert


def fit(
    callback: HFPruner, epochs: int, folder: Path, resume: str | None = None
) -> tuple[nn.Module, Any]:
    model = bert()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        save_strategy="epoch",
        learning_rate=2e-3,
        report_to=[],
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("asni", {"sparsity": 0.6}),
        ("imp", {"sparsity": 0.3, "epochs": 1}),
        ("one_shot", {"sparsity": 0.6, "at": 2, "method": "snip"}),
    ],
)
def test_prunes_and_goes_on_from_a_checkpoint(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    whole = HFPruner(name, **options)
    model, trainer = fit(whole, 3, tmp_path)
    assert whole.pruner is not None
    assert whole.event is not None
    assert whole.event.epoch == 3
    assert whole.pruner.epoch == 3
    assert whole.pruner.masks.sparsity > 0.25
    whole.pruner.masks.verify(model)
    steps = trainer.state.global_step // 3
    assert (tmp_path / f"checkpoint-{steps}" / FILE).exists()

    rest = HFPruner(name, **options)
    again, _ = fit(rest, 3, tmp_path, str(tmp_path / f"checkpoint-{steps}"))
    assert rest.pruner is not None
    assert rest.event == whole.event
    assert rest.pruner.masks == whole.pruner.masks
    assert nets.equal_states(nets.copy_of(again), nets.copy_of(model))


def test_saved_models_hold_the_zeros_under_their_own_keys(tmp_path: Path) -> None:
    callback = HFPruner("asni", sparsity=0.6)
    model, trainer = fit(callback, 2, tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(model).from_pretrained(str(tmp_path / "saved"))
    assert callback.pruner is not None
    callback.pruner.masks.verify(loaded)
    assert loaded.state_dict().keys() == bert().state_dict().keys()


def test_stops_when_the_method_does(tmp_path: Path) -> None:
    callback = HFPruner("imp", sparsity=0.3, epochs=1)
    _, trainer = fit(callback, 50, tmp_path)
    assert trainer.state.epoch == 3
    assert callback.event is not None
    assert callback.event.stop


def test_a_checkpoint_without_a_pruner_is_refused(tmp_path: Path) -> None:
    fit(HFPruner("asni", sparsity=0.6), 2, tmp_path)
    folder = tmp_path / "checkpoint-3"
    (folder / FILE).unlink()
    with pytest.raises(ValueError, match=r"there is no .*give the checkpoint's folder"):
        fit(HFPruner("asni", sparsity=0.6), 2, tmp_path, str(folder))


def test_unknown_names_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="did you mean 'imp'"):
        HFPruner("impp", sparsity=0.8)


def test_masks_of_a_callback_can_be_saved(tmp_path: Path) -> None:
    callback = HFPruner("one_shot", sparsity=0.5, at=1, method="magnitude")
    fit(callback, 1, tmp_path)
    assert callback.pruner is not None
    callback.pruner.masks.save(tmp_path / "masks")
    assert pk.load_masks(tmp_path / "masks") == callback.pruner.masks
