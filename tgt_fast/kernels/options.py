"""What travels with a call through every floor below the public functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from torch import Tensor

DIVERGENCES: Final = ("forward_kl", "reverse_kl", "symmetric", "jsd", "tvd", "cross_entropy", "mse")
REDUCTIONS: Final = ("mean", "sum", "none")
STEP_NORMS: Final = ("l2", "linf", "raw")
RADIUS_NORMS: Final = ("l2", "linf")

# The op's place in the random counter: two ops never share noise, whatever their seeds, ids and steps.
OP_PERTURB: Final = 0
OP_ASCEND: Final = 1
OP_TOKENS: Final = 2
OP_GUMBEL: Final = 3
OP_RESTART: Final = 4

MAX_SAMPLE_ID: Final = 1 << 48
MAX_STEP: Final = 1 << 28
MAX_REPLICA: Final = 1 << 16


@dataclass(frozen=True)
class DistillOptions:
    """The options of the distillation loss, validated by ``tgt_fast.ops.distill``."""

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    soft_weight: float = 1.0
    hard_weight: float = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    unlabeled_index: int = -1
    reduction: str = "mean"


class DistillStats(NamedTuple):
    """What one pass over the logits also knows, a value a row, detached.

    The distributions are the tempered ones: p = softmax(t / Tt) of the teacher, q = softmax(s / Ts) of the student.
    """

    student_entropy: Tensor  # [...] nats, -sum q log q
    teacher_entropy: Tensor  # [...] nats, -sum p log p
    kl: Tensor  # [...] nats, KL(p || q), without the squared temperature
    agreement: Tensor  # [...] bool, argmax of the student == argmax of the teacher
    student_lse: Tensor  # [...] log-sum-exp of s / Ts
    teacher_lse: Tensor  # [...] log-sum-exp of t / Tt
