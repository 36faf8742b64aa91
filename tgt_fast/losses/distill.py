"""The distillation loss as a module."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn

from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.options import DistillOptions, DistillStats
from tgt_fast.losses.settings import Adjusted, setting
from tgt_fast.ops import _checks
from tgt_fast.ops._adjustments import make_adjustments, row_temperatures
from tgt_fast.ops._distill_arguments import OP, make_options
from tgt_fast.ops.counts import counting_group
from tgt_fast.ops.distill import distillation_loss
from tgt_fast.ops.record_stats import RecordStats
from tgt_fast.ops.topk import TeacherTopK

OPTIONS: Final = DistillOptions._fields[:-1]  # without the place of late numbers
FORMS: Final = ("standardize", "decoupled", "skew", "correct_teacher")
# Without labels there is nothing to decouple and nothing to correct.
SOFT_ALONE: Final = {"hard_weight": 0.0, "decoupled": None, "correct_teacher": None}


def split_settings(
    op: str, settings: dict[str, Any], names: tuple[str, ...]
) -> tuple[DistillOptions, Adjustments | None]:
    """Checked options, a temperature a row being 1 there, and adjustments but for those with a number a class."""
    values = dict(settings)
    ours, theirs, rows = row_temperatures(op, values["temperature"], values["teacher_temperature"])
    values["temperature"], values["teacher_temperature"] = ours, theirs
    options = make_options(*(values[name] for name in names), op)
    standardize, decoupled, skew, correct_teacher = (values[name] for name in FORMS)
    return options, make_adjustments(op, options, None, None, None, standardize, decoupled, skew, correct_teacher, rows)


def shown_adjustments(module: Any) -> list[str]:
    """What a representation says of them."""
    shown = [f"{name}=..." for name in ("student_bias", "teacher_bias", "label_margin") if _has(module, name)]
    return shown + [f"{name}={value!r}" for name in FORMS if (value := module._settings[name])]


def _has(module: Any, name: str) -> bool:
    return getattr(module, name, None) is not None


class DistillationLoss(Adjusted, nn.Module):
    r"""Mean over counted rows of ``soft_weight * T**2 * D(softmax(t/T), softmax(s/T)) + hard_weight * CE(s, target)``.

    The same options, checks and errors as :func:`tgt_fast.distillation_loss`. It has no parameters and no state. Each
    option is an attribute, too, and can be changed: ``loss.temperature = 1.0`` takes effect at the next call.

    Args:
        divergence, beta, temperature, teacher_temperature, soft_weight, hard_weight, label_smoothing, student_bias,
        teacher_bias, label_margin, standardize, decoupled, skew, correct_teacher, ignore_index, unlabeled_index,
        reduction, count_group, vocab_group, vocab_offsets, class_dim, inplace, return_stats, backend: see
        :func:`tgt_fast.distillation_loss`. Biases and margins are buffers, which stay out of ``state_dict()``.

    >>> import tgt_fast as tgt
    >>> tgt.DistillationLoss(temperature=2.0, hard_weight=1.0)
    DistillationLoss(divergence='forward_kl', temperature=2.0, hard_weight=1.0)
    """

    student_bias: Tensor | None
    teacher_bias: Tensor | None
    label_margin: Tensor | None

    ignore_index = setting("ignore_index")
    unlabeled_index = setting("unlabeled_index")

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
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        label_margin: Tensor | None = None,
        standardize: bool = False,
        decoupled: tuple[float, float] | None = None,
        skew: float = 0.0,
        correct_teacher: float | None = None,
        ignore_index: int = -100,
        unlabeled_index: int = -1,
        reduction: str = "mean",
        count_group: Any = None,
        class_dim: int = -1,
        vocab_group: Any = None,
        vocab_offsets: Any = None,
        inplace: bool = False,
        return_stats: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        values = (
            divergence, beta, temperature, teacher_temperature, soft_weight, hard_weight, label_smoothing,
            ignore_index, unlabeled_index, reduction, standardize, decoupled, skew, correct_teacher,
        )  # fmt: skip
        self._begin(dict(zip((*OPTIONS, *FORMS), values, strict=True)))
        self.register_buffer("student_bias", student_bias, persistent=False)
        self.register_buffer("teacher_bias", teacher_bias, persistent=False)
        self.register_buffer("label_margin", label_margin, persistent=False)
        self.count_group = count_group
        counting_group(OP, count_group)  # refused here, if it is none
        self.class_dim = _checks.integer(OP, "class_dim", class_dim, -(2**31), 2**31)
        self.vocab_group, self.vocab_offsets = vocab_group, vocab_offsets
        counting_group(OP, vocab_group, "vocab_group")
        self.inplace = inplace
        self.return_stats = return_stats
        self.backend = backend

    def _check_settings(self, settings: dict[str, Any]) -> None:
        split_settings(OP, settings, OPTIONS)

    @property
    def options(self) -> DistillOptions:
        """The options as they are now, with the teacher's temperature filled in; 1 where it is one a row."""
        return split_settings(OP, self._settings, OPTIONS)[0]

    def forward(
        self,
        student_logits: Tensor,  # [..., C]
        teacher_logits: Tensor | TeacherTopK,  # [..., C]
        target: Tensor | None = None,  # [...]
        *,
        sample_weight: Tensor | None = None,  # [...]
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, DistillStats | RecordStats]:
        """The soft term and, with a ``hard_weight``, the hard term; the target is needed exactly then."""
        return self._call(student_logits, teacher_logits, target, sample_weight, normalizer, self._settings)

    def soft(
        self,
        student_logits: Tensor,  # [..., C]
        teacher_logits: Tensor | TeacherTopK,  # [..., C]
        *,
        sample_weight: Tensor | None = None,  # [...]
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, DistillStats | RecordStats]:
        """The same loss without the hard term: what a synthetic example, which has no label, is trained with."""
        keywords = {**self._settings, **SOFT_ALONE}
        return self._call(student_logits, teacher_logits, None, sample_weight, normalizer, keywords)

    def _call(
        self, student_logits: Tensor, teacher_logits: Tensor | TeacherTopK, target: Tensor | None,
        sample_weight: Tensor | None, normalizer: float | Tensor | None, keywords: dict[str, Any],
    ) -> Tensor | tuple[Tensor, DistillStats | RecordStats]:  # fmt: skip
        margin = None if target is None else self.label_margin
        return distillation_loss(
            student_logits, teacher_logits, target, sample_weight=sample_weight, normalizer=normalizer,
            student_bias=self.student_bias, teacher_bias=self.teacher_bias, label_margin=margin,
            count_group=self.count_group, vocab_group=self.vocab_group, vocab_offsets=self.vocab_offsets,
            class_dim=self.class_dim, inplace=self.inplace, return_stats=self.return_stats, backend=self.backend,
            **keywords,
        )  # fmt: skip

    def extra_repr(self) -> str:
        options, default = self.options, DistillOptions()
        shown = [f"divergence={options.divergence!r}"]
        for name in OPTIONS[1:]:
            value = getattr(options, name)
            usual = options.temperature if name == "teacher_temperature" else getattr(default, name)
            if isinstance(self._settings[name], Tensor) and self._settings[name].dim():
                shown.append(f"{name}=...")
            elif value != usual:
                shown.append(f"{name}={value!r}")
        shown += shown_adjustments(self)
        shown += [f"{name}=True" for name in ("inplace", "return_stats") if getattr(self, name)]
        if self.class_dim != -1:
            shown.append(f"class_dim={self.class_dim}")
        for name in ("count_group", "vocab_group", "vocab_offsets"):
            if getattr(self, name) is not None:
                shown.append(f"{name}={getattr(self, name)!r}")
        if self.backend != "auto":
            shown.append(f"backend={self.backend!r}")
        return ", ".join(shown)
