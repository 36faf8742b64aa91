"""What a soft-label loss does to its logits beside dividing them by a temperature, as it travels with a call."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from torch import Tensor

LEAST_SKEW: Final = 1e-20  # what is below leaves the range of float32 in what a kernel makes of it


class Adjustments(NamedTuple):
    """Options beside those of every loss; a call without any carries none of these."""

    standardize: bool = False  # both sides, in the soft term
    decoupled: tuple[float, float] | None = None  # weights of the label's part and of the others'
    skew: float = 0.0  # the share of the other side's distribution that is mixed into the one compared with
    correct_teacher: float | None = None  # by how much the label is to lead the teacher's distribution
    student_bias: Tensor | None = None  # [C]
    teacher_bias: Tensor | None = None  # [C]
    label_margin: Tensor | None = None  # [C]
    student_temperature: Tensor | None = None  # [N], in the place of the number; with it, the teacher's, too
    teacher_temperature: Tensor | None = None  # [N]

    def of_rows(self, at: slice) -> Adjustments:
        """Those of some of the rows."""
        if self.student_temperature is None or self.teacher_temperature is None:
            return self
        return self._replace(
            student_temperature=self.student_temperature[at], teacher_temperature=self.teacher_temperature[at]
        )

    @classmethod
    def of_arguments(cls, *fields: Any) -> Adjustments | None:
        """From the arguments of a schema, where a pair is a list; None: nothing is asked for."""
        made = cls(*fields)
        if made.decoupled is not None:
            own, others = made.decoupled
            made = made._replace(decoupled=(own, others))
        return None if made == cls() else made

    @property
    def by_label(self) -> bool:
        """True if the soft term of a row depends on its label."""
        return self.decoupled is not None or self.correct_teacher is not None
