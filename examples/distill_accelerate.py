"""A language model learns from a larger one in a loop with Accelerate: ``python examples/distill_accelerate.py``.

Or ``accelerate launch --num_processes 2 examples/distill_accelerate.py``. A step is that of all its tokens, however
they are spread over micro-batches and processes: they are counted before the first backward pass of the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import tgt_fast as tgt


def model(width: int) -> LlamaForCausalLM:
    sizes = {"intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=53, hidden_size=width, **sizes))


def texts(count: int) -> TensorDataset:
    """Counting modulo 53; of some texts most tokens are padding, which does not count."""
    draw = torch.Generator().manual_seed(1)
    ids = (torch.randint(0, 53, (count, 1), generator=draw) + 2 * torch.arange(10)) % 53
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]  # position i predicts token i + 1
    labels[::3, 3:] = -100
    return TensorDataset(ids, labels)


def windows(loader: DataLoader, size: int) -> Iterator[list[list[Tensor]]]:
    """The micro-batches of a step, read before it begins."""
    batches = iter(loader)
    while window := list(islice(batches, size)):
        yield window


def main(size: int = 4, accumulate: int = 4, epochs: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of each step, and the weights."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    teacher, student = model(32).eval().requires_grad_(False), model(16)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    student, optimizer, loader = accelerator.prepare(student, optimizer, DataLoader(texts(48), batch_size=size))

    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)  # 1: on its device, and not wrapped
    loss_fn = tgt.DistillationLoss(temperature=2.0, hard_weight=1.0)  # 2
    history = []
    for _ in range(epochs):
        for window in windows(loader, accumulate):
            # 3: the tokens of the step, in all processes; of these each process's loss takes its share.
            tokens = accelerator.gather(torch.stack([(labels != -100).sum() for _, labels in window])).sum()
            total = torch.zeros((), device=accelerator.device)
            for place, (ids, labels) in enumerate(window):
                with nullcontext() if place + 1 == len(window) else accelerator.no_sync(student):
                    with torch.no_grad():
                        said = teacher(ids).logits  # 4
                    share = tokens / accelerator.num_processes  # 5: the mean over processes comes later
                    loss = loss_fn(student(ids).logits, said, labels, normalizer=share)  # 6
                    accelerator.backward(loss)
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            history.append(float(accelerator.reduce(total, "mean")))
    return history, accelerator.unwrap_model(student).state_dict()


if __name__ == "__main__":
    print([round(value, 3) for value in main()[0]])
