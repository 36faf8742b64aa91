"""Which classes student and teacher share, when their vocabularies differ.

A class that is not shared exists on neither side: it gets no probability from either, so that no mass of one side lies
where the other cannot have any.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tgt_fast.kernels.calls import is_soft
from tgt_fast.kernels.options import TopK


class Vocabulary(NamedTuple):
    """The classes of the loss, which are the student's, and where each is found on the teacher's side."""

    classes: int  # C: of the student's classes, the first so many
    teacher_classes: int  # of the teacher's, likewise
    missing: Tensor | None  # [C] bool, the classes that do not exist; None: all exist
    source: Tensor | None  # [C] the teacher's class of each; None: the same
    back: Tensor | None  # [Ct] the class of each of the teacher's, for gradients
    unused: Tensor | None  # [Ct] bool, the teacher's classes that no class of the loss stands for

    def align(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """[..., Cs], [..., Ct] -> both [..., C], -inf where a class does not exist; differentiable."""
        teacher = teacher[..., : self.teacher_classes]
        if self.source is not None:
            teacher = teacher.index_select(-1, self.source)
        if self.missing is not None:
            teacher = teacher.masked_fill(self.missing, -math.inf)
        return self.align_student(student), teacher

    def align_student(self, student: Tensor) -> Tensor:
        """[..., Cs] -> [..., C]"""
        student = student[..., : self.classes]
        return student if self.missing is None else student.masked_fill(self.missing, -math.inf)

    def align_topk(self, topk: TopK) -> TopK:
        """The record by the classes of the loss. An entry whose class does not exist is padding.  [N, k]

        Its tail stays as it is: the mass of such classes must not be in it.
        """
        ids = topk.ids
        there = (ids >= 0) & (ids < self.teacher_classes)
        ids = torch.where(there, ids, 0)
        if self.back is not None and self.unused is not None:
            there = there & ~self.unused[ids]
            ids = self.back[ids]
        if self.missing is not None:
            there = there & ~self.missing[ids]
        return topk._replace(ids=ids, log_probs=topk.log_probs.masked_fill(~there, -math.inf))

    def without_missing(self, target: Tensor | None, ignore_index: int) -> Tensor | None:
        """The target, where it does not name a class that does not exist: such a row is dropped.  [N] -> [N]"""
        if is_soft(target) or target is None or self.missing is None:
            return target
        legal = (target >= 0) & (target < self.classes)
        missing = legal & self.missing[torch.where(legal, target, 0)]
        return torch.where(missing, ignore_index, target)


def shared(
    student_classes: int,
    teacher_classes: int,
    vocab_size: int | None,
    vocab_map: Tensor | None,  # [Ct]
    vocab_mask: Tensor | None,  # [Cs] bool
) -> Vocabulary:
    """The shared classes. Ids out of range are as -1; of several ids for one class the largest teacher's counts."""
    classes = student_classes if vocab_size is None else vocab_size
    if vocab_map is not None:
        ids = vocab_map.to(torch.int64)
        legal = (ids >= 0) & (ids < classes)
        own = torch.arange(teacher_classes, device=ids.device)
        slots = torch.where(legal, ids, classes)  # the last slot takes what leads nowhere
        found = torch.full((classes + 1,), -1, dtype=torch.int64, device=ids.device)
        found = found.scatter_reduce(0, slots, own, "amax")[:classes]
        missing = found < 0
        if vocab_mask is not None:
            missing = missing | ~vocab_mask[:classes]
        back = torch.where(legal, ids, 0)
        return Vocabulary(classes, teacher_classes, missing, found.clamp_min(0), back, ~legal | (found[back] != own))
    missing_alone = None if vocab_mask is None else ~vocab_mask[:classes]
    return Vocabulary(classes, classes, missing_alone, None, None, None)
