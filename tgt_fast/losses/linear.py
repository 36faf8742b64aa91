"""The distillation loss from hidden states as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tgt_fast.kernels.options import DistillOptions, DistillStats, LinearOptions
from tgt_fast.losses.distill import FORMS, OPTIONS, SOFT_ALONE, shown_adjustments, split_settings
from tgt_fast.losses.settings import Adjusted, setting
from tgt_fast.ops._linear_arguments import OP, make_heads
from tgt_fast.ops.counts import counting_group
from tgt_fast.ops.linear import linear_distillation_loss
from tgt_fast.ops.record_stats import RecordStats
from tgt_fast.ops.topk import TeacherTopK

# The fields of LinearOptions that are options; a record brings the others along.
_HEADS = (
    "student_scale", "student_softcap", "teacher_scale", "teacher_softcap", "vocab_size", "memory_budget",
)  # fmt: skip


class LinearDistillationLoss(Adjusted, nn.Module):
    r"""``DistillationLoss`` of two linear heads from their hidden states, without ever holding all logits.

    The same options, checks and errors as :func:`tgt_fast.linear_distillation_loss`. It has no parameters: the heads
    stay where they are, and their weights are arguments of a call. ``vocab_map``, ``vocab_mask`` and ``label_margin``
    are buffers, which move with the module and stay out of ``state_dict()``. Each option is an attribute, too, and can
    be changed: ``loss.temperature = 1.0`` takes effect at the next call.

    Args:
        divergence, beta, temperature, teacher_temperature, soft_weight, hard_weight, label_smoothing, label_margin,
        standardize, decoupled, skew, correct_teacher, ignore_index, unlabeled_index, reduction, student_scale,
        student_softcap, teacher_scale, teacher_softcap, vocab_size, vocab_map, vocab_mask, count_group, vocab_group,
        vocab_offsets, memory_budget, return_stats, backend: see
        :func:`tgt_fast.linear_distillation_loss`.

    >>> import tgt_fast as tgt
    >>> tgt.LinearDistillationLoss(temperature=2.0, student_softcap=30.0, vocab_size=151_936)
    LinearDistillationLoss(divergence='forward_kl', temperature=2.0, student_softcap=30.0, vocab_size=151936)
    """

    vocab_map: Tensor | None
    vocab_mask: Tensor | None
    label_margin: Tensor | None

    ignore_index = setting("ignore_index")
    unlabeled_index = setting("unlabeled_index")
    student_scale = setting("student_scale")
    student_softcap = setting("student_softcap")
    teacher_scale = setting("teacher_scale")
    teacher_softcap = setting("teacher_softcap")
    vocab_size = setting("vocab_size")
    memory_budget = setting("memory_budget")

    def __init__(
        self,
        divergence: str = "forward_kl",
        *,
        beta: float = 0.5,
        temperature: float | Tensor = 1.0,
        teacher_temperature: float | Tensor | None = None,
        soft_weight: float = 1.0,
        hard_weight: float = 0.0,
        label_smoothing: float = 0.0,
        label_margin: Tensor | None = None,
        standardize: bool = False,
        decoupled: tuple[float, float] | None = None,
        skew: float = 0.0,
        correct_teacher: float | None = None,
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
        count_group: Any = None,
        vocab_group: Any = None,
        vocab_offsets: Any = None,
        memory_budget: int | None = None,
        return_stats: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        values = (
            divergence, beta, temperature, teacher_temperature, soft_weight, hard_weight, label_smoothing,
            ignore_index, unlabeled_index, reduction, student_scale, student_softcap, teacher_scale, teacher_softcap,
            vocab_size, memory_budget, standardize, decoupled, skew, correct_teacher,
        )  # fmt: skip
        self._begin(dict(zip((*OPTIONS, *_HEADS, *FORMS), values, strict=True)))
        self.register_buffer("label_margin", label_margin, persistent=False)
        self.register_buffer("vocab_map", vocab_map, persistent=False)
        self.register_buffer("vocab_mask", vocab_mask, persistent=False)
        self.count_group = count_group
        counting_group(OP, count_group)  # refused here, if it is none
        self.vocab_group, self.vocab_offsets = vocab_group, vocab_offsets
        counting_group(OP, vocab_group, "vocab_group")
        self.return_stats = return_stats
        self.backend = backend

    def _check_settings(self, settings: dict[str, Any]) -> None:
        self._options(settings)
        self._heads(settings)

    @staticmethod
    def _options(settings: dict[str, Any]) -> DistillOptions:
        return split_settings(OP, settings, OPTIONS)[0]

    @staticmethod
    def _heads(settings: dict[str, Any]) -> LinearOptions:
        return make_heads(*(settings[name] for name in _HEADS))

    @property
    def options(self) -> DistillOptions:
        """The options of the loss as they are now, with the teacher's temperature filled in."""
        return self._options(self._settings)

    @property
    def heads(self) -> LinearOptions:
        """The options of the two heads as they are now."""
        return self._heads(self._settings)

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
    ) -> Tensor | tuple[Tensor, DistillStats | RecordStats]:
        """The soft term and, with a ``hard_weight``, the hard term; the target is needed exactly then."""
        return self._call(
            student_hidden, student_weight, teacher_hidden, teacher_weight, target, student_bias=student_bias,
            teacher_bias=teacher_bias, teacher_logits=teacher_logits, sample_weight=sample_weight,
            normalizer=normalizer, **self._settings,
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
    ) -> Tensor | tuple[Tensor, DistillStats | RecordStats]:
        """The same loss without the hard term: what a synthetic example, which has no label, is trained with."""
        return self._call(
            student_hidden, student_weight, teacher_hidden, teacher_weight, None, student_bias=student_bias,
            teacher_bias=teacher_bias, teacher_logits=teacher_logits, sample_weight=sample_weight,
            normalizer=normalizer, **{**self._settings, **SOFT_ALONE},
        )  # fmt: skip

    def _call(self, *tensors: Tensor | None, **keywords: Any) -> Tensor | tuple[Tensor, DistillStats | RecordStats]:
        if len(tensors) > 4 and tensors[4] is not None:
            keywords["label_margin"] = self.label_margin
        made: Tensor | tuple[Tensor, DistillStats | RecordStats] = linear_distillation_loss(
            *tensors, vocab_map=self.vocab_map, vocab_mask=self.vocab_mask, return_stats=self.return_stats,  # type: ignore[arg-type, misc]
            count_group=self.count_group, vocab_group=self.vocab_group, vocab_offsets=self.vocab_offsets,
            backend=self.backend, **keywords,
        )  # fmt: skip
        return made

    def extra_repr(self) -> str:
        options, heads = self.options, self.heads
        shown = [f"divergence={options.divergence!r}"]
        for made, default in ((options, DistillOptions()), (heads, LinearOptions())):
            for name, value, usual in zip(made._fields, made, default, strict=True):
                if name == "teacher_temperature":
                    usual = options.temperature
                given = self._settings.get(name)
                if isinstance(given, Tensor) and given.dim():
                    shown.append(f"{name}=...")
                elif name != "divergence" and value != usual:
                    shown.append(f"{name}={value!r}")
        shown += shown_adjustments(self)
        shown += [f"{name}=..." for name in ("vocab_map", "vocab_mask") if getattr(self, name) is not None]
        for name in ("count_group", "vocab_group", "vocab_offsets"):
            if getattr(self, name) is not None:
                shown.append(f"{name}={getattr(self, name)!r}")
        if self.return_stats:
            shown.append("return_stats=True")
        if self.backend != "auto":
            shown.append(f"backend={self.backend!r}")
        return ", ".join(shown)
