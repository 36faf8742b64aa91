"""The contrastive distillation loss as a module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from tgt_fast.kernels.options import DistillStats
from tgt_fast.losses.settings import Settings, setting
from tgt_fast.ops._distill_arguments import make_options
from tgt_fast.ops.contrast import OP, contrastive_distillation_loss, make_temperatures
from tgt_fast.ops.counts import counting_group

_USUAL = {
    name: parameter.default for name, parameter in inspect.signature(contrastive_distillation_loss).parameters.items()
}


class ContrastiveDistillationLoss(Settings, nn.Module):
    r"""``softmax(teacher_q @ teacher_d.T / Tt)`` against ``softmax(student_q @ student_d.T / T)``, with its options.

    The same options, checks and errors as :func:`tgt_fast.contrastive_distillation_loss`. It has no parameters. Each
    option is an attribute, too, and can be changed: ``loss.temperature = 0.02`` takes effect at the next call.

    Args:
        temperature, teacher_temperature, hard_weight, divergence, beta, soft_weight, label_smoothing, reduction,
        count_group, gather, group, memory_budget, return_stats, backend: see
        :func:`tgt_fast.contrastive_distillation_loss`.

    >>> import tgt_fast as tgt
    >>> tgt.ContrastiveDistillationLoss(temperature=0.05, hard_weight=1.0)
    ContrastiveDistillationLoss(temperature=0.05, hard_weight=1.0)
    """

    count_group = setting("count_group")
    gather = setting("gather")
    group = setting("group")
    memory_budget = setting("memory_budget")
    return_stats = setting("return_stats")
    backend = setting("backend")

    def __init__(
        self,
        temperature: float,
        *,
        teacher_temperature: float | None = None,
        hard_weight: float = 0.0,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        soft_weight: float = 1.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        count_group: Any = None,
        gather: bool = False,
        group: Any = None,
        memory_budget: int | None = None,
        return_stats: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self._begin({
            "temperature": temperature, "teacher_temperature": teacher_temperature, "hard_weight": hard_weight,
            "divergence": divergence, "beta": beta, "soft_weight": soft_weight, "label_smoothing": label_smoothing,
            "reduction": reduction, "count_group": count_group, "gather": gather, "group": group,
            "memory_budget": memory_budget, "return_stats": return_stats, "backend": backend,
        })  # fmt: skip

    def _check_settings(self, settings: dict[str, Any]) -> None:
        s = settings
        make_temperatures(s["temperature"], s["teacher_temperature"])
        counting_group(OP, s["count_group"])
        make_options(
            s["divergence"], s["beta"], 1.0, 1.0, s["soft_weight"], s["hard_weight"], s["label_smoothing"], -100, -1,
            s["reduction"], OP,
        )  # fmt: skip

    @property
    def options(self) -> Mapping[str, Any]:
        """The options as they are now, to read."""
        return MappingProxyType(self._settings)

    def forward(
        self,
        student_q: Tensor,  # [N, Hs]
        student_d: Tensor,  # [M, Hs]
        teacher_q: Tensor,  # [N, Ht]
        teacher_d: Tensor,  # [M, Ht]
        *,
        positives: Tensor | None = None,  # [N]
        passage_ids: Tensor | None = None,  # [M]
        sample_weight: Tensor | None = None,  # [N]
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, DistillStats]:
        """The soft term and, with a ``hard_weight``, the hard term."""
        made: Tensor | tuple[Tensor, DistillStats] = contrastive_distillation_loss(
            student_q, student_d, teacher_q, teacher_d, positives=positives, passage_ids=passage_ids,
            sample_weight=sample_weight, normalizer=normalizer, **self._settings,
        )  # fmt: skip
        return made

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._settings.items() if value != _USUAL[name])
