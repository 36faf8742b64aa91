"""The soft-label loss on logits: arguments, autograd, choice of backend."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.errors import ArgumentError
from tgt_fast.kernels import select
from tgt_fast.kernels.calls import Direct, DistillCall
from tgt_fast.kernels.late import beside, is_on
from tgt_fast.kernels.options import DistillStats, TopK
from tgt_fast.kernels.plain import PLAIN
from tgt_fast.kernels.reference import distill as reference_distill
from tgt_fast.kernels.reference import topk as reference_topk
from tgt_fast.ops import _checks, _distill_op
from tgt_fast.ops._checks import check_entries
from tgt_fast.ops._distill_arguments import (
    OP,
    as_mask,
    check_inplace,
    check_tensors,
    check_topk,
    check_values,
    classes_last,
    flat_target,
    make_options,
    packed,
)
from tgt_fast.ops._distill_op import dense_rows, packed_call, tensors_of, with_graph
from tgt_fast.ops.counts import divisor_over
from tgt_fast.ops.library import seen_by_dispatcher
from tgt_fast.ops.topk import TeacherTopK, check_where_asked, rows_of, warn_where_small
from tgt_fast.ops.vocab_parallel import distill as vocab_parallel
from tgt_fast.ops.vocab_parallel.dtensor import distillation_loss as of_dtensors
from tgt_fast.ops.vocab_parallel.dtensor import is_dtensor
from tgt_fast.ops.vocab_parallel.shards import shards_of


@overload
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TeacherTopK,
    target: Tensor | None = ...,
    *,
    divergence: str = ...,
    beta: float = ...,
    temperature: float = ...,
    teacher_temperature: float | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    label_smoothing: float = ...,
    sample_weight: Tensor | None = ...,
    ignore_index: int = ...,
    unlabeled_index: int = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    count_group: Any = ...,
    class_dim: int = ...,
    vocab_group: Any = ...,
    vocab_offsets: Any = ...,
    inplace: bool = ...,
    return_stats: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TeacherTopK,
    target: Tensor | None = ...,
    *,
    divergence: str = ...,
    beta: float = ...,
    temperature: float = ...,
    teacher_temperature: float | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    label_smoothing: float = ...,
    sample_weight: Tensor | None = ...,
    ignore_index: int = ...,
    unlabeled_index: int = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    count_group: Any = ...,
    class_dim: int = ...,
    vocab_group: Any = ...,
    vocab_offsets: Any = ...,
    inplace: bool = ...,
    return_stats: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, DistillStats]: ...
@overload
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TeacherTopK,
    target: Tensor | None = ...,
    *,
    divergence: str = ...,
    beta: float = ...,
    temperature: float = ...,
    teacher_temperature: float | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    label_smoothing: float = ...,
    sample_weight: Tensor | None = ...,
    ignore_index: int = ...,
    unlabeled_index: int = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    count_group: Any = ...,
    class_dim: int = ...,
    vocab_group: Any = ...,
    vocab_offsets: Any = ...,
    inplace: bool = ...,
    return_stats: bool = ...,
    backend: str = ...,
) -> Tensor | tuple[Tensor, DistillStats]: ...
@one_thread_in_forks
def distillation_loss(
    student_logits: Tensor,  # [..., C]
    teacher_logits: Tensor | TeacherTopK,  # [..., C]
    target: Tensor | None = None,  # [...], or [..., C]
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,  # [...]
    ignore_index: int = -100,
    unlabeled_index: int = -1,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    count_group: Any = None,
    class_dim: int = -1,
    vocab_group: Any = None,
    vocab_offsets: Any = None,
    inplace: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, DistillStats]:
    r"""Soft-label distillation loss, optionally mixed with the hard-label cross-entropy, in one pass over the logits.

    With ``p = softmax(t / Tt)``, ``q = softmax(s / Ts)`` and ``w`` the sample weights, a row's loss is::

        w * (soft_weight * Ts**2 * D(p, q) + hard_weight * cross_entropy(s, target, label_smoothing))

        D = sum(p * (log p - log q))                       forward_kl
            sum(q * (log q - log p))                       reverse_kl
            forward_kl + reverse_kl                        symmetric
            beta * KL(p, m) + (1 - beta) * KL(q, m)        jsd, m = beta * p + (1 - beta) * q
            sum(abs(p - q)) / 2                            tvd
            -sum(p * log q)                                cross_entropy
            sum((s / Ts - t / Tt)**2), without Ts**2       mse

    Args:
        student_logits: ``(..., C)``, float64, float32, bfloat16 or float16. Differentiable. One class (C = 1) has
            probability 1 whatever its logit, and is refused: a regression is ``divergence="mse"``, a binary classifier
            with one logit z has two, ``torch.cat([torch.zeros_like(z), z], -1)``. Finite logits may be of any size:
            what differences beyond the range of float32 leave is right, and infinite where it is beyond that itself.
        teacher_logits: ``(..., C)``, any of these dtypes. Differentiable: its gradient is made when it requires one.
            Or a :class:`TeacherTopK`, see below.
        target: ``(...)`` class indices, needed when ``hard_weight > 0``. ``ignore_index`` drops the row,
            ``unlabeled_index`` drops its hard term alone. With ``hard_weight=0`` it may be given as a mask of rows:
            ``ignore_index`` alone then has an effect. Or ``(..., C)`` shares of the classes, as mixup makes them and
            one-hot rows are, of any dtype: the hard term is then ``sum(target * (logsumexp(s) - s))``, whatever they
            add up to. They drop no row (``sample_weight`` does), are not differentiated, and go with no smoothing. On a
            CPU a share below 0 is an error.
        divergence: one of the names above.
        beta: weight of the teacher in the mixture of ``jsd``, ``0 < beta < 1``.
        temperature: ``Ts``, in [1e-30, 100]: above, rounding would leave little of the loss. The soft term carries the
            factor ``Ts**2`` (not with mse), which :func:`tgt_fast.contrastive_distillation_loss` leaves out.
        teacher_temperature: ``Tt``, in [1e-30, 100]; ``Ts`` by default.
        soft_weight: factor of the soft term, >= 0. A term of weight 0 is not computed.
        hard_weight: factor of the hard term, >= 0.
        label_smoothing: in [0, 1], spread over the classes whose student logit is finite.
        sample_weight: ``(...)`` non-negative weights, not differentiable; 0 drops the row.
        reduction: ``"mean"`` divides by the sum of the counted rows' weights (their number, without weights), for
            both terms alike; ``"sum"``; ``"none"`` returns a loss a row, 0 for dropped rows.
        normalizer: a number or 0-d tensor that replaces the divisor of ``"mean"``, for gradient accumulation and data
            parallel runs: pass the global count (under DDP, which averages gradients, the global count / world size).
            A normalizer of 0 gives 0.
        count_group: None; or "world", or a process group of ``torch.distributed``, whose processes count the divisor of
            ``"mean"`` together, with one ``all_reduce`` of one number that the host does not wait for. A process gets
            the sum over its rows / (the group's count / the group's size): the mean of the processes' losses is the
            loss of all rows, and so are the gradients that DistributedDataParallel and FSDP2 average. A ``normalizer``
            overrides it; in a run of one process it does nothing.
        class_dim: which dimension of the logits (and of shares of the classes) the classes are; 1 for maps
            ``(B, C, H, W)``, whose target is ``(B, H, W)``, as is what ``"none"`` returns. Maps whose memory is
            ``torch.channels_last`` are read as they are, others copied once.
        vocab_group: None; or "world", or a process group of ``torch.distributed``, each process of which passes some
            consecutive classes of both sides, in the order of ranks and perhaps none, of the same rows. ``target``
            holds classes of all, as ``C`` stands for all; shares are of the process's own, and one below 0 makes its
            row NaN. See below.
        vocab_offsets: ``R + 1`` integers: process r of the group has the classes ``[offsets[r], offsets[r + 1])``.
            By default the processes tell each other once how many they have, and again for another number of classes
            here.
        inplace: write the gradient over ``student_logits``, which saves one buffer of their size. They must not be used
            afterwards, and backward runs once.
        return_stats: also return a :class:`DistillStats` from the same pass.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Returns:
        The loss, float32 (float64 when an input is float64): 0-d, or ``(...)`` for ``"none"``. With ``return_stats``
        the pair of it and the statistics.

    A logit of -inf is a class of probability 0. A row whose true loss is +inf (forward_kl: the student is -inf where
    the teacher is not) gives +inf and no soft gradient; a row that holds NaN, +inf or nothing but -inf gives NaN, and
    leaves the other rows alone. The result does not depend on the number of threads. Second derivatives need
    ``backend="reference"``. On a CPU the memory of a large gradient is kept, once it is freed, for the next call;
    :func:`tgt_fast.release_buffers` gives it back.

    **Schedules.** ``beta``, the temperatures, the weights and ``label_smoothing`` may be 0-d tensors, which are read at
    the call (that waits for a device). ``torch.compile`` makes one program for all values of a tensor, and one for
    those of a number from its second value on; with a ``hard_weight`` that is a tensor it needs the target whatever the
    value. With a record the temperature must be a number there.

    **A top-k record of the teacher** in the place of its logits: the loss of the classes that it lists and of the rest
    as its ``tail`` says. With ``"bucket"`` p and q are distributions over k + 1 classes: the divergence is 0 exactly
    where those are equal, never negative, and never above that of the full distributions. It is one of forward_kl,
    reverse_kl, jsd and cross_entropy, ``temperature`` must be the record's, and there are no statistics. The hard term
    sees all classes. On a CPU an id that is out of range or repeated in its row is an error; on a device it is dropped,
    unless the environment variable ``TGT_FAST_CHECK_RECORDS=1`` asks for a check, which waits for the device.

    **Classes in several processes.** With ``vocab_group`` the loss is that of all classes, the same bits in each
    process, and the gradients are those of a process's own: of one loss, also where all call ``backward``. The rows'
    maxima travel and up to 8 sums, in two all-reduces of float64; for jsd and tvd 2 numbers more in a third, and for
    statistics in three of their own; none in backward. Every process makes the same calls. Not with
    ``backend="reference"``. A top-k record is whole in each process, with ids of all classes; with the tail
    ``"uniform"`` a number more travels before, and the teacher's logits here are made of it.

    **DTensors** on one mesh, each Shard or Replicate along its dimensions: the loss is that of the whole tensors, a
    replicated DTensor (for ``"none"`` and statistics one that lies as the rows do), and gradients lie as their tensors.
    Along a dimension of the mesh one side may be whole where the other is sharded: it is cut there, and its gradient is
    gathered. Beside DTensors a plain tensor and a record are whole in each process.

    Raises:
        ShapeError, DTypeError, DeviceError, ArgumentError: before anything runs, with the offending values.
        BackendError: the backend asked for by name cannot run this call.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015; the teacher-side gradient
    serves the exploration of Zaheer et al., "Teacher Guided Training", ICLR 2023.

    >>> import torch, tgt_fast as tgt
    >>> student = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    >>> teacher, target = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([0])
    >>> loss = tgt.distillation_loss(student, teacher, target, temperature=2.0, hard_weight=1.0)
    >>> loss.backward()
    >>> round(loss.item(), 4)
    0.6606
    """
    _checks.refuse_tracing(OP)
    if inplace is not False:
        inplace = _checks.flag(OP, "inplace", inplace)
    if return_stats is not False:
        return_stats = _checks.flag(OP, "return_stats", return_stats)
    options = make_options(
        divergence, beta, temperature, teacher_temperature, soft_weight, hard_weight, label_smoothing,
        ignore_index, unlabeled_index, reduction,
    )  # fmt: skip
    if class_dim != -1:
        student_logits, teacher_logits, target = classes_last(
            OP, class_dim, student_logits=student_logits, teacher_logits=teacher_logits, target=target
        )
    teacher: Any = teacher_logits
    plain = type(student_logits) in PLAIN and type(teacher) in PLAIN
    if not plain and (is_dtensor(student_logits) or is_dtensor(teacher)):
        if vocab_group is not None or vocab_offsets is not None:
            raise ArgumentError(f"{OP}: vocab_group is for plain tensors; DTensors say themselves how they are sharded")
        return of_dtensors(  # type: ignore[no-any-return]
            distillation_loss, vocab_parallel.distillation_loss, student_logits, teacher, target, options,
            sample_weight, normalizer, count_group, inplace, return_stats, backend,
        )  # fmt: skip
    if vocab_group is not None or vocab_offsets is not None:
        shards = shards_of(OP, vocab_group, vocab_offsets, student_logits.shape[-1] if student_logits.dim() else 0)
        if shards is not None:
            return vocab_parallel.distillation_loss(
                shards, student_logits, teacher, target, options, sample_weight, normalizer, count_group, inplace,
                return_stats, backend,
            )  # fmt: skip
    topk = rest = None
    if not plain and isinstance(teacher, TeacherTopK):
        topk = teacher
        check_topk(student_logits, topk, target, sample_weight, normalizer, options, return_stats)
        teacher = rows_of(topk)
        rest = teacher.tail_log_prob
        check_where_asked(topk)
    else:
        check_tensors(student_logits, teacher, target, sample_weight, normalizer, options)
    of_teacher = teacher if topk is None else teacher.log_probs
    shape = student_logits.shape
    loss: Tensor
    if sample_weight is not None:
        sample_weight = sample_weight.reshape(-1)
    if target is not None:
        target = flat_target(target, len(shape) - 1, student_logits)
        if not is_on(options.hard_weight):
            target, options = as_mask(OP, shape[-1], target, sample_weight, options)
    divisor: Any = normalizer
    if count_group is not None:
        divisor = divisor_over(OP, count_group, divisor, student_logits, target, sample_weight, shape[-1], options)

    if backend != "reference" and seen_by_dispatcher(student_logits, of_teacher, rest, target, sample_weight):
        # inplace is a permission: whoever traces plans the memory.
        student = student_logits.reshape(-1, shape[-1])
        if topk is None:
            teacher = teacher.reshape(-1, shape[-1])
        divisor = beside(divisor, student_logits)
        call = DistillCall(packed(options), student, teacher, target, sample_weight, divisor)
        loss, rows = _distill_op.distillation_loss(*packed_call(call), return_stats, backend)
        stats = DistillStats.from_rows(rows) if return_stats else None
    else:
        student = dense_rows(student_logits)
        if inplace:
            check_inplace(student_logits, student)
        if topk is None:
            teacher = dense_rows(teacher)
            form, chosen = "distill", select.choose("distill", backend, (student, teacher))
        else:
            check_entries(OP, teacher, target, sample_weight, options)
            warn_where_small(OP, topk, teacher, target, sample_weight, options, stacklevel=3)
            form, chosen = select.TOPK, select.choose(select.TOPK, backend, tensors_of(student, teacher))
        inputs = (options, student, teacher, target, sample_weight, divisor)
        if chosen == "reference":
            loss, stats = _run_reference(DistillCall(*inputs, want_stats=return_stats))
        else:
            kernel = Direct(select.kernel(form, chosen))
            if (student.requires_grad or of_teacher.requires_grad) and torch.is_grad_enabled():
                loss, rows = with_graph(kernel, *inputs, return_stats, inplace)
            else:
                loss, rows, *_ = kernel.forward(DistillCall(*inputs, False, False, False, return_stats))
            stats = None if rows is None else DistillStats.from_rows(rows)

    if reduction == "none":
        loss = loss.reshape(shape[:-1])
    if stats is None:
        return loss
    return loss, DistillStats(*(value.reshape(shape[:-1]) for value in stats))


def _run_reference(call: DistillCall) -> tuple[Tensor, DistillStats | None]:
    """Plain PyTorch, which anything can differentiate and transform."""
    check_values(call, "reference")
    options, student, teacher, target, sample_weight, divisor = call[:6]
    if isinstance(teacher, TopK):
        return reference_topk.distillation_loss(student, teacher, target, sample_weight, divisor, options), None
    return reference_distill.distillation_loss(
        student, teacher, target, sample_weight, divisor, options, want_stats=call.want_stats
    )
