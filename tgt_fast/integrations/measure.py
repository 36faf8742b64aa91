"""An objective on real examples alone, as an evaluation inside a framework takes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tgt_fast.teacher.returned import logits_in
from tgt_fast.train import TGTObjective


@contextmanager
def real_alone(objective: TGTObjective) -> Iterator[None]:
    """Inside, the objective is that of the real examples in this process."""
    loss = objective.loss
    before = objective.synthetic_weight, objective.count_group, loss.count_group
    objective.synthetic_weight, objective.count_group, loss.count_group = 0.0, None, None
    try:
        yield
    finally:
        objective.synthetic_weight, objective.count_group, loss.count_group = before


def measured(objective: TGTObjective, student: nn.Module, x: Any, y: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """The mean of the loss over the real rows that count, the student's logits, and how many rows count."""
    seen: list[Any] = []
    handle = student.register_forward_hook(lambda *call: seen.append(call[2]))
    rows = None if y is None or y.is_floating_point() else int((y != objective.loss.options.ignore_index).sum())
    try:
        with real_alone(objective):
            divisor = None if rows is None else float(max(rows, 1))
            loss: Tensor = objective(student, x, y, normalizer=divisor)["loss"]
    finally:
        handle.remove()
    logits = logits_in("the student", seen[0], objective.logits_of)
    return loss.detach(), logits, logits[..., 0].numel() if rows is None else rows
