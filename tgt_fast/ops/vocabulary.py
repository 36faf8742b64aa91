"""Vocabularies that differ: the checks of their options, and the alignment of logits that are at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.kernels.calls import is_soft
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.kernels.vocabulary import shared
from tgt_fast.ops import _checks

HOW_TO_MAP = (
    "pass vocab_size=, how many classes both share (the rest is padding), or vocab_map=, the student's class of each "
    "of the teacher's classes (-1 where it has none)"
)


@one_thread_in_forks
def align_logits(
    student_logits: Tensor,  # [..., Cs]
    teacher_logits: Tensor,  # [..., Ct]
    *,
    vocab_size: int | None = None,
    vocab_map: Tensor | None = None,  # [Ct]
    vocab_mask: Tensor | None = None,  # [Cs]
) -> tuple[Tensor, Tensor]:
    r"""Both sides' logits over the classes that both share: ``(..., C)`` and ``(..., C)``, in the student's order.

    A class that one side lacks exists on neither: it is left out (``vocab_size``), or its logits are -inf, which is
    probability 0, on both sides (``vocab_map``, ``vocab_mask``). So no mass lies where the other side cannot have any.

    Args:
        student_logits: ``(..., Cs)``. Differentiable.
        teacher_logits: ``(..., Ct)``. Differentiable.
        vocab_size: the first so many classes of both sides are the same, the others are padding. Costs nothing: the
            results are views.
        vocab_map: ``(Ct,)`` integers, the student's class of each of the teacher's classes, -1 where it has none.
            No two may name the same class. Not together with ``vocab_size``.
        vocab_mask: ``(Cs,)`` bool, False for classes to leave out besides.

    Returns:
        The aligned pair, for :func:`tgt_fast.distillation_loss`. There a hard label that names a class of logit -inf
        gives the loss +inf: give such rows the ``unlabeled_index``.

    Raises:
        ShapeError, DTypeError, DeviceError, ArgumentError: with the offending values. Ids are looked at on a CPU alone;
        elsewhere an id out of range counts as -1, and of two for one class the later.

    >>> import torch, tgt_fast as tgt
    >>> student, teacher = torch.zeros(1, 3), torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    >>> tgt.align_logits(student, teacher, vocab_map=torch.tensor([2, -1, 0, -1]))
    (tensor([[0., -inf, 0.]]), tensor([[7., -inf, 5.]]))
    """
    op = "align_logits"
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if _checks.floating(op, name, logits).dim() == 0:
            raise ShapeError(f"{op}: {name} must be (..., C), got a number")
    _checks.same_device(op, "teacher_logits", teacher_logits, "student_logits", student_logits)
    classes = student_logits.shape[-1], teacher_logits.shape[-1]
    names = "student_logits", "teacher_logits"
    check_vocabulary(op, names, classes, student_logits, vocab_size, vocab_map, vocab_mask)
    check_vocabulary_values(op, classes[0], vocab_map, student_logits)
    return shared(*classes, vocab_size, vocab_map, vocab_mask).align(student_logits, teacher_logits)


def check_vocabulary(
    op: str, names: tuple[str, str], classes: tuple[int, int], student: Tensor, vocab_size: int | None,
    vocab_map: Tensor | None, vocab_mask: Tensor | None,
) -> int:  # fmt: skip
    """That both sides' classes can be brought together; how many they then are."""

    def counts() -> str:  # not before it is needed: to a tracer a size may have no digits
        return f"{names[0]} has {classes[0]} classes, {names[1]} {classes[1]}"

    if min(classes) == 0:
        raise ShapeError(f"{op}: {counts()}; both need one at least")
    if vocab_size is not None:
        if vocab_map is not None:
            raise ArgumentError(f"{op}: vocab_size={vocab_size} and vocab_map exclude each other; map the rest to -1")
        if not 1 <= _checks.integer(op, "vocab_size", vocab_size, 1, 2**62) <= min(classes):
            raise ShapeError(f"{op}: {counts()}; vocab_size={vocab_size} is more than both share")
    elif vocab_map is None and classes[0] != classes[1]:
        raise ShapeError(f"{op}: {counts()}; {HOW_TO_MAP}")
    for name, tensor, wanted, side in (
        ("vocab_map", vocab_map, classes[1], names[1]),
        ("vocab_mask", vocab_mask, classes[0], names[0]),
    ):
        if tensor is None:
            continue
        _checks.real(op, name, tensor)
        if tuple(tensor.shape) != (wanted,):
            raise ShapeError(f"{op}: {name} has shape {tuple(tensor.shape)}, but {side} has {wanted} classes")
        _checks.same_device(op, name, tensor, names[0], student)
    if vocab_map is not None and (vocab_map.is_floating_point() or vocab_map.dtype == torch.bool):
        raise DTypeError(f"{op}: vocab_map must hold integer class indices, got {vocab_map.dtype}")
    if vocab_mask is not None and vocab_mask.dtype != torch.bool:
        raise DTypeError(f"{op}: vocab_mask must be bool, got {vocab_mask.dtype}")
    return classes[0] if vocab_size is None else vocab_size


def check_vocabulary_values(op: str, classes: int, vocab_map: Tensor | None, student: Tensor) -> None:
    """On a CPU, where looking costs no synchronisation: ids in range, and none named twice."""
    if vocab_map is None or not _checks.on_plain_cpu(student) or not _checks.on_plain_cpu(vocab_map):
        return
    vocab_map = vocab_map.to(torch.int64)  # not every kind of integer can be compared
    outside = (vocab_map < -1) | (vocab_map >= classes)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ArgumentError(f"{op}: vocab_map[{at}] = {int(vocab_map[at])} is not in [0, {classes}), nor -1")
    ids, counts = vocab_map[vocab_map >= 0].unique(return_counts=True)
    if bool((counts > 1).any()):
        twice = int(ids[counts > 1][0])
        first, second = (int(at) for at in (vocab_map == twice).nonzero()[:2])
        raise ArgumentError(f"{op}: vocab_map[{first}] and vocab_map[{second}] both name class {twice}")


def check_labels_exist(
    op: str, target: Tensor | None, missing: Tensor | None, student: Tensor, options: DistillOptions
) -> None:
    """On a CPU: no hard label names a class that does not exist."""
    if target is None or missing is None or not _checks.on_plain_cpu(student):
        return
    if is_soft(target):
        bad = ((target > 0) & missing).any(-1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            at = int(((target[row] > 0) & missing).nonzero()[0])
            raise ArgumentError(
                f"{op}: target[{row}, {at}] = {float(target[row, at]):g} is of a class that vocab_map or vocab_mask "
                "leaves out; give it 0, or the row a sample_weight of 0"
            )
        return
    legal = (target >= 0) & (target < missing.numel())
    legal &= (target != options.ignore_index) & (target != options.unlabeled_index)
    bad = legal & missing[torch.where(legal, target, 0)]
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ArgumentError(
            f"{op}: target[{row}] = {int(target[row])} names a class that vocab_map or vocab_mask leaves out; give the "
            f"row unlabeled_index ({options.unlabeled_index}) or ignore_index ({options.ignore_index})"
        )
