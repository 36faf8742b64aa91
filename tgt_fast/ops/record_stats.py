"""What a student and a teacher's top-k record agree on: the classes that the record lists."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RecordStats(NamedTuple):
    """Statistics of a student beside a top-k record of its teacher, a value a row, detached.

    ``S`` are the classes that the record lists, p = softmax(t / T) is what it says of them, and q = softmax(s / T) the
    student.
    """

    student_mass: Tensor  # [...] sum of q over S
    teacher_mass: Tensor  # [...] sum of p over S
    overlap: Tensor  # [...] sum of min(p, q) over S, 1 less half the distance of what they say of S and of the rest
