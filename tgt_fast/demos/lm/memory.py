"""The memory of one loss at the demo's vocabulary, each way in a process of its own: a peak never falls again.

``python -m tgt_fast.demos.lm.memory linear|logits|eager`` prints bytes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tgt_fast.bench.memory import resident_peak
from tgt_fast.demos.lm.settings import Settings
from tgt_fast.losses.distill import DistillationLoss
from tgt_fast.losses.linear import LinearDistillationLoss

WAYS = ("linear", "logits", "eager")
ROWS, CLASSES = 8192, Settings().tokens  # tokens in a batch, and in the vocabulary


def peaks() -> dict[str, int] | None:
    """Bytes that forward and backward of the soft-label loss add at most, by way; None where the system does not tell.

    ``linear``: from hidden states; ``logits``: tgt_fast's loss on the logits; ``eager``: PyTorch's, likewise.
    """
    if not Path("/proc/self/status").exists():
        return None
    return {way: _in_fresh_process(way) for way in WAYS}


def _in_fresh_process(way: str) -> int:
    command = [sys.executable, "-m", __name__, way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return int(done.stdout.split()[-1])


def _loss(way: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    if way == "linear":
        linear = LinearDistillationLoss()
        return lambda ours, head, theirs, their_head: linear(ours, head, theirs, their_head)
    if way == "logits":
        distill = DistillationLoss()
        return lambda ours, head, theirs, their_head: distill(ours @ head.T, theirs @ their_head.T)

    def eager(ours: Tensor, head: Tensor, theirs: Tensor, their_head: Tensor) -> Tensor:
        student, teacher = (ours @ head.T).log_softmax(-1), (theirs @ their_head.T).log_softmax(-1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")

    return eager


def _step(way: str, rows: int) -> None:
    settings = Settings()
    ours, head = torch.randn(rows, settings.width), torch.randn(CLASSES, settings.width)
    theirs, their_head = torch.randn(rows, settings.teacher_width), torch.randn(CLASSES, settings.teacher_width)
    loss = _loss(way)(ours.requires_grad_(), head.requires_grad_(), theirs, their_head)
    torch.autograd.backward(loss)


def _main(way: str) -> None:
    torch.set_num_threads(1)
    _step(way, 8)  # what is loaded at first use is no part of a call
    before = resident_peak()
    _step(way, ROWS)
    print(resident_peak() - before)


if __name__ == "__main__":
    _main(sys.argv[1])
