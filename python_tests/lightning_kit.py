"""A tiny objective and data for runs in Lightning."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tgt_fast as tgt

lightning = pytest.importorskip("lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


def data(rows: int = 32, size: int = 4) -> DataLoader[Any]:
    """Ids, examples and labels, in some batches most of them -100."""
    draw = torch.Generator().manual_seed(5)
    y = torch.randint(0, 3, (rows,), generator=draw)
    y[:6:2], y[6:8] = -100, -1
    x = torch.randn(rows, 8, generator=draw)
    held = TensorDataset(torch.arange(rows), x, y)
    many = torch.distributed.is_initialized()
    sampler = torch.utils.data.DistributedSampler(held, shuffle=False) if many else None
    return DataLoader(held, batch_size=size, sampler=sampler)


def parts(mode: str = "random", **options: Any) -> tuple[nn.Module, tgt.TGTObjective]:
    """A student, and an objective with a sampler."""
    torch.manual_seed(0)
    teacher = tgt.Teacher(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 3))
    options = {"sigma": 0.5, "units": "absolute", "step_size": 0.1, **options}
    sampler = tgt.LatentSampler(teacher, mode, **options)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), tgt.TGTObjective(teacher, sampler)


def module(mode: str = "random", **options: Any) -> Any:
    from tgt_fast.integrations.lightning import TGTModule

    return TGTModule(*parts(mode), lambda p: torch.optim.SGD(p, 0.3, momentum=0.9), **options)


def trainer(folder: Path, **options: Any) -> Any:
    usual = {
        "default_root_dir": folder, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "max_epochs": 1, "use_distributed_sampler": False,
    }  # fmt: skip
    return lightning.Trainer(**{**usual, **options})


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.student.state_dict().items()}
