"""Teacher-guided training in Lightning: ``python examples/guided_lightning.py``, or under torchrun.

Points on circles, whose radius is their class; a random generator stands in for a pretrained one.
"""

from __future__ import annotations

import tempfile

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tgt_fast as tgt
from tgt_fast.integrations.lightning import TGTModule


def points(count: int, seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (count,), generator=draw)
    angle = 6.2832 * torch.rand(count, generator=draw)
    x = torch.stack([angle.cos(), angle.sin()], 1) * (1 + y[:, None])
    return TensorDataset(torch.arange(count), x + 0.1 * torch.randn(x.shape, generator=draw), y)


class Radius(nn.Module):
    """The teacher's labeler, which knows the classes."""

    def forward(self, x: Tensor) -> Tensor:
        return -8 * (x.norm(dim=1, keepdim=True) - torch.tensor([1.0, 2.0, 3.0], device=x.device)).abs()


def main(epochs: int = 20) -> dict[str, float]:
    lightning.seed_everything(0, verbose=False)
    train = DataLoader(points(24, 0), batch_size=4)
    valid = DataLoader(points(300, 1), batch_size=100)
    teacher = tgt.Teacher(nn.Identity(), nn.Identity(), Radius())
    sampler = tgt.LatentSampler(teacher, sigma=0.3).calibrate(train)
    objective = tgt.TGTObjective(teacher, sampler)
    student = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))
    module = TGTModule(student, objective, lambda p: torch.optim.AdamW(p, lr=1e-2), accumulate=2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=epochs, default_root_dir=folder, logger=False, enable_model_summary=False, devices=1,
            accelerator="cpu", enable_checkpointing=False, check_val_every_n_epoch=epochs,
        )  # fmt: skip
        before = trainer.validate(module, valid, verbose=False)[0]["val_accuracy"]
        trainer.fit(module, train, valid)
        return {"before": before, "after": float(trainer.callback_metrics["val_accuracy"])}


if __name__ == "__main__":
    print(main())
