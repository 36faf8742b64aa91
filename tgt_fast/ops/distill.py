"""The soft-label loss on logits: arguments, autograd, choice of backend."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.late import is_on
from tgt_fast.kernels.options import DistillStats
from tgt_fast.kernels.plain import PLAIN
from tgt_fast.ops import _checks
from tgt_fast.ops._adjustments import DEFAULTS, check_adjustments, make_adjustments, refuse, row_temperatures
from tgt_fast.ops._distill_arguments import (
    OP,
    as_mask,
    check_tensors,
    check_topk,
    classes_last,
    flat_target,
    make_options,
)
from tgt_fast.ops._distill_run import run
from tgt_fast.ops.counts import divisor_over
from tgt_fast.ops.record_stats import RecordStats
from tgt_fast.ops.topk import TeacherTopK, check_where_asked, rows_of
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
    temperature: float | Tensor = ...,
    teacher_temperature: float | Tensor | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    label_smoothing: float = ...,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
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
    teacher_logits: Tensor,
    target: Tensor | None = ...,
    *,
    divergence: str = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    teacher_temperature: float | Tensor | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    label_smoothing: float = ...,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
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
    teacher_logits: TeacherTopK,
    target: Tensor | None = ...,
    *,
    divergence: str = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    teacher_temperature: float | Tensor | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    label_smoothing: float = ...,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
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
    class_dim: int = ...,
    vocab_group: Any = ...,
    vocab_offsets: Any = ...,
    inplace: bool = ...,
    return_stats: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, RecordStats]: ...
@overload
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TeacherTopK,
    target: Tensor | None = ...,
    *,
    divergence: str = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    teacher_temperature: float | Tensor | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    label_smoothing: float = ...,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
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
    class_dim: int = ...,
    vocab_group: Any = ...,
    vocab_offsets: Any = ...,
    inplace: bool = ...,
    return_stats: bool = ...,
    backend: str = ...,
) -> Tensor | tuple[Tensor, DistillStats | RecordStats]: ...
@one_thread_in_forks
def distillation_loss(
    student_logits: Tensor,  # [..., C]
    teacher_logits: Tensor | TeacherTopK,  # [..., C]
    target: Tensor | None = None,  # [...], or [..., C]
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    student_bias: Tensor | None = None,  # [C]
    teacher_bias: Tensor | None = None,  # [C]
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
    class_dim: int = -1,
    vocab_group: Any = None,
    vocab_offsets: Any = None,
    inplace: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, DistillStats | RecordStats]:
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
            a * KL((p[y], 1 - p[y]), (q[y], 1 - q[y]))     forward_kl with decoupled=(a, b): DKD
              + b * KL(p over c != y, q over c != y)
            KL(p, l * p + (1 - l) * q)                     forward_kl with skew=l
            KL(q, l * q + (1 - l) * p)                     reverse_kl with skew=l
            KL((1 - m) * p + m * onehot(y), q)             forward_kl with correct_teacher: MFT

    and with the options for it ``s`` is ``student_logits + student_bias``, less ``label_margin[y]`` at the label in
    ``cross_entropy``, and ``(x - mean) / (1e-7 + std)`` of each side stands for ``s`` and ``t`` in ``D``.

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
            factor ``Ts**2`` (not with mse), which :func:`tgt_fast.contrastive_distillation_loss` leaves out. A number,
            or ``(...)`` one a row, not differentiable, whose square is the row's factor.
        teacher_temperature: ``Tt``, in [1e-30, 100], likewise; ``Ts`` by default.
        soft_weight: factor of the soft term, >= 0. A term of weight 0 is not computed.
        hard_weight: factor of the hard term, >= 0.
        label_smoothing: in [0, 1], spread over the classes whose student logit is finite.
        student_bias, teacher_bias: ``(C,)``, added to a side's logits before all else, in the precision of the
            arithmetic; not differentiable. The logarithms of the classes' shares make logit adjustment and the balanced
            softmax: on the student's side of the hard term, and of the soft one where the teacher's have them, too.
        label_margin: ``(C,)``, by class; what the label's student logit is lowered by in the hard term (LDAM).
        standardize: the soft term sees each side's logits with a mean of 0 and an (unbiased) standard deviation of 1
            over the classes that are not -inf, before the temperature. A row's scale then says nothing.
        decoupled: ``(a, b)``, the weights of the label's part and of the others', DKD's alpha and beta, in the place of
            forward_kl, which is the label's part + ``(1 - p[y])`` * the others'. The label is that of ``target``, which
            is needed, also with ``hard_weight=0``; an unlabelled row has forward_kl. A part of weight 0 is not
            computed.
        skew: ``l`` in [0, 0.99]; 0 leaves the divergence as it is. The loss is finite whatever is masked.
        correct_teacher: in (0, 1], by how much the teacher's probability of the label is to lead that of its own first
            class (MFT; 0.2 there); ``m`` mixes in as much of the label, and where it leads, the same is added. It needs
            a target, and an unlabelled row has forward_kl. The gradient to the teacher is that of all of it.
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
        return_stats: also return a :class:`DistillStats`, or of a record a :class:`RecordStats`.
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
    reverse_kl, jsd and cross_entropy, and ``temperature`` must be the record's. The hard term sees all classes. On a
    CPU an id that is out of range or repeated in its row is an error; on a device it is dropped,
    unless the environment variable ``TGT_FAST_CHECK_RECORDS=1`` asks for a check, which waits for the device.

    **Biases, margins and the forms of the divergence** (from ``student_bias`` to ``correct_teacher``, and temperatures
    a row) go with each other, but for the last three, of which one replaces the divergence. On a CPU the kernel takes
    them in its pass over the logits. With CUDA and with Triton they have a kernel of their own, three to six passes
    over a row (not yet run on a GPU), but for shares of the classes as target, where the plain kernel runs on logits
    that PyTorch adjusts, a few rows at a time; nothing waits. They are refused for a record, in ``vocab_group`` and
    with DTensors.

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
    serves the exploration of Zaheer et al., "Teacher Guided Training", ICLR 2023. Menon et al., "Long-Tail Learning via
    Logit Adjustment", 2021; Cao et al., LDAM, 2019; Sun et al., "Logit Standardization in Knowledge Distillation",
    2024; Zhao et al., "Decoupled Knowledge Distillation", 2022; Ko et al., DistiLLM, 2024; NVIDIA's Model Optimizer for
    the corrected teacher.

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
    temperatures = None
    if isinstance(temperature, Tensor) or isinstance(teacher_temperature, Tensor):
        temperature, teacher_temperature, temperatures = row_temperatures(OP, temperature, teacher_temperature)
    options = make_options(
        divergence, beta, temperature, teacher_temperature, soft_weight, hard_weight, label_smoothing,
        ignore_index, unlabeled_index, reduction,
    )  # fmt: skip
    asked = (student_bias, teacher_bias, label_margin, standardize, decoupled, skew, correct_teacher)
    adjust = None
    if temperatures is not None or any(
        given is not usual and given != usual for given, usual in zip(asked, DEFAULTS, strict=True)
    ):
        adjust = make_adjustments(OP, options, *asked, temperatures)
    if class_dim != -1:
        student_logits, teacher_logits, target = classes_last(
            OP, class_dim, student_logits=student_logits, teacher_logits=teacher_logits, target=target
        )
    teacher: Any = teacher_logits
    plain = type(student_logits) in PLAIN and type(teacher) in PLAIN
    if not plain and (is_dtensor(student_logits) or is_dtensor(teacher)):
        if vocab_group is not None or vocab_offsets is not None:
            raise ArgumentError(f"{OP}: vocab_group is for plain tensors; DTensors say themselves how they are sharded")
        refuse(OP, adjust, "with DTensors")
        return of_dtensors(  # type: ignore[no-any-return]
            distillation_loss, vocab_parallel.distillation_loss, student_logits, teacher, target, options,
            sample_weight, normalizer, count_group, inplace, return_stats, backend,
        )  # fmt: skip
    if vocab_group is not None or vocab_offsets is not None:
        shards = shards_of(OP, vocab_group, vocab_offsets, student_logits.shape[-1] if student_logits.dim() else 0)
        if shards is not None:
            refuse(OP, adjust, "with classes in several processes (vocab_group)")
            return vocab_parallel.distillation_loss(
                shards, student_logits, teacher, target, options, sample_weight, normalizer, count_group, inplace,
                return_stats, backend,
            )  # fmt: skip
    topk = rest = None
    if not plain and isinstance(teacher, TeacherTopK):
        topk = teacher
        refuse(OP, adjust, "with a top-k record of the teacher")
        check_topk(student_logits, topk, target, sample_weight, normalizer, options)
        teacher = rows_of(topk)
        rest = teacher.tail_log_prob
        check_where_asked(topk)
    else:
        check_tensors(student_logits, teacher, target, sample_weight, normalizer, options)
    shape = student_logits.shape
    if adjust is not None:
        adjust = check_adjustments(OP, adjust, shape[:-1], shape[-1], student_logits, target)
    if sample_weight is not None:
        sample_weight = sample_weight.reshape(-1)
    if target is not None:
        target = flat_target(target, len(shape) - 1, student_logits)
        if not is_on(options.hard_weight) and (adjust is None or not adjust.by_label):
            target, options = as_mask(OP, shape[-1], target, sample_weight, options)
    divisor: Any = normalizer
    if count_group is not None:
        divisor = divisor_over(OP, count_group, divisor, student_logits, target, sample_weight, shape[-1], options)
    loss, stats = run(
        student_logits, teacher, target, sample_weight, divisor, options, adjust, record=topk, rest=rest,
        want_stats=return_stats, inplace=inplace, backend=backend,
    )  # fmt: skip
    if reduction == "none":
        loss = loss.reshape(shape[:-1])
    if stats is None:
        return loss
    return loss, type(stats)(*(value.reshape(shape[:-1]) for value in stats))
