"""A distillation loss by torchtitan's protocol for losses: summed rows over global tokens, and metrics.

Written to the protocol of torchtitan 0.3.0 as read: it has not been run with torchtitan, which is not on PyPI for every
platform; the tests run it against stand-ins for what it takes from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError, DependencyError
from tgt_fast.integrations.terms import Said, linear_terms, logits_terms
from tgt_fast.losses import DistillationLoss, LinearDistillationLoss
from tgt_fast.ops.topk import TeacherTopK

if TYPE_CHECKING:
    from torchtitan.components.loss import BaseLoss
else:
    try:
        from torchtitan.components.loss import BaseLoss
    except ImportError as error:
        raise DependencyError(
            f"tgt_fast.integrations.torchtitan needs torchtitan (github.com/pytorch/torchtitan): {error}"
        ) from error


class TGTLoss(BaseLoss):
    r"""``(loss, metrics) = loss(pred, labels, global_valid_tokens, teacher_logits=...)``.

    The loss is the sum over the tokens of this process, divided by ``global_valid_tokens``, as torchtitan's own losses
    are, which its parallelisms add up; without them it is the sum. ``metrics`` are its terms, ``soft`` and ``hard``.
    Labels are shifted already, as torchtitan's data are, and -100 drops a token.

    A leaf, on logits ``(..., V)``: alone, or in torchtitan's ``ChunkedLossWrapper.Config(loss_fn=TGTLoss.Config())``.
    Or in the place of that wrapper: after ``set_lm_head(lm_head)`` ``pred`` are hidden states (the model is called with
    ``_skip_lm_head=True``), and no logits are made; backward is the trainer's.

    What the teacher says comes with each call, by a trainer that adds it to the loss's inputs: ``teacher_logits``
    ``(..., V)``, a :class:`tgt_fast.TeacherTopK`, or ``teacher_hidden`` ``(..., H)``, for a teacher's head that
    :meth:`set_teacher_head` named.

    Args:
        config: a :class:`TGTLoss.Config`; its fields are those of :class:`tgt_fast.DistillationLoss`.
        compile_config: torchtitan's. The kernels are compiled already, so it changes nothing.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        divergence: str = "forward_kl"
        beta: float = 0.5
        temperature: float = 2.0
        teacher_temperature: float | None = None
        soft_weight: float = 1.0
        hard_weight: float = 1.0
        standardize: bool = False
        decoupled: tuple[float, float] | None = None
        skew: float = 0.0
        correct_teacher: float | None = None
        vocab_size: int | None = None
        """The first so many classes of both sides are the same, the others padding (with ``set_lm_head``)."""

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        shared: dict[str, Any] = {
            "beta": config.beta, "temperature": config.temperature, "teacher_temperature": config.teacher_temperature,
            "soft_weight": config.soft_weight, "hard_weight": config.hard_weight, "standardize": config.standardize,
            "decoupled": config.decoupled, "skew": config.skew, "correct_teacher": config.correct_teacher,
        }  # fmt: skip
        self._logits = DistillationLoss(config.divergence, **shared)
        self._linear = LinearDistillationLoss(config.divergence, vocab_size=config.vocab_size, **shared)
        self._head: nn.Module | None = None
        self._teacher_head: tuple[Tensor, Tensor | None] | None = None
        self.fn = self._of_logits

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """The student's head: from here on ``pred`` are hidden states."""
        self._head = lm_head

    def set_teacher_head(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """The teacher's head, frozen, for ``teacher_hidden``."""
        self._teacher_head = weight.detach(), None if bias is None else bias.detach()

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        *,
        teacher_logits: Tensor | TeacherTopK | None = None,
        teacher_hidden: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Raises:
            ArgumentError: nothing of a teacher, or hidden states of one without its head.
        """
        said = self._said(teacher_logits, teacher_hidden)
        count = torch.ones((), device=labels.device) if global_valid_tokens is None else global_valid_tokens
        if self._head is None:
            logits = said.logits
            if logits is None:
                assert said.hidden is not None
                assert said.weight is not None
                logits = nn.functional.linear(said.hidden, said.weight, said.bias)
            return logits_terms(self._logits, pred, logits, labels, count)
        head = pred, self._head.weight, getattr(self._head, "bias", None)
        return linear_terms(self._linear, self._linear._settings, head, said, labels, count)  # type: ignore[arg-type]

    def _said(self, logits: Tensor | TeacherTopK | None, hidden: Tensor | None) -> Said:
        if (logits is None) == (hidden is None):
            raise ArgumentError(
                "TGTLoss: a call needs teacher_logits or teacher_hidden, one of them, in its loss_inputs"
            )
        if logits is not None:
            return Said(logits)
        if self._teacher_head is None:
            raise ArgumentError("TGTLoss: teacher_hidden needs the teacher's head: call set_teacher_head(weight)")
        return Said(None, hidden, *self._teacher_head)

    def _of_logits(self, pred: Tensor, labels: Tensor, **more: Any) -> Tensor:
        """The sum, as other code may ask a leaf for it."""
        return self(pred, labels, **more)[0]
