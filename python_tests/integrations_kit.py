"""Tiny models of transformers, rows for them, and trainers that write nothing."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tgt_fast as tgt

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
logging.getLogger("transformers").setLevel(logging.ERROR)

VOCABULARY = 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick_trainers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A trainer that begins collects garbage, of all objects that the tests before have left: here it does not."""
    monkeypatch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: 0))
    yield
    forget_accelerator()


def forget_accelerator() -> None:
    """The precision and devices of the last Accelerator of a process are those of the next, if nobody forgets them."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def made(name: str, width: int = 16, seed: int = 0, **options: Any) -> nn.Module:
    """A model by the name of its class, with weights large enough for logits that differ."""
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    model: nn.Module = kind(kind.config_class(**{**SIZES, "hidden_size": width, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else width**-0.5))
    return model.eval()


def llama(width: int = 16, seed: int = 0, **options: Any) -> nn.Module:
    return made("LlamaForCausalLM", width, seed, **options)


def rows(count: int, length: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Texts whose labels are -100 in places, in some far more than in others."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        ids = torch.randint(3, VOCABULARY, (length,), generator=draw)
        kept = torch.rand(length, generator=draw) < (0.9 if number % 3 else 0.3)
        kept[2] = True
        found.append({"input_ids": ids, "labels": torch.where(kept, ids, -100), "id": number})
    return found


def batch(some: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(one[name]) for one in some]) for name in some[0] if name != "id"}


def arguments(folder: Path | str | None = None, **options: Any) -> Any:
    usual = {
        "output_dir": str(folder or tempfile.gettempdir()), "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**usual, **options})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0 or name.endswith("bias"), name
        limit = tolerance * max(1.0, float(value.abs().max()))
        assert float((found[name] - value).abs().max()) <= limit, name


class Student(nn.Module):
    """A model that is none of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.net(x)
        return made


def guided_trainer(mode: str, size: int, folder: Path | None = None, **options: Any) -> tuple[Any, list[Any]]:
    """A TGTTrainer over 24 rows, which takes them in order, and those rows."""
    from tgt_fast.integrations.transformers import TGTTrainer

    torch.manual_seed(1)
    teacher = tgt.Teacher(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 3))
    sampler = tgt.LatentSampler(teacher, mode, sigma=0.5, units="absolute", step_size=0.1)
    labels = [-100 if number < 9 and number % 3 else number % 3 for number in range(24)]
    data = [{"x": torch.randn(8), "labels": y, "id": 3 * number} for number, y in enumerate(labels)]
    usual = {"max_steps": 2, "per_device_train_batch_size": size, "train_sampling_strategy": "sequential"}
    args = arguments(folder, **{**usual, **options})
    objective = tgt.TGTObjective(teacher, sampler)
    return TGTTrainer(Student(), args, train_dataset=data, objective=objective, id_column="id"), data


def guided(mode: str, size: int, resume: Path | None = None, **options: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """The yield of its steps: weights and logs."""
    trainer, _ = guided_trainer(mode, size, **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert trainer.objective.count_group is None
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return weights, [entry for entry in trainer.state.log_history if "loss" in entry]


def names_in(path: Path) -> list[str]:
    return list(load_file(path))
