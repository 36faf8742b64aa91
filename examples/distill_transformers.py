"""A language model learns from a larger one, without logits: ``python examples/distill_transformers.py``.

Both are tiny and random, so that it runs anywhere in seconds; put ``from_pretrained`` in their place. With several
processes: ``torchrun --nproc-per-node 2 examples/distill_transformers.py``.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from tgt_fast.integrations.transformers import DistillationTrainer


def model(width: int) -> LlamaForCausalLM:
    sizes = {"intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=width, **sizes))


def texts(count: int) -> list[dict[str, list[int]]]:
    """Counting modulo 97, from anywhere; the first two numbers are given."""
    found = []
    for start in torch.randint(0, 97, (count,)).tolist():
        ids = [(start + 3 * place) % 97 for place in range(12)]
        found.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return found


def main(steps: int = 30) -> dict[str, float]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=2, learning_rate=1e-2,
            logging_steps=10, report_to=[], save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = DistillationTrainer(
            model(16), args, train_dataset=texts(256), eval_dataset=texts(32), teacher=model(32).eval(), loss="linear"
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return {"before": before, "after": trainer.evaluate()["eval_loss"]}


if __name__ == "__main__":
    print(main())
