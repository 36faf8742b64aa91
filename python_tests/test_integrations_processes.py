"""The trainers in two processes: the same numbers as in one, and the same in both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning_kit
import pytest
import torch
from integrations_kit import _quick_trainers, arguments, assert_close, forget_accelerator, llama, rows
from integrations_kit import guided as guided_by_trainer
from process_kit import all_made, in_processes, needs_processes
from test_examples import example

from tgt_fast.integrations.transformers import DistillationTrainer

pytestmark = needs_processes
__all__ = ["_quick_trainers"]  # for the test


def joined(rank: int, world: int) -> None:
    """The environment that torchrun sets, and an accelerate that has not looked yet."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    forget_accelerator()


def distilled(loss: str, size: int, **options: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, float]], float]:
    """Two steps on the same 16 rows each: the weights, the log, and an evaluation of 10 rows after."""
    model, data = llama(8, 3), rows(16, seed=3)
    args = arguments(
        max_steps=2, train_sampling_strategy="sequential", per_device_train_batch_size=size,
        per_device_eval_batch_size=2, **options,
    )  # fmt: skip
    trainer = DistillationTrainer(model, args, train_dataset=data, teacher=llama(seed=1), loss=loss)
    trainer.train()
    evaluated = trainer.evaluate(rows(8, seed=4))["eval_loss"]
    return model.state_dict(), trainer.state.log_history, evaluated


def guided(mode: str, folder: Path, *, size: int, halves: bool = False, **options: Any) -> tuple[Any, Any]:
    """Two epochs of 32 rows in Lightning, in one run or in two: the weights, and the chains in a checkpoint."""
    many = torch.distributed.is_initialized()
    where = {"devices": 2, "strategy": "ddp"} if many else {}
    made = lightning_kit.module(mode, **options)
    if halves:
        first = lightning_kit.trainer(folder, **where)
        first.fit(made, lightning_kit.data(size=size))
        first.save_checkpoint(folder / "half.ckpt")
        made = lightning_kit.module(mode, **options)
    run = lightning_kit.trainer(folder, max_epochs=2, **where)
    again = {"ckpt_path": folder / "half.ckpt", "weights_only": False} if halves else {}
    run.fit(made, lightning_kit.data(size=size), **again)
    run.save_checkpoint(folder / "end.ckpt")
    held = torch.load(folder / "end.ckpt", weights_only=False)
    assert made.objective.count_group is None
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    return (lightning_kit.weights(made), logged), held["callbacks"]["TGTCallback"]["sampler"]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "linear, unused parameters looked for": ("linear", {"ddp_find_unused_parameters": True}),
}


def test_two_processes_are_one(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        joined(rank, 2)
        runs = {
            name: distilled(loss, 4, gradient_accumulation_steps=2, **options)
            for name, (loss, options) in CASES.items()
        }
        lightning = {
            "random": guided("random", tmp_path, size=2, accumulate=2),
            "whole": guided("persistent", tmp_path, size=4),
            "halves": guided("persistent", tmp_path, size=4, halves=True),
        }
        saving = {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "steps", "save_steps": 2}
        chains = guided_by_trainer("persistent", 6, folder=tmp_path / "chains", **saving)
        again = {"resume": tmp_path / "chains" / "checkpoint-2", "folder": tmp_path / "again", **saving}
        trainer = {
            "random": guided_by_trainer("random", 3, gradient_accumulation_steps=2),
            "persistent": chains,
            "resumed": guided_by_trainer("persistent", 6, **again),
        }
        accelerate = example("distill_accelerate").main(size=2, accumulate=4, epochs=1)
        return runs, lightning, accelerate, trainer

    expected = {name: distilled(loss, 16) for name, (loss, _) in CASES.items()}
    guided_alone = {mode: guided(mode, tmp_path / "alone", size=8) for mode in ("random", "persistent")}
    steps = {"random": 2, "persistent": 4}
    trained_alone = {mode: guided_by_trainer(mode, 12, max_steps=count) for mode, count in steps.items()}
    accelerated = example("distill_accelerate").main(size=16, accumulate=1, epochs=1)
    both = all_made(in_processes(2, tmp_path, work))
    found = [runs for runs, *_ in both]
    for name, (weights, log, evaluated) in expected.items():
        for rank in range(2):
            assert_close(found[rank][name][0], weights)
            for entry, there in zip(log[:2], found[rank][name][1][:2], strict=True):
                for term in ("loss", "soft", "hard"):
                    assert there[term] == pytest.approx(entry[term], rel=1e-4), (name, term)
            assert found[rank][name][2] == pytest.approx(evaluated, rel=1e-4)
        for key, value in found[0][name][0].items():
            assert torch.equal(value, found[1][name][0][key]), (name, key)

    for runs in (both[0][1], both[1][1]):
        for name, alone in (("random", "random"), ("whole", "persistent")):
            weights, logged = runs[name][0]
            assert_close(weights, guided_alone[alone][0][0])
            for term, value in guided_alone[alone][0][1].items():
                assert logged[term] == pytest.approx(value, rel=1e-4), (name, term)
        assert len(runs["whole"][1]["waiting_latents"]) == len(guided_alone["persistent"][1]["bank_latents"]) == 32
        for key, value in runs["whole"][0][0].items():
            assert torch.equal(runs["halves"][0][0][key], value)

    for _, _, (history, weights), _ in both:
        assert history == pytest.approx(accelerated[0], rel=1e-4)
        assert_close(weights, accelerated[1])
    for *_, runs in both:
        for mode, (weights, log) in trained_alone.items():
            assert_close(runs[mode][0], weights)
            for entry, there in zip(log, runs[mode][1], strict=True):
                for term in ("loss", "soft", "hard", "synthetic"):
                    assert there[term] == pytest.approx(entry[term], rel=1e-4), (mode, term)
        for key, value in runs["persistent"][0].items():
            assert torch.equal(runs["resumed"][0][key], value)
