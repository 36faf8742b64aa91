"""The contrastive distillation loss of two pairs of towers: arguments, gathering, choice of backend."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels import select
from tgt_fast.kernels.late import is_on
from tgt_fast.kernels.options import DistillOptions, DistillStats, LinearOptions, LinearTensors
from tgt_fast.kernels.reference import contrast as reference_contrast
from tgt_fast.ops import _checks
from tgt_fast.ops._checks import check_row_values
from tgt_fast.ops._distill_arguments import check_rows, make_options
from tgt_fast.ops._linear_op import all_at_once
from tgt_fast.ops._linear_run import run_dispatched, run_in_chunks
from tgt_fast.ops.counts import divisor_over, gathered, process_group, same_count
from tgt_fast.ops.library import seen_by_dispatcher, without_autocast


@overload
def contrastive_distillation_loss(
    student_q: Tensor,
    student_d: Tensor,
    teacher_q: Tensor,
    teacher_d: Tensor,
    *,
    temperature: float,
    teacher_temperature: float | None = ...,
    hard_weight: float = ...,
    positives: Tensor | None = ...,
    passage_ids: Tensor | None = ...,
    divergence: str = ...,
    beta: float = ...,
    soft_weight: float = ...,
    label_smoothing: float = ...,
    sample_weight: Tensor | None = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    count_group: Any = ...,
    gather: bool = ...,
    group: Any = ...,
    memory_budget: int | None = ...,
    return_stats: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def contrastive_distillation_loss(
    student_q: Tensor,
    student_d: Tensor,
    teacher_q: Tensor,
    teacher_d: Tensor,
    *,
    temperature: float,
    teacher_temperature: float | None = ...,
    hard_weight: float = ...,
    positives: Tensor | None = ...,
    passage_ids: Tensor | None = ...,
    divergence: str = ...,
    beta: float = ...,
    soft_weight: float = ...,
    label_smoothing: float = ...,
    sample_weight: Tensor | None = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    count_group: Any = ...,
    gather: bool = ...,
    group: Any = ...,
    memory_budget: int | None = ...,
    return_stats: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, DistillStats]: ...
@overload
def contrastive_distillation_loss(
    student_q: Tensor,
    student_d: Tensor,
    teacher_q: Tensor,
    teacher_d: Tensor,
    *,
    temperature: float,
    teacher_temperature: float | None = ...,
    hard_weight: float = ...,
    positives: Tensor | None = ...,
    passage_ids: Tensor | None = ...,
    divergence: str = ...,
    beta: float = ...,
    soft_weight: float = ...,
    label_smoothing: float = ...,
    sample_weight: Tensor | None = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    count_group: Any = ...,
    gather: bool = ...,
    group: Any = ...,
    memory_budget: int | None = ...,
    return_stats: bool = ...,
    backend: str = ...,
) -> Tensor | tuple[Tensor, DistillStats]: ...
@one_thread_in_forks
def contrastive_distillation_loss(
    student_q: Tensor,  # [N, Hs]
    student_d: Tensor,  # [M, Hs]
    teacher_q: Tensor,  # [N, Ht]
    teacher_d: Tensor,  # [M, Ht]
    *,
    temperature: float,
    teacher_temperature: float | None = None,
    hard_weight: float = 0.0,
    positives: Tensor | None = None,  # [N]
    passage_ids: Tensor | None = None,  # [M]
    divergence: str = "forward_kl",
    beta: float = 0.5,
    soft_weight: float = 1.0,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,  # [N]
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    count_group: Any = None,
    gather: bool = False,
    group: Any = None,
    memory_budget: int | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, DistillStats]:
    r"""The distillation loss of in-batch scores: which of the batch's passages answers a query, says the teacher.

    The same value and gradients as::

        student = student_q @ student_d.T / temperature
        teacher = teacher_q @ teacher_d.T / teacher_temperature
        soft_weight * divergence(softmax(teacher), softmax(student)) + hard_weight * cross_entropy(student, positives)

    without the factor ``temperature ** 2`` of :func:`tgt_fast.distillation_loss`, which divides by a temperature that
    is no part of the scores. No N x M scores are kept: they are made, used and given back a chunk of queries at a time,
    in float32 (float64 when an input is float64).

    Args:
        student_q, student_d: ``(N, Hs)`` queries and ``(M, Hs)`` passages, float64, float32, bfloat16 or float16.
            Differentiable. Vectors are taken as they are: normalise them first where scores are cosines. There may be
            more passages than queries: synthetic or hard ones, which are nobody's own.
        teacher_q, teacher_d: ``(N, Ht)`` and ``(M, Ht)``. Differentiable.
        temperature: divides the student's scores, > 0; of cosines 0.05, say.
        teacher_temperature: divides the teacher's; by default the same.
        hard_weight: of the cross-entropy against ``positives``, >= 0.
        positives: ``(N,)`` integers, the row of ``student_d`` that is a query's own passage. By default query i's is
            passage i. -1: the query has none, and gets the soft term alone; -100: the query does not count.
        passage_ids: ``(M,)`` integers, equal for passages that are the same. Copies of a query's own passage are right
            answers that would be punished as wrong ones; with ids they get no probability on either side.
        divergence, beta, soft_weight, label_smoothing, sample_weight, reduction, normalizer, count_group: see
            :func:`tgt_fast.distillation_loss`; the rows are the queries.
        gather: score the queries of this process against the passages of all processes, whose gradients go back to
            where they came from, summed. Every process brings equally many passages; ``positives`` point into its own.
            A mean is over its own queries: averaging gradients over processes, as ``DistributedDataParallel`` does,
            gives the gradient of the mean over all queries where they bring equally many; see ``count_group``.
        group: a process group of ``torch.distributed``; by default all processes.
        memory_budget: bytes of a chunk's scores and of what stands beside them; 64 MiB by default on a CPU, 2 GiB on a
            device. One query at least.
        return_stats: also return a :class:`DistillStats` from the same pass.
        backend: whose row kernel runs on a chunk: ``"auto"``, ``"native"`` or ``"triton"``. ``"reference"`` is the
            formula above, in float64, with all scores in memory.

    Returns:
        The loss, float32 (float64 when an input is float64): 0-d, or ``(N,)`` for ``"none"``. With ``return_stats`` the
        pair of it and the statistics.

    What is said of gradients, precision, determinism and second derivatives at
    :func:`tgt_fast.linear_distillation_loss` holds here: passages are its classes. Not yet run on a GPU.

    Raises:
        ShapeError, DTypeError, DeviceError, ArgumentError: before anything runs, with the offending values.
        BackendError: the backend asked for by name cannot run this call.

    >>> import torch, tgt_fast as tgt
    >>> q, d = torch.eye(2, 3, requires_grad=True), torch.eye(4, 3, requires_grad=True)
    >>> teacher_q, teacher_d = torch.eye(2, 5), torch.eye(4, 5)
    >>> loss = tgt.contrastive_distillation_loss(q, d, teacher_q, teacher_d, temperature=0.5, hard_weight=1.0)
    >>> loss.backward()
    >>> round(loss.item(), 4), d.grad.shape
    (0.3408, torch.Size([4, 3]))
    """
    _checks.refuse_tracing(OP)
    gather, return_stats = _checks.flag(OP, "gather", gather), _checks.flag(OP, "return_stats", return_stats)
    temperatures = make_temperatures(temperature, teacher_temperature)
    options = make_options(
        divergence, beta, 1.0, 1.0, soft_weight, hard_weight, label_smoothing, -100, -1, reduction, OP
    )
    budget = None if memory_budget is None else _checks.integer(OP, "memory_budget", memory_budget, 1, 2**62)
    heads = LinearOptions(
        student_scale=1.0 / temperatures[0], teacher_scale=1.0 / temperatures[1], memory_budget=budget
    )
    t = ContrastTensors(student_q, student_d, teacher_q, teacher_d, positives, passage_ids, sample_weight)
    check_tensors(t, normalizer, options)
    if positives is None and (is_on(options.hard_weight) or passage_ids is not None):
        t = t._replace(positives=diagonal(t))
    t = t._replace(
        positives=None if t.positives is None else t.positives.to(torch.int64),
        passage_ids=None if t.passage_ids is None else t.passage_ids.to(torch.int64),
    )
    check_values(t, options)
    if gather:
        t = _of_all_processes(t, group)
    warn_of_one_passage(t)
    tensors = LinearTensors(
        t.student_q, t.student_d, None, t.teacher_q, t.teacher_d, None, t.positives, t.sample_weight,
        class_ids=t.passage_ids, own_class=None if t.passage_ids is None else t.positives,
    )  # fmt: skip
    divisor = divisor_over(
        OP, count_group, normalizer, t.student_q, t.positives, t.sample_weight, t.student_d.shape[0], options
    )
    stats: Any
    if backend != "reference" and seen_by_dispatcher(*tensors):
        loss, stats = run_dispatched(tensors, divisor, heads, options, return_stats, backend)
        return loss if stats is None else (loss, stats)
    select.choose("contrast", backend, t[:4])  # a backend that refuses does so by this op's name
    if all_at_once(tensors, backend):
        with without_autocast():
            loss, stats = reference_contrast.contrastive_distillation_loss(
                *t, divisor, temperatures, options, return_stats
            )
    else:
        loss, stats = run_in_chunks(tensors, divisor, heads, options, return_stats, backend)
    return loss if stats is None else (loss, stats)


def _of_all_processes(t: ContrastTensors, group: Any) -> ContrastTensors:
    """The same queries, beside the passages of all processes in the order of their ranks."""
    group = process_group(OP, group)
    same_count(OP, "student_d", t.student_d, group)
    positives = t.positives
    if positives is not None:
        first = torch.distributed.get_rank(group) * t.student_d.shape[0]
        positives = torch.where(positives >= 0, positives + first, positives)
    return t._replace(
        student_d=gathered(t.student_d, group),
        teacher_d=gathered(t.teacher_d, group),
        positives=positives,
        passage_ids=None if t.passage_ids is None else gathered(t.passage_ids, group),
    )


OP = "contrastive_distillation_loss"
_SMALL, _LARGE = 1e-30, 1e30  # of a temperature: its inverse is a finite float32


class ContrastTensors(NamedTuple):
    """The tensors of a contrastive loss."""

    student_q: Tensor  # [N, Hs]
    student_d: Tensor  # [M, Hs]
    teacher_q: Tensor  # [N, Ht]
    teacher_d: Tensor  # [M, Ht]
    positives: Tensor | None  # [N] int64
    passage_ids: Tensor | None  # [M] int64
    sample_weight: Tensor | None  # [N]


def make_temperatures(temperature: object, teacher_temperature: object) -> tuple[float, float]:
    """The student's and the teacher's, which is by default the same."""
    student = _checks.number(OP, "temperature", temperature, _SMALL, _LARGE, late=True)
    if teacher_temperature is None:
        return student, student
    return student, _checks.number(OP, "teacher_temperature", teacher_temperature, _SMALL, _LARGE, late=True)


def check_tensors(t: ContrastTensors, normalizer: float | Tensor | None, options: DistillOptions) -> None:
    """Dtypes, devices and shapes. ``positives`` may still be missing."""
    for name, tensor in zip(t._fields[:4], t[:4], strict=True):
        _checks.floating(OP, name, tensor)
        assert tensor is not None
        if tensor.dim() != 2 or tensor.shape[1] == 0:
            raise ShapeError(f"{OP}: {name} must be (rows, H) with H >= 1, got {tuple(tensor.shape)}")
        _checks.same_device(OP, name, tensor, "student_q", t.student_q)
    for side, q, d in (("student", t.student_q, t.student_d), ("teacher", t.teacher_q, t.teacher_d)):
        if q.shape[1] != d.shape[1]:
            raise ShapeError(f"{OP}: {side}_q {tuple(q.shape)} and {side}_d {tuple(d.shape)} differ in their width")
    for kind in ("q", "d"):
        student, teacher = getattr(t, f"student_{kind}"), getattr(t, f"teacher_{kind}")
        if student.shape[0] != teacher.shape[0]:
            raise ShapeError(
                f"{OP}: student_{kind} {tuple(student.shape)} and teacher_{kind} {tuple(teacher.shape)} differ in "
                "their rows"
            )
    if t.student_d.shape[0] == 0:
        raise ShapeError(f"{OP}: there must be a passage, got student_d {tuple(t.student_d.shape)}")
    _check_indices("positives", t.positives, "student_q", t.student_q)
    _check_indices("passage_ids", t.passage_ids, "student_d", t.student_d)
    target = None if not is_on(options.hard_weight) else t.student_q.new_empty(t.student_q.shape[0], dtype=torch.int64)
    check_rows(OP, "student_q", t.student_q, target, t.sample_weight, normalizer, options, classes=-1)


def _check_indices(name: str, ids: Tensor | None, of: str, rows: Tensor) -> None:
    if ids is None:
        return
    _checks.integers(OP, name, ids)
    if tuple(ids.shape) != (rows.shape[0],):
        raise ShapeError(f"{OP}: {name} {tuple(ids.shape)} must be ({rows.shape[0]},), one a row of {of}")
    _checks.same_device(OP, name, ids, "student_q", rows)


def diagonal(t: ContrastTensors) -> Tensor:
    """The own passage of query i where nothing else is said: passage i."""
    queries, passages = t.student_q.shape[0], t.student_d.shape[0]
    if passages < queries:
        raise ArgumentError(
            f"{OP}: there are {queries} queries and {passages} passages; without positives passage i is query i's own"
        )
    return torch.arange(queries, device=t.student_q.device)


def check_values(t: ContrastTensors, options: DistillOptions) -> None:
    """Check what needs the data, on a CPU, before anything runs."""
    if not _checks.on_plain_cpu(t.student_q):
        return
    passages = t.student_d.shape[0]
    check_row_values(OP, passages, t.positives, t.sample_weight, options)


def warn_of_one_passage(t: ContrastTensors) -> None:
    """Say that a loss is 0 because there is nothing to compare: legal, as a last batch may be that small."""
    if t.student_d.shape[0] == 1 and t.student_q.shape[0] and not torch.compiler.is_compiling():
        warnings.warn(
            f"{OP}: there is one passage, whose probability is 1 whatever its score, so loss and gradients are 0; "
            "make batches of two queries at least (drop_last=True), or add passages",
            stacklevel=4,
        )
