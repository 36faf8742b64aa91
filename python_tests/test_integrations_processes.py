"""The trainers in two processes: the same numbers as in one, and the same in both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations_kit import arguments, assert_close, llama, rows
from process_kit import all_made, in_processes, needs_processes

from tgt_fast.integrations.transformers import DistillationTrainer

pytestmark = needs_processes


def joined(rank: int, world: int) -> None:
    """What torchrun sets, and an accelerate that has not looked yet."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    GradientState._reset_state()


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


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "linear, unused parameters looked for": ("linear", {"ddp_find_unused_parameters": True}),
    "logits": ("logits", {}),
}


def test_two_processes_and_micro_batches_are_one_batch(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        joined(rank, 2)
        return {
            name: distilled(loss, 4, gradient_accumulation_steps=2, **options)
            for name, (loss, options) in CASES.items()
        }

    expected = {name: distilled(loss, 16) for name, (loss, _) in CASES.items()}
    found = all_made(in_processes(2, tmp_path, work))
    for name, (weights, log, evaluated) in expected.items():
        for rank in range(2):
            assert_close(found[rank][name][0], weights)
            for entry, there in zip(log[:2], found[rank][name][1][:2], strict=True):
                for term in ("loss", "soft", "hard"):
                    assert there[term] == pytest.approx(entry[term], rel=1e-4), (name, term)
            assert found[rank][name][2] == pytest.approx(evaluated, rel=1e-4)
        for key, value in found[0][name][0].items():
            assert torch.equal(value, found[1][name][0][key]), (name, key)
