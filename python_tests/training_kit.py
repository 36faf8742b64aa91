"""A small teacher, student and data set for the tests of training; importable by child processes too."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset

import tgt_fast as tgt
from tgt_fast.train import evaluate

FEATURES, LATENT, CLASSES, EXAMPLES = 6, 3, 4, 22


def make_teacher(*, seed: int = 0, batch_norm: bool = False, **options: Any) -> tgt.Teacher:
    """Linear encoder and decoder, a small labeler."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        norm = [nn.BatchNorm1d(8)] if batch_norm else []
        labeler = nn.Sequential(nn.Linear(FEATURES, 8), *norm, nn.Tanh(), nn.Linear(8, CLASSES))
        return tgt.Teacher(nn.Linear(FEATURES, LATENT), nn.Linear(LATENT, FEATURES), labeler, **options)


def make_student(*, seed: int = 1, batch_norm: bool = True, dropout: float = 0.2) -> nn.Sequential:
    """Everything that makes bits hard to keep: running statistics and random numbers of its own."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        norm = [nn.BatchNorm1d(10)] if batch_norm else []
        return nn.Sequential(nn.Linear(FEATURES, 10), *norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(10, CLASSES))


def make_data(n: int = EXAMPLES, *, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, FEATURES, generator=generator),
        torch.randint(0, CLASSES, (n,), generator=generator),
    )


class Augmented(Dataset):
    """(id, x, y) with noise drawn from all three global generators as an example is read."""

    def __init__(self, n: int = EXAMPLES) -> None:
        self.x, self.y = make_data(n)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[int, Tensor, Tensor]:
        noise = torch.randn(FEATURES) + float(np.random.normal()) + random.gauss(0, 1)
        return i, self.x[i] + 0.05 * noise, self.y[i]


class Numbered(Augmented):
    """(id, x, y) without noise."""

    def __getitem__(self, i: int) -> tuple[int, Tensor, Tensor]:
        return i, self.x[i], self.y[i]


def make_run(mode: str | None = "random", *, loader: Any = None, lr: float = 0.02) -> dict[str, Any]:
    """Fresh arguments of one fit(): with a sampler, Adam, a schedule and an augmented, shuffled loader."""
    teacher = make_teacher(prior="normal")
    sampler: Any = None
    if mode is not None:
        explorer = mode.removeprefix("replay-")
        sampler = tgt.LatentSampler(teacher, mode=explorer, sigma=0.5, units="absolute", seed=7)
        if explorer != mode:
            sampler = tgt.SyntheticReplay(sampler, reuse=2, capacity=16, select="disagreement", retire=0.01)
    student = make_student()
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    return {
        "student": student,
        "objective": tgt.TGTObjective(teacher, sampler),
        "loader": DataLoader(Augmented(), batch_size=5, shuffle=True) if loader is None else loader,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40),
        "seed": 5,
        "progress": False,
    }


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"not bit-equal: {different}"


def own_generator() -> DataLoader:
    return DataLoader(Augmented(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3))


def score(student: nn.Module) -> dict[str, float]:
    """A metric that also draws random numbers, as a careless one does."""
    noise = torch.rand(1).item() + random.random() + np.random.rand()
    x, y = make_data()
    return {**evaluate(student, None, [(x, y)]), "noise": noise}


def train(student: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> None:
    """A loop without fit()."""
    x, y = make_data(12)
    for _ in range(steps):
        nn.functional.cross_entropy(student(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()


def adam(student: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(student.parameters(), lr=0.01)
