"""TGTModule and TGTCallback, with the real Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_kit import data, lightning, module, parts, trainer, weights
from torch import nn

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError
from tgt_fast.integrations.lightning import TGTCallback, TGTModule


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_step_of_micro_batches_is_that_of_one_batch(tmp_path: Path, clip: float | None) -> None:
    one = module()
    run = trainer(tmp_path, gradient_clip_val=clip)
    run.fit(one, data(28, 12))  # the last step has 4 rows
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert logged["loss"] == pytest.approx(logged["hard"] + logged["soft"] + logged["synthetic"], rel=1e-5)
    assert min(logged.values()) > 0
    several = module(accumulate=3, clip_grad_norm=clip)
    other = trainer(tmp_path)
    other.fit(several, data(28, 4))
    assert run.global_step == other.global_step == 3
    close(weights(several), weights(one))
    for name, value in other.callback_metrics.items():
        assert float(value) == pytest.approx(logged[name], rel=1e-4)


def test_modes_and_checkpoints(tmp_path: Path) -> None:
    student, objective = parts()
    student = nn.Sequential(student[0], nn.BatchNorm1d(8), nn.Dropout(0.5), student[2]).eval()
    labeler = objective.teacher.labeler
    seen: list[tuple[str, bool, bool]] = []

    class Watched(TGTModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(("train", all(m.training for m in student.modules()), labeler.training))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(("validate", any(m.training for m in student.modules()), labeler.training))
            super().validation_step(batch, batch_idx)

    made = Watched(student, objective, lambda p: torch.optim.AdamW(p, 1e-3))
    run = trainer(tmp_path, val_check_interval=4, num_sanity_val_steps=1, precision="bf16-mixed")
    run.fit(made, data(), data(16, 8))
    assert {entry for entry in seen if entry[0] == "train"} == {("train", True, False)}
    assert {entry for entry in seen if entry[0] == "validate"} == {("validate", False, False)}
    assert 0 <= float(run.callback_metrics["val_accuracy"]) <= 1
    run.save_checkpoint(tmp_path / "whole.ckpt")
    held = torch.load(tmp_path / "whole.ckpt", weights_only=False)
    assert all(name.startswith("student.") for name in held["state_dict"])
    assert "step" in held["callbacks"]["TGTCallback"]["sampler"]
    assert objective.synthetic_weight == 1.0


def test_an_evaluation_is_the_mean_over_its_rows(tmp_path: Path) -> None:
    made, batches = module().eval(), data(16, 5)
    run = trainer(tmp_path)
    found = run.validate(made, batches, verbose=False)[0]
    _, x, y = batches.dataset.tensors
    with torch.no_grad():
        logits = made.student(x)
        expected = made.objective.loss(logits, made.objective.teacher.label(x), y)
    assert found["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["val_accuracy"] == pytest.approx(float((logits.argmax(1) == y)[y >= 0].float().mean()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_with_chains_equals_an_unbroken_one(tmp_path: Path, accumulate: int) -> None:
    whole = module("persistent", accumulate=accumulate)
    trainer(tmp_path, max_epochs=2).fit(whole, data())
    first = trainer(tmp_path)
    first.fit(module("persistent", accumulate=accumulate), data())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module("persistent", accumulate=accumulate)
    trainer(tmp_path, max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value)
    assert resumed.objective.sampler.state_dict()["bank_latents"].shape[0] == 32
    without = TGTModule(nn.Linear(8, 3), tgt.TGTObjective(whole.objective.teacher), torch.optim.SGD)
    with pytest.raises(ArgumentError, match="checkpoint has a sampler"):
        TGTCallback(without.objective).load_state_dict(first.callbacks[-1].state_dict())


def test_a_callback_in_a_module_of_ones_own(tmp_path: Path) -> None:
    student, objective = parts("persistent")

    class Own(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = student

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            ids, x, y = batch
            return objective(self.net, x, y, sample_ids=ids, step=self.global_step)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    run = trainer(tmp_path, callbacks=[TGTCallback(objective)])
    run.fit(Own(), data())
    run.save_checkpoint(tmp_path / "own.ckpt")
    held = torch.load(tmp_path / "own.ckpt", weights_only=False)
    assert held["callbacks"]["TGTCallback"]["sampler"]["bank_latents"].shape[0] == 32


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    student, objective = parts()
    with pytest.raises(ArgumentError, match="give accumulate="):
        trainer(tmp_path, accumulate_grad_batches=2).fit(module(), data())
    with pytest.raises(ArgumentError, match="expected a tgt_fast"):
        TGTModule(student, lambda *x: 0, torch.optim.SGD)
    with pytest.raises(ArgumentError, match="student must be"):
        TGTModule(objective.teacher, objective, torch.optim.SGD)
    with pytest.raises(ArgumentError, match="gradient_clip_val"):
        TGTModule(student, objective, torch.optim.SGD, clip_grad_norm=1.0)
    with pytest.raises(ArgumentError, match="columns"):
        trainer(tmp_path).fit(module(), [{"x": torch.randn(4, 8), "y": torch.tensor([0, 1, 2, 0])}])
