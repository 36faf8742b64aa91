"""The soft-label loss from hidden states and heads: arguments, autograd, choice of backend."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.kernels.late import is_on
from tgt_fast.kernels.linear_call import topk_of, vocabulary_of
from tgt_fast.kernels.options import DistillStats, LinearTensors
from tgt_fast.ops import _checks
from tgt_fast.ops._adjustments import check_adjustments, make_adjustments, refuse, row_temperatures
from tgt_fast.ops._distill_arguments import as_mask, flat_target, make_options
from tgt_fast.ops._heads import warn_of_adapters, whole_head
from tgt_fast.ops._linear_arguments import (
    OP,
    check_teacher,
    check_tensors,
    check_topk,
    check_values,
    make_heads,
    warn_of_trained_teacher,
)
from tgt_fast.ops._linear_op import all_at_once
from tgt_fast.ops._linear_run import run_dispatched, run_in_chunks, run_reference
from tgt_fast.ops.counts import divisor_over
from tgt_fast.ops.library import seen_by_dispatcher
from tgt_fast.ops.record_stats import RecordStats
from tgt_fast.ops.topk import TeacherTopK, check_where_asked, warn_where_small
from tgt_fast.ops.vocab_parallel import linear as vocab_parallel
from tgt_fast.ops.vocab_parallel.dtensor import is_dtensor
from tgt_fast.ops.vocab_parallel.dtensor_linear import linear_distillation_loss as of_dtensors
from tgt_fast.ops.vocab_parallel.shards import shards_of


@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = ...,
    teacher_weight: Tensor | None = ...,
    target: Tensor | None = ...,
    *,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
    teacher_logits: Tensor | TeacherTopK | None = ...,
    student_scale: float = ...,
    student_softcap: float | None = ...,
    teacher_scale: float = ...,
    teacher_softcap: float | None = ...,
    vocab_size: int | None = ...,
    vocab_map: Tensor | None = ...,
    vocab_mask: Tensor | None = ...,
    divergence: str = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    teacher_temperature: float | Tensor | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    label_smoothing: float = ...,
    label_margin: Tensor | None = ...,
    standardize: bool = ...,
    decoupled: tuple[float, float] | None = ...,
    skew: float = ...,
    correct_teacher: float | None = ...,
    sample_weight: Tensor | None = ...,
    ignore_index: int = ...,
    unlabeled_index: int = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    count_group: Any = ...,
    vocab_group: Any = ...,
    vocab_offsets: Any = ...,
    memory_budget: int | None = ...,
    return_stats: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = ...,
    teacher_weight: Tensor | None = ...,
    target: Tensor | None = ...,
    *,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
    teacher_logits: Tensor | None = ...,
    student_scale: float = ...,
    student_softcap: float | None = ...,
    teacher_scale: float = ...,
    teacher_softcap: float | None = ...,
    vocab_size: int | None = ...,
    vocab_map: Tensor | None = ...,
    vocab_mask: Tensor | None = ...,
    divergence: str = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    teacher_temperature: float | Tensor | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    label_smoothing: float = ...,
    label_margin: Tensor | None = ...,
    standardize: bool = ...,
    decoupled: tuple[float, float] | None = ...,
    skew: float = ...,
    correct_teacher: float | None = ...,
    sample_weight: Tensor | None = ...,
    ignore_index: int = ...,
    unlabeled_index: int = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    count_group: Any = ...,
    vocab_group: Any = ...,
    vocab_offsets: Any = ...,
    memory_budget: int | None = ...,
    return_stats: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, DistillStats]: ...
@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = ...,
    teacher_weight: Tensor | None = ...,
    target: Tensor | None = ...,
    *,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
    teacher_logits: Tensor | TeacherTopK | None = ...,
    student_scale: float = ...,
    student_softcap: float | None = ...,
    teacher_scale: float = ...,
    teacher_softcap: float | None = ...,
    vocab_size: int | None = ...,
    vocab_map: Tensor | None = ...,
    vocab_mask: Tensor | None = ...,
    divergence: str = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    teacher_temperature: float | Tensor | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    label_smoothing: float = ...,
    label_margin: Tensor | None = ...,
    standardize: bool = ...,
    decoupled: tuple[float, float] | None = ...,
    skew: float = ...,
    correct_teacher: float | None = ...,
    sample_weight: Tensor | None = ...,
    ignore_index: int = ...,
    unlabeled_index: int = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    count_group: Any = ...,
    vocab_group: Any = ...,
    vocab_offsets: Any = ...,
    memory_budget: int | None = ...,
    return_stats: bool = ...,
    backend: str = ...,
) -> Tensor | tuple[Tensor, DistillStats | RecordStats]: ...
@one_thread_in_forks
def linear_distillation_loss(
    student_hidden: Tensor,  # [..., Hs]
    student_weight: Tensor,  # [Cs, Hs]
    teacher_hidden: Tensor | None = None,  # [..., Ht]
    teacher_weight: Tensor | None = None,  # [Ct, Ht]
    target: Tensor | None = None,  # [...], or [..., C]
    *,
    student_bias: Tensor | None = None,  # [Cs]
    teacher_bias: Tensor | None = None,  # [Ct]
    teacher_logits: Tensor | TeacherTopK | None = None,  # [..., Ct]
    student_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    vocab_map: Tensor | None = None,  # [Ct]
    vocab_mask: Tensor | None = None,  # [Cs]
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    label_margin: Tensor | None = None,  # [C]
    standardize: bool = False,
    decoupled: tuple[float, float] | None = None,
    skew: float = 0.0,
    correct_teacher: float | None = None,
    sample_weight: Tensor | None = None,  # [...]
    ignore_index: int = -100,
    unlabeled_index: int = -1,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    count_group: Any = None,
    vocab_group: Any = None,
    vocab_offsets: Any = None,
    memory_budget: int | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, DistillStats | RecordStats]:
    r"""The distillation loss of two linear heads, whose logits are never all in memory.

    The same value and gradients as::

        student = student_scale * (student_hidden @ student_weight.T + student_bias)
        student = student_softcap * tanh(student / student_softcap)
        teacher = (likewise, or teacher_logits)
        distillation_loss(*align_logits(student, teacher, vocab_size=..., vocab_map=..., vocab_mask=...), target, ...)

    but computed a chunk of rows at a time, in float32 from unrounded logits (float64 when an input is float64).

    Args:
        student_hidden: ``(..., Hs)``, float64, float32, bfloat16 or float16. Differentiable.
        student_weight: ``(Cs, Hs)``, any of these dtypes. Differentiable. It may be ``teacher_weight`` itself. A single
            class is refused, as by :func:`tgt_fast.distillation_loss`.
        teacher_hidden: ``(..., Ht)``. Differentiable: with frozen heads a gradient to it, or to ``student_hidden``,
            costs no product for a weight.
        teacher_weight: ``(Ct, Ht)``. Differentiable.
        target: ``(...)`` student's class indices, needed when ``hard_weight > 0``; with ``hard_weight=0`` it may be
            given as a mask, of which ``ignore_index`` alone has an effect. Or ``(..., C)`` shares of the classes, C
            those of the student or ``vocab_size``; see :func:`tgt_fast.distillation_loss`.
        student_bias, teacher_bias: ``(Cs,)`` and ``(Ct,)``. Differentiable. Add to them, divided by the scale, what
            :func:`tgt_fast.distillation_loss` takes by these names (it has no place beside a softcap).
        teacher_logits: ``(..., Ct)`` instead of ``teacher_hidden`` and ``teacher_weight``; taken as they are.
            Differentiable. Or a :class:`TeacherTopK`, see below.
        student_scale, teacher_scale: factors of the logits, > 0.
        student_softcap, teacher_softcap: bounds of the logits, > 0.
        vocab_size: the first so many classes of both sides are the same, the others are padding: they get no
            probability on either side. Needed when the numbers of classes differ and there is no ``vocab_map``.
        vocab_map: ``(Ct,)`` integers, the student's class of each of the teacher's, -1 where it has none. A class that
            one side lacks gets no probability on either side. Not together with ``vocab_size``.
        vocab_mask: ``(Cs,)`` bool, False for classes to leave out besides.
        divergence, beta, temperature, teacher_temperature, soft_weight, hard_weight, label_smoothing, label_margin,
            standardize, decoupled, skew, correct_teacher, sample_weight, ignore_index, unlabeled_index, reduction,
            normalizer, count_group: see :func:`tgt_fast.distillation_loss`; the rows are those of ``student_hidden``,
            the margins those of the classes of the loss. From ``label_margin`` to ``correct_teacher``, and with a
            temperature a row, the loss cannot be compiled.
        vocab_group, vocab_offsets: likewise, for heads of which each process has some consecutive rows; hidden states
            are the same in all. See below.
        memory_budget: bytes of a chunk's logits and of what stands beside them; 64 MiB by default on a CPU, 2 GiB on a
            device. One row at least. Beside it a head of another dtype than the arithmetic's is widened, whole where
            that takes no more than as many bytes again, else in blocks of 8 MiB. The result hardly depends on it: the
            sums over rows are rounded in another order.
        return_stats: also return a :class:`DistillStats` from the same pass, or of a record a :class:`RecordStats`.
        backend: whose row kernel runs on a chunk: ``"auto"``, ``"native"`` or ``"triton"``. ``"reference"`` is the
            formula above, in float64, with all logits in memory.

    Returns:
        The loss, float32 (float64 when an input is float64): 0-d, or ``(...)`` for ``"none"``. With ``return_stats``
        the pair of it and the statistics.

    A teacher's head that requires grad gets one, at the cost of time and of memory of its size: pass
    ``weight.detach()`` where the teacher is not trained. A warning says so once a process.

    Of a head with adapters (LoRA on ``lm_head``) ``head.weight`` is the weight underneath, which would leave them out
    of the loss and untrained: pass ``head.weight + head.get_delta_weight("default")``, a V x H matrix more, or take
    :func:`tgt_fast.distillation_loss` of the model's logits. A warning says so once a head, where PEFT is in use.

    A head that ``fully_shard`` (FSDP2) keeps in shards, a DTensor, is gathered once a call, in the dtype of the hidden
    states, and its gradient is averaged over the processes and scattered, as FSDP2 does with those of a forward pass;
    all processes call. One that is tied to the embedding gets both gradients. A loss that is taken inside the wrapped
    forward finds the head whole. A parameter of DeepSpeed's ZeRO-3 that is not there is fetched for the call by its own
    ``all_gather`` and ``partition`` (not yet run with DeepSpeed).

    Gradients are made together with the loss, those that are asked for, and scaled in backward. In float16, and for
    ``"none"`` with a gradient to a weight or bias, backward makes them, from logits computed again; so does a second
    backward over the same graph. Sums over rows are kept in float32. Deterministic as far as PyTorch's matrix product
    is. Second derivatives need ``backend="reference"``. Under autocast the arguments are taken in the precision they
    come in. On a device (not yet run on a GPU) bfloat16 heads multiply in half precision with sums in float32: logits
    unrounded, their gradients rounded to float16 in units of the row's weight. Other dtypes multiply in float32.

    **Heads in several processes.** With ``vocab_group`` a process passes its classes of both heads (``teacher_logits``
    are of its classes, too) and gets their gradients; those of hidden states are of all classes, added up in float32 in
    one ``all_reduce`` a chunk, on its way while the next chunk is at work. ``target``, ``vocab_size``, ``vocab_mask``
    and a record, with its ``vocab_map``, speak of all classes; of heads ``vocab_map`` is refused. Chunks are of the
    same rows everywhere, and each sends what :func:`tgt_fast.distillation_loss` says. ``torch.compile`` makes a program
    for each number of rows, with all chunks in it. The same of DTensors, where hidden states are some: heads Shard(0)
    or Replicate, hidden states sharded on rows or Replicate, on one mesh.

    **A top-k record of the teacher** as ``teacher_logits``: the loss that :func:`tgt_fast.distillation_loss` takes of
    it, at the record's temperature, with its divergences and statistics. ``vocab_size``, ``vocab_map`` and
    ``vocab_mask`` see the record's ``num_classes`` as the teacher's. An entry whose class is not shared is left out.
    How much of the tail lies on such classes a record does not say, so that with ``"bucket"`` and ``"uniform"`` all of
    its classes must be shared. With ``"renormalize"`` a row none of whose entries is shared gives NaN.

    Raises:
        ShapeError, DTypeError, DeviceError, ArgumentError: before anything runs, with the offending values.
        BackendError: the backend asked for by name cannot run this call.

    >>> import torch, tgt_fast as tgt
    >>> hidden, weight = torch.ones(2, 3, requires_grad=True), torch.eye(4, 3, requires_grad=True)
    >>> teacher_hidden, teacher_weight = torch.ones(2, 5), torch.eye(6, 5)
    >>> loss = tgt.linear_distillation_loss(hidden, weight, teacher_hidden, teacher_weight, vocab_size=4)
    >>> loss.backward()
    >>> round(loss.item(), 4), weight.grad.shape
    (0.078, torch.Size([4, 3]))
    """
    _checks.refuse_tracing(OP)
    return_stats = _checks.flag(OP, "return_stats", return_stats)
    temperatures = None
    if isinstance(temperature, Tensor) or isinstance(teacher_temperature, Tensor):
        temperature, teacher_temperature, temperatures = row_temperatures(OP, temperature, teacher_temperature)
    options = make_options(
        divergence, beta, temperature, teacher_temperature, soft_weight, hard_weight, label_smoothing,
        ignore_index, unlabeled_index, reduction, OP,
    )  # fmt: skip
    adjust = make_adjustments(
        OP, options, None, None, label_margin, standardize, decoupled, skew, correct_teacher, temperatures
    )
    topk = teacher_logits if isinstance(teacher_logits, TeacherTopK) else None
    heads = make_heads(
        student_scale, student_softcap, teacher_scale, teacher_softcap, vocab_size, memory_budget, topk
    )  # fmt: skip
    check_teacher(teacher_hidden, teacher_weight, teacher_bias, teacher_logits, heads)
    teacher, ids, rest = teacher_hidden if teacher_logits is None else teacher_logits, None, None
    if topk is not None:
        refuse(OP, adjust, "with a top-k record of the teacher")
        check_topk(topk, heads, options)  # before its tensors are read
        teacher, ids, rest = topk.log_probs.detach(), topk.ids, topk.rest()
    if is_dtensor(student_hidden) or is_dtensor(teacher):
        refuse(OP, adjust, "with DTensors")
        sides: Any = (student_hidden, student_weight, student_bias, teacher, teacher_weight, teacher_bias)
        others: Any = (target, sample_weight, vocab_map, vocab_mask)
        return of_dtensors(  # type: ignore[no-any-return]
            linear_distillation_loss, LinearTensors(*sides, *others), topk,
            normalizer, count_group, heads, options, return_stats, backend,
            named_group=vocab_group is not None or vocab_offsets is not None,
        )  # fmt: skip
    student_weight, student_bias = whole_head(student_hidden, student_weight, student_bias)
    teacher_weight, teacher_bias = whole_head(teacher_hidden, teacher_weight, teacher_bias)
    given = LinearTensors(
        student_hidden, student_weight, student_bias, teacher, teacher_weight, teacher_bias, target,  # type: ignore[arg-type]
        sample_weight, vocab_map, vocab_mask, ids, rest,
    )  # fmt: skip
    if vocab_group is not None or vocab_offsets is not None:
        shards = shards_of(OP, vocab_group, vocab_offsets, student_weight.shape[0] if student_weight.dim() else 0)
        if shards is not None:
            refuse(OP, adjust, "with classes in several processes (vocab_group)")
            return vocab_parallel.linear_distillation_loss(
                shards, given, topk, normalizer, count_group, heads, options, return_stats, backend
            )
    check_tensors(given, normalizer, heads, options)
    warn_of_trained_teacher(teacher_weight, teacher_bias)
    warn_of_adapters(OP, student_weight, teacher_weight)
    if topk is not None:
        check_where_asked(topk)
    shape = student_hidden.shape[:-1]
    classes = student_weight.shape[0] if vocab_size is None else vocab_size
    if adjust is not None:
        adjust = check_adjustments(OP, adjust, shape, classes, student_hidden, target)
    loss: Tensor
    tensors = given._replace(
        student_hidden=_rows(given.student_hidden),
        teacher=_rows(given.teacher),
        target=None if target is None else flat_target(target, len(shape), student_hidden),
        sample_weight=None if sample_weight is None else sample_weight.reshape(-1),
        topk_ids=None if ids is None else _rows(ids).to(torch.int64),
        tail_log_prob=None if rest is None else rest.reshape(-1),
    )
    if tensors.target is not None and not is_on(options.hard_weight) and (adjust is None or not adjust.by_label):
        mask, options = as_mask(OP, classes, tensors.target, tensors.sample_weight, options)
        tensors = tensors._replace(target=mask)
    divisor = normalizer
    if count_group is not None:
        shared = vocabulary_of(tensors, heads)
        named = shared.without_missing(tensors.target, options.ignore_index)
        divisor = divisor_over(
            OP, count_group, normalizer, tensors.student_hidden, named, tensors.sample_weight, shared.classes, options
        )
    if backend != "reference" and seen_by_dispatcher(*tensors):
        loss, stats = run_dispatched(tensors, divisor, heads, options, return_stats, backend, adjust)
    else:
        check_values(tensors, heads, options)
        entries = topk_of(tensors, heads)
        if topk is not None and entries is not None:
            warn_where_small(OP, topk, entries, tensors.target, tensors.sample_weight, options, stacklevel=3)
        run = run_reference if all_at_once(tensors, backend) else run_in_chunks
        loss, stats = run(tensors, divisor, heads, options, return_stats, backend, adjust)

    if reduction == "none":
        loss = loss.reshape(shape)
    if stats is None:
        return loss
    return loss, type(stats)(*(value.reshape(shape) for value in stats))


def _rows(matrix: Tensor) -> Tensor:
    """(..., H) as (N, H)."""
    return matrix if matrix.dim() == 2 else matrix.reshape(-1, matrix.shape[-1])
