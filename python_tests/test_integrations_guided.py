"""TGTTrainer, with the real transformers and accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import integrations_kit as kit
import pytest
import torch
from integrations_kit import _quick_trainers, arguments, assert_close, guided
from torch import nn

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, CheckpointError
from tgt_fast.integrations.transformers import TGTTrainer

__all__ = ["_quick_trainers"]  # for each test


@pytest.mark.parametrize("mode", ["random", "gradient", "persistent"])
def test_a_step_of_micro_batches_is_that_of_one_batch(mode: str) -> None:
    whole, log = guided(mode, 12)
    split, other = guided(mode, 3, gradient_accumulation_steps=4)
    assert_close(split, whole)
    for entry, there in zip(log, other, strict=True):
        assert entry["soft"] + entry["hard"] + entry["synthetic"] == pytest.approx(entry["loss"], rel=1e-5)
        assert min(entry["soft"], entry["hard"], entry["synthetic"]) > 0
        for name in ("loss", "soft", "hard", "synthetic"):
            assert there[name] == pytest.approx(entry[name], rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_with_chains_equals_an_unbroken_one(tmp_path: Path, accumulate: int) -> None:
    options = {
        "gradient_accumulation_steps": accumulate,
        "num_train_epochs": 2,
        "max_steps": -1,
        "save_strategy": "steps",
    }
    options |= {"save_steps": 3 if accumulate == 1 else 2, "optim": "adamw_torch", "learning_rate": 0.01}
    whole, _ = guided("persistent", 6, folder=tmp_path / "whole", **options)
    (saved, *_) = sorted((tmp_path / "whole").glob("checkpoint-*"))
    held = torch.load(saved / "tgt_sampler.pt")
    assert held["waiting_latents" if "waiting_latents" in held else "bank_latents"].shape[0] > 0
    resumed, _ = guided("persistent", 6, folder=tmp_path / "again", resume=saved, **options)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value)
    names = [name for path in saved.iterdir() if path.suffix == ".safetensors" for name in kit.names_in(path)]
    assert sorted(names) == sorted(whole)
    (saved / "tgt_sampler.pt").unlink()
    with pytest.raises(CheckpointError, match="holds no state of a sampler"):
        guided("persistent", 6, folder=tmp_path / "again", resume=saved, **options)


def test_an_evaluation_is_the_mean_over_its_real_rows() -> None:
    trainer, data = kit.guided_trainer("random", 5, per_device_eval_batch_size=5)
    found = trainer.predict(data)
    x, y = (torch.stack([torch.as_tensor(one[name]) for one in data]) for name in ("x", "labels"))
    objective = trainer.objective
    with torch.no_grad():
        expected = objective.loss(trainer.model(x), objective.teacher.label(x), y)
    assert found.metrics["test_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found.predictions.shape == (len(data), 3)
    assert objective.synthetic_weight == 1.0


def test_images_into_a_model_of_transformers() -> None:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "num_labels": 3}
    labeler, student = (kit.made("ViTForImageClassification", width, **sizes) for width in (16, 8))
    generator = (
        nn.Sequential(nn.Flatten(), nn.Linear(192, 8)),
        nn.Sequential(nn.Linear(8, 192), nn.Unflatten(1, (3, 8, 8))),
    )
    teacher = tgt.Teacher(*generator, labeler)
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": number % 3, "id": number} for number in range(8)]
    objective = tgt.TGTObjective(teacher, tgt.LatentSampler(teacher, "gradient", units="absolute"))
    args = arguments(max_steps=2, per_device_train_batch_size=4, bf16=True)
    trainer = TGTTrainer(student, args, train_dataset=data, eval_dataset=data, objective=objective, id_column="id")
    trainer.train()
    assert trainer.state.log_history[0]["synthetic"] > 0
    assert trainer.evaluate()["eval_loss"] > 0


def test_what_does_not_fit_is_refused() -> None:
    trainer, _ = kit.guided_trainer("random", 4)
    with pytest.raises(ArgumentError, match=r"must be a tgt_fast\.TGTObjective"):
        TGTTrainer(nn.Linear(2, 2), arguments(), objective=lambda *x: 0)
    chains: Any = kit.guided_trainer("persistent", 4)[0].objective
    with pytest.raises(ArgumentError, match="name the id_column"):
        TGTTrainer(nn.Linear(2, 2), arguments(), objective=chains)
    with pytest.raises(ArgumentError, match="gave no 'id'"):
        trainer.compute_loss(trainer.model, {"x": torch.randn(2, 8)})
    with pytest.raises(ArgumentError, match="gave no inputs"):
        trainer.compute_loss(trainer.model, {"id": torch.arange(2)})
