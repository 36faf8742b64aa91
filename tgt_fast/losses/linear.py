"""The distillation loss from hidden states as a module."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from tgt_fast.kernels.options import DistillOptions, DistillStats, LinearOptions
from tgt_fast.ops._distill_arguments import make_options
from tgt_fast.ops._linear_arguments import OP, make_heads
from tgt_fast.ops._sparse_record import TeacherTopK
from tgt_fast.ops.linear import linear_distillation_loss

# The fields of LinearOptions that are options; a record brings the others along.
_HEADS = (
    "student_scale", "student_softcap", "teacher_scale", "teacher_softcap", "vocab_size", "memory_budget",
)  # fmt: skip


class LinearDistillationLoss(nn.Module):
    r"""``DistillationLoss`` of two linear heads from their hidden states, without ever holding all logits.

    The same options, checks and errors as :func:`tgt_fast.linear_distillation_loss`, fixed once. It has no parameters:
    the heads stay where they are, and their weights are arguments of a call. ``vocab_map`` and ``vocab_mask`` are
    buffers, which move with the module and stay out of ``state_dict()``.

    Args:
        divergence, beta, temperature, teacher_temperature, soft_weight, hard_weight, label_smoothing, ignore_index,
        unlabeled_index, reduction, student_scale, student_softcap, teacher_scale, teacher_softcap, vocab_size,
        vocab_map, vocab_mask, memory_budget, return_stats, backend: see :func:`tgt_fast.linear_distillation_loss`.

    >>> import tgt_fast as tgt
    >>> tgt.LinearDistillationLoss(temperature=2.0, student_softcap=30.0, vocab_size=151_936)
    LinearDistillationLoss(divergence='forward_kl', temperature=2.0, student_softcap=30.0, vocab_size=151936)
    """

    vocab_map: Tensor | None
    vocab_mask: Tensor | None

    def __init__(
        self,
        divergence: str = "forward_kl",
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        soft_weight: float = 1.0,
        hard_weight: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        unlabeled_index: int = -1,
        reduction: str = "mean",
        student_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_scale: float = 1.0,
        teacher_softcap: float | None = None,
        vocab_size: int | None = None,
        vocab_map: Tensor | None = None,
        vocab_mask: Tensor | None = None,
        memory_budget: int | None = None,
        return_stats: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.options = make_options(
            divergence, beta, temperature, teacher_temperature, soft_weight, hard_weight, label_smoothing,
            ignore_index, unlabeled_index, reduction, OP,
        )  # fmt: skip
        self.heads = make_heads(
            student_scale, student_softcap, teacher_scale, teacher_softcap, vocab_size, memory_budget
        )  # fmt: skip
        self.register_buffer("vocab_map", vocab_map, persistent=False)
        self.register_buffer("vocab_mask", vocab_mask, persistent=False)
        self.return_stats = return_stats
        self.backend = backend
        self._keywords = {field.name: getattr(self.options, field.name) for field in fields(DistillOptions)}
        self._keywords |= {name: getattr(self.heads, name) for name in _HEADS}

    def forward(
        self,
        student_hidden: Tensor,  # [..., Hs]
        student_weight: Tensor,  # [Cs, Hs]
        teacher_hidden: Tensor | None = None,  # [..., Ht]
        teacher_weight: Tensor | None = None,  # [Ct, Ht]
        target: Tensor | None = None,  # [...]
        *,
        student_bias: Tensor | None = None,  # [Cs]
        teacher_bias: Tensor | None = None,  # [Ct]
        teacher_logits: Tensor | TeacherTopK | None = None,  # [..., Ct]
        sample_weight: Tensor | None = None,  # [...]
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, DistillStats]:
        """The soft term and, with a ``hard_weight``, the hard term; the target is needed exactly then."""
        return self._call(
            student_hidden, student_weight, teacher_hidden, teacher_weight, target, student_bias=student_bias,
            teacher_bias=teacher_bias, teacher_logits=teacher_logits, sample_weight=sample_weight,
            normalizer=normalizer, **self._keywords,
        )  # fmt: skip

    def soft(
        self,
        student_hidden: Tensor,  # [..., Hs]
        student_weight: Tensor,  # [Cs, Hs]
        teacher_hidden: Tensor | None = None,  # [..., Ht]
        teacher_weight: Tensor | None = None,  # [Ct, Ht]
        *,
        student_bias: Tensor | None = None,  # [Cs]
        teacher_bias: Tensor | None = None,  # [Ct]
        teacher_logits: Tensor | TeacherTopK | None = None,  # [..., Ct]
        sample_weight: Tensor | None = None,  # [...]
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, DistillStats]:
        """The same loss without the hard term: what a synthetic example, which has no label, is trained with."""
        return self._call(
            student_hidden, student_weight, teacher_hidden, teacher_weight, None, student_bias=student_bias,
            teacher_bias=teacher_bias, teacher_logits=teacher_logits, sample_weight=sample_weight,
            normalizer=normalizer, **{**self._keywords, "hard_weight": 0.0},
        )  # fmt: skip

    def _call(self, *tensors: Tensor | None, **keywords: Any) -> Tensor | tuple[Tensor, DistillStats]:
        made: Tensor | tuple[Tensor, DistillStats] = linear_distillation_loss(
            *tensors, vocab_map=self.vocab_map, vocab_mask=self.vocab_mask, return_stats=self.return_stats,  # type: ignore[arg-type, misc]
            backend=self.backend, **keywords,
        )  # fmt: skip
        return made

    def extra_repr(self) -> str:
        shown = [f"divergence={self.options.divergence!r}"]
        pairs = ((self.options, DistillOptions()), (self.heads, LinearOptions()))
        for options, default in pairs:
            for field in fields(options):
                value, usual = getattr(options, field.name), getattr(default, field.name)
                if field.name == "teacher_temperature":
                    usual = self.options.temperature
                if field.name != "divergence" and value != usual:
                    shown.append(f"{field.name}={value!r}")
        shown += [f"{name}=..." for name in ("vocab_map", "vocab_mask") if getattr(self, name) is not None]
        if self.return_stats:
            shown.append("return_stats=True")
        if self.backend != "auto":
            shown.append(f"backend={self.backend!r}")
        return ", ".join(shown)
