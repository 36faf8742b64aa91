"""Teacher-guided training in transformers' Trainer: ``python examples/guided_transformers.py``, or under torchrun.

A small ViT learns to tell bright images from dark ones, from a few of them and from what a generator makes of those.
The generator is a toy; in its place put ``vae.encode`` and ``vae.decode`` of a pretrained autoencoder.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

import tgt_fast as tgt
from tgt_fast.integrations.transformers import TGTTrainer


class Labeler(nn.Module):
    """The teacher's classifier, by the brightness of an image."""

    def forward(self, x: Tensor) -> Tensor:
        light = 8 * x.mean((1, 2, 3))
        return torch.stack([light, torch.zeros_like(light), -light], 1)


def images(count: int, seed: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=draw) + torch.randn(count, 1, 1, 1, generator=draw)
    y = Labeler()(x).argmax(1)
    return [{"pixel_values": x[n], "labels": int(y[n]), "id": n} for n in range(count)]


def main(steps: int = 60) -> dict[str, float]:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=3,
    )  # fmt: skip
    teacher = tgt.Teacher(nn.Identity(), nn.Identity(), Labeler())
    sampler = tgt.LatentSampler(teacher, "random", sigma=0.5, units="absolute")
    objective = tgt.TGTObjective(teacher, sampler)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=2, learning_rate=3e-3,
            logging_steps=20, report_to=[], save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = TGTTrainer(
            ViTForImageClassification(config), args, train_dataset=images(32, 0), eval_dataset=images(128, 1),
            objective=objective, id_column="id",
        )  # fmt: skip
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return {"before": before, "after": trainer.evaluate()["eval_loss"]}


if __name__ == "__main__":
    print(main())
