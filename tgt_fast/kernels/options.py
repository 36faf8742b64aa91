"""Options that travel with a call through every floor below the public functions."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor

DIVERGENCES: Final = ("forward_kl", "reverse_kl", "symmetric", "jsd", "tvd", "cross_entropy", "mse")
REDUCTIONS: Final = ("mean", "sum", "none")
TOPK_DIVERGENCES: Final = ("forward_kl", "reverse_kl", "jsd", "cross_entropy")
TAILS: Final = ("bucket", "renormalize", "uniform")
STEP_NORMS: Final = ("l2", "linf", "raw")
RADIUS_NORMS: Final = ("l2", "linf")
# Of a soft-label loss. Its inverse is a finite float32; and what T^2 D(p, q) is made of cancels the more the larger T
# is: of float32 losses three digits remain at 100, one at 1000, and none at 10000.
TEMPERATURES: Final = (1e-30, 100.0)

# The op's place in the random counter: two ops never share noise, whatever their seeds, ids and steps.
OP_PERTURB: Final = 0
OP_ASCEND: Final = 1
OP_TOKENS: Final = 2
OP_GUMBEL: Final = 3
OP_RESTART: Final = 4

ROW_STATE: Final = 12  # numbers of float64 that there is room for a row, whatever a kernel keeps of it
ROW_COEFFICIENT: Final = 7  # the place among those of the row's weight in the reduced loss

MAX_SAMPLE_ID: Final = 1 << 48
MAX_STEP: Final = 1 << 28
MAX_REPLICA: Final = 1 << 16


class DistillOptions(NamedTuple):
    """The options of the distillation loss, validated by ``tgt_fast.ops.distill``.

    Their order is that of the schemas. ``numbers`` stands for those that are known only when an op runs, see
    :mod:`tgt_fast.kernels.late`.
    """

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
    numbers: Tensor | None = None  # [6] float64, from beta to label_smoothing in the order of the fields


class DistillStats(NamedTuple):
    """Statistics that one pass over the logits also knows, a value a row, detached.

    The distributions are the tempered ones: p = softmax(t / Tt) of the teacher, q = softmax(s / Ts) of the student.
    """

    student_entropy: Tensor  # [...] nats, -sum q log q
    teacher_entropy: Tensor  # [...] nats, -sum p log p
    kl: Tensor  # [...] nats, KL(p || q), without the squared temperature
    agreement: Tensor  # [...] bool, argmax of the student == argmax of the teacher
    student_lse: Tensor  # [...] log-sum-exp of s / Ts
    teacher_lse: Tensor  # [...] log-sum-exp of t / Tt

    @classmethod
    def from_rows(cls, rows: Tensor) -> DistillStats:
        """The statistics from ``[6, N]``, a row a field."""
        student_entropy, teacher_entropy, kl, agreement, student_lse, teacher_lse = rows.unbind(0)
        return cls(student_entropy, teacher_entropy, kl, agreement != 0, student_lse, teacher_lse)


class LinearOptions(NamedTuple):
    """The making of logits from hidden states, and which of them count, validated by ``tgt_fast.ops.linear``.

    A side's logits are ``scale * (hidden @ weight.T + bias)``, then ``softcap * tanh(logits / softcap)``.
    """

    student_scale: float = 1.0
    student_softcap: float | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None
    vocab_size: int | None = None  # the classes from it on are padding
    memory_budget: int | None = None  # bytes of a chunk's logits
    tail_mode: str | None = None  # of a teacher's top-k record, one of TAILS; None: there is no record
    topk_classes: int | None = None  # those that the record's ids point into
    scales: Tensor | None = None  # [2] float64, those of student and teacher where they are known when the op runs


class LinearTensors(NamedTuple):
    """The tensors of a loss from hidden states.

    A teacher without a weight gives its logits themselves or, where there are ids, the log-probabilities of a record.
    """

    student_hidden: Tensor  # [N, Hs]
    student_weight: Tensor  # [Cs, Hs]
    student_bias: Tensor | None  # [Cs]
    teacher: Tensor  # [N, Ht], or [N, Ct] logits, or [N, k] log-probabilities
    teacher_weight: Tensor | None  # [Ct, Ht]
    teacher_bias: Tensor | None  # [Ct]
    target: Tensor | None = None  # [N] int64
    sample_weight: Tensor | None = None  # [N]
    vocab_map: Tensor | None = None  # [Ct] the student's class of each of the teacher's, -1 for none
    vocab_mask: Tensor | None = None  # [Cs] bool, False: the class does not exist
    topk_ids: Tensor | None = None  # [N, k] int64, of the teacher's classes
    tail_log_prob: Tensor | None = None  # [N] log-probability of those that are not listed
    class_ids: Tensor | None = None  # [Cs] int64; for a row, of the classes with its own one's id only that one exists
    own_class: Tensor | None = None  # [N] int64, the row's own; negative: it has none. Neither goes with a record


DIFFERENTIABLE: Final = 6  # of the LinearTensors, the first


class LinearForward(NamedTuple):
    """Results of one pass over the rows of a loss from hidden states."""

    loss: Tensor  # 0-d, or [N]
    grads: tuple[Tensor | None, ...]  # of the first six of LinearTensors, for an upstream gradient of 1
    stats: Tensor | None  # [6, N]


class TopK(NamedTuple):
    """A teacher that says of each row which classes are likely, as the kernels take it. Entries of -inf are padding."""

    ids: Tensor  # [N, k] int64
    log_probs: Tensor  # [N, k] fp64 | fp32 | bf16 | fp16
    tail_log_prob: Tensor | None  # [N] fp64 | fp32 | bf16 | fp16; none with "renormalize"
    tail_mode: str  # one of TAILS
