"""The listwise loss as a module."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from tgt_fast.losses.settings import Settings, setting
from tgt_fast.ops.counts import counting_group
from tgt_fast.ops.listwise import OP, listwise_distillation_loss, make_options
from tgt_fast.ops.topk import TeacherTopK

_USUAL = {
    name: parameter.default for name, parameter in inspect.signature(listwise_distillation_loss).parameters.items()
}


class ListwiseDistillationLoss(Settings, nn.Module):
    r"""``sum_k a[k] * (logsumexp(s[k:]) - s[k])`` over the classes in their order: Plackett-Luce distillation.

    The same options, checks and errors as :func:`tgt_fast.listwise_distillation_loss`. It has no parameters. Each
    option is an attribute, too, and can be changed: ``loss.teacher_temperature = 2.0`` takes effect at the next call.

    Args:
        teacher_temperature, reduction, ignore_index, unlabeled_index, count_group, backend: see
        :func:`tgt_fast.listwise_distillation_loss`.

    >>> import tgt_fast as tgt
    >>> tgt.ListwiseDistillationLoss(teacher_temperature=1.5)
    ListwiseDistillationLoss(teacher_temperature=1.5)
    """

    ignore_index = setting("ignore_index")
    unlabeled_index = setting("unlabeled_index")
    count_group = setting("count_group")
    backend = setting("backend")

    def __init__(
        self,
        teacher_temperature: float = 1.0,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        unlabeled_index: int = -1,
        count_group: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self._begin({
            "teacher_temperature": teacher_temperature, "reduction": reduction, "ignore_index": ignore_index,
            "unlabeled_index": unlabeled_index, "count_group": count_group, "backend": backend,
        })  # fmt: skip

    def _check_settings(self, settings: dict[str, Any]) -> None:
        make_options(
            *(settings[name] for name in ("teacher_temperature", "reduction", "ignore_index", "unlabeled_index"))
        )
        counting_group(OP, settings["count_group"])

    def forward(
        self,
        student: Tensor,  # [..., C]
        teacher: Tensor | TeacherTopK,  # [..., C]
        target: Tensor | None = None,  # [...]
        *,
        sample_weight: Tensor | None = None,  # [...]
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss."""
        return listwise_distillation_loss(
            student, teacher, target, sample_weight=sample_weight, normalizer=normalizer, **self._settings
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._settings.items() if value != _USUAL[name])
