"""One loop for teacher and student, its loss without logits, and bits per byte."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tgt_fast.demos.lm.data import Batches, Windows
from tgt_fast.demos.lm.models import LanguageModel
from tgt_fast.ops.linear import linear_distillation_loss
from tgt_fast.teacher.modes import eval_mode

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # hidden states, ids, x, y -> loss


def next_token_loss(hidden: Tensor, head: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """``F.cross_entropy(hidden @ head.T, y)`` by the loss from hidden states, its soft term left out.

    The teacher that it asks for is of width one and weighs nothing.
    """
    nobody, says_nothing = hidden.new_zeros(*hidden.shape[:-1], 1), head.new_zeros(len(head), 1)
    return linear_distillation_loss(
        hidden, head, nobody, says_nothing, y, soft_weight=0.0, hard_weight=1.0, reduction=reduction
    )


@torch.no_grad()
def bits_per_byte(model: LanguageModel, windows: Windows, bytes_of: Tensor) -> float:
    """The mean number of bits that the next byte costs: what a token costs, over the bytes it stands for."""
    with eval_mode(model):
        nats = math.fsum(
            float(next_token_loss(model(part[:, :-1]), model.head, part[:, 1:], "none").double().sum())
            for part in torch.split(windows.tokens, 16)
        )
    return nats / math.log(2) / int(bytes_of[windows.y].sum())


@dataclass(frozen=True)
class Trained:
    """The course of a training."""

    curve: tuple[tuple[int, float], ...]  # (step, bits per byte), from before the first step on
    step_seconds: tuple[float, ...]  # of every step
    seconds: float  # of all steps, without the evaluations


def train(
    model: LanguageModel,
    loss: Loss,
    batches: Batches,
    rate: float,
    weight_decay: float,
    evaluate: Callable[[LanguageModel], float],
    evaluations: int,
) -> Trained:
    """AdamW with a short warm-up and a cosine to nothing. What is evaluated on the way steers nothing."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(batches.count))
    points = {batches.count * point // evaluations for point in range(1, evaluations + 1)}
    curve, times = [(0, evaluate(model))], []
    model.train()
    for step, (ids, x, y) in enumerate(batches, start=1):
        started = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(loss(model(x), ids, x, y))
        optimizer.step()
        schedule.step()
        times.append(time.perf_counter() - started)
        if step in points:
            curve.append((step, evaluate(model)))
    return Trained(tuple(curve), tuple(times), math.fsum(times))


def _schedule(steps: int) -> Callable[[int], float]:
    warm_up = max(1, steps // 20)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))

    return factor
