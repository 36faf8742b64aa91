"""For those who test: a call of every registered op, in every form that has gone wrong somewhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels import select
from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.calls import DistillCall
from tgt_fast.kernels.options import (
    DIFFERENTIABLE,
    DIVERGENCES,
    OP_PERTURB,
    ROW_STATE,
    TAILS,
    TOPK_DIVERGENCES,
    DistillOptions,
    LinearOptions,
    LinearTensors,
    TopK,
)
from tgt_fast.ops import _distill_op as distill
from tgt_fast.ops import _linear_op as linear
from tgt_fast.ops import latent, listwise, tokens
from tgt_fast.ops.topk import TeacherTopK, topk_teacher

__all__ = ["op_samples"]

Sample = tuple[Any, tuple[Any, ...], dict[str, Any]]


def op_samples(device: torch.device | str = "cpu", *, backend: str = "auto") -> Iterator[Sample]:
    """Yields legal calls ``(op, args, kwargs)`` of every op in ``torch.ops.tgt_fast``, for ``op(*args, **kwargs)``.

    They cover no rows at all, odd strides, every subset of inputs that ask for gradients, mixed dtypes and every option
    that changes the shape of a result. Use them with ``torch.library.opcheck``, or to try a backend of your own.

    Args:
        device: where the tensors lie.
        backend: which backend the calls ask for. Calls of ops for which it has no kernels on ``device`` are left out:
            Triton has none for records and drawn tokens, the core none for a soft embedding on a GPU.

    The numbers are the same at every call; no global random state is used.

    >>> import torch, tgt_fast.testing
    >>> sorted({op.name() for op, _, _ in tgt_fast.testing.op_samples()})[:2]
    ['tgt_fast::ascend_latents', 'tgt_fast::distill_backward']
    """
    make = _Maker(torch.device(device))
    yield from _distill(make, backend)
    yield from _perturb(make, backend)
    yield from _ascend(make, backend)
    records = _has_kernels(select.TOPK, device, backend)
    yield from _linear(make, backend, TAILS if records else ())
    if records:
        yield from _topk(make, backend)
    if _has_kernels("listwise", device, backend):
        yield from _listwise(make, backend)
    if _has_kernels("tokens", device, backend):
        yield from _tokens(make, backend)
    if _has_kernels("soft_embedding", device, backend):
        yield from _soft(make, backend)


class _Maker:
    """Tensors of fixed random numbers."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._device = device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, layout: str = "dense") -> Tensor:
        """Layouts: dense; sliced (a row stride larger than the row); transposed; every other class."""
        *batch, last = shape
        wide = {"sliced": last + 3, "every-other": 2 * last}.get(layout, last)
        if layout == "transposed":
            return self._draw(last, *batch).to(self._device, dtype).movedim(0, -1)
        drawn = self._draw(*batch, wide).to(self._device, dtype)
        return drawn[..., ::2] if layout == "every-other" else drawn[..., :last]

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator).to(self._device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator).to(self._device)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)


def _has_kernels(op: str, device: torch.device | str, backend: str) -> bool:
    """True if the backend serves ``op`` where it serves the loss. One that serves nothing here says so when called."""
    name = select.requested(backend)
    if name == "auto":
        return True
    refusal, tensors = select.BACKENDS[name].refusal, (torch.empty(1, 1, device=device),)
    return refusal(op, tensors) is None or refusal("distill", tensors) is not None


def _distill(make: _Maker, backend: str) -> Iterator[Sample]:
    classes = 13

    def call(
        count: int, options: DistillOptions, *, grads: tuple[bool, ...] = (True, False), layout: str = "dense",
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32), weighted: bool = False,
        divisor: Tensor | float | None = None, adjust: Adjustments | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        student, teacher = (make.normal(count, classes, dtype=dtype, layout=layout) for dtype in dtypes)
        target = make.integers(classes, count) if options.hard_weight > 0 else None
        weight = make.uniform(count) if weighted else None
        student, teacher = (x.requires_grad_(g) for x, g in zip((student, teacher), grads, strict=True))
        return distill.packed_call(DistillCall(options, student, teacher, target, weight, divisor, adjust=adjust))

    plain, both = DistillOptions(), DistillOptions(hard_weight=0.5, label_smoothing=0.1)
    for count, grads, options in itertools.product(
        (0, 5), itertools.product((False, True), repeat=2), (both, DistillOptions(reduction="none"))
    ):
        yield distill.distillation_loss, (*call(count, options, grads=grads), True, backend), {}
    for layout in ("sliced", "transposed", "every-other"):
        yield distill.distillation_loss, (*call(5, both, grads=(True, True), layout=layout), False, backend), {}
    for divergence in DIVERGENCES:
        options = DistillOptions(divergence=divergence, temperature=2.0, teacher_temperature=3.0, reduction="sum")
        yield distill.distillation_loss, (*call(5, options, grads=(True, True), weighted=True), True, backend), {}
    halves = (torch.float16, torch.float16)
    for dtypes in (halves, (torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)):
        yield distill.distillation_loss, (*call(5, both, grads=(True, True), dtypes=dtypes), False, backend), {}
    student, teacher = make.normal(5, classes).requires_grad_(), make.normal(5, classes)
    mixed = DistillCall(DistillOptions(hard_weight=0.5), student, teacher, make.uniform(5, classes))
    yield distill.distillation_loss, (*distill.packed_call(mixed), False, backend), {}
    for divisor in (make.uniform(1).reshape(()), 7.0):
        yield distill.distillation_loss, (*call(5, plain, divisor=divisor), False, backend), {}
    for wanted in itertools.product((False, True), repeat=2):
        yield from _passes(make, call(5, both, grads=(False, False)), backend, wanted)
    for adjust in _adjustments(make, 5, classes):
        yield distill.distillation_loss, (*call(5, both, grads=(True, True), adjust=adjust), True, backend), {}
        yield from _passes(make, call(5, both, grads=(False, False), adjust=adjust), backend, (True, True))
    yield distill.distillation_loss, (*call(5, _late(both), grads=(True, True)), True, backend), {}
    for factor in (make.uniform(5), make.uniform(1).reshape(())):
        yield distill.distill_scale_, (make.normal(5, classes), factor, backend), {}


def _adjustments(make: _Maker, count: int, classes: int) -> Iterator[Adjustments]:
    biases = make.normal(classes), make.normal(classes), make.normal(classes)
    yield Adjustments(True, (1.0, 2.0), 0.0, None, *biases, make.uniform(count) + 0.5, make.uniform(count) + 0.5)
    yield Adjustments(skew=0.2)
    yield Adjustments(correct_teacher=0.2, label_margin=biases[2])


def _passes(make: _Maker, call: tuple[Any, ...], backend: str, wanted: tuple[bool, ...]) -> Iterator[Sample]:
    """A forward that keeps the rows' state, and the backward from it."""
    args = (*call, False, backend, *wanted, True)
    yield distill.distill_forward, args, {}
    state = distill.distill_forward(*args)[-1]
    assert state.shape[1] == ROW_STATE
    yield distill.distill_backward, (*call, state, make.uniform(5), backend, *wanted), {}


def _late(options: DistillOptions) -> DistillOptions:
    """The same options with their numbers in a tensor."""
    return options._replace(numbers=torch.tensor(options[1:7], dtype=torch.float64))


def _perturb(make: _Maker, backend: str) -> Iterator[Sample]:
    def call(
        z: Tensor, *, sigmas: Tensor | None = None, units: Tensor | None = None, truncation: float | None = None,
        radius: float | None = None, on_device: bool = False,
    ) -> Sample:  # fmt: skip
        ids = make.integers(1 << 40, z.shape[0])
        seed, step = (make.integers(99, 1).reshape(()) if on_device else None for _ in range(2))
        replicas = make.integers(1 << 16, z.shape[0]) if on_device else None
        args = (z, sigmas, 0.5, units, seed, -3, ids, step, 2, replicas, 1, OP_PERTURB, truncation, radius, backend)
        return latent.perturb_op, args, {}

    for count, grad in itertools.product((0, 4), (False, True)):
        yield call(make.normal(count, 9).requires_grad_(grad))
    for layout in ("sliced", "transposed", "every-other"):
        yield call(make.normal(4, 9, layout=layout).requires_grad_(), truncation=1.5)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        yield call(make.normal(4, 9, dtype=dtype).requires_grad_(), on_device=True)
    for radius in (-1.0, 2.0):
        yield call(make.normal(4, 9).requires_grad_(), radius=radius)
    yield call(make.normal(4, 9), sigmas=make.uniform(4, 1), units=make.uniform(9))


def _ascend(make: _Maker, backend: str) -> Iterator[Sample]:
    def call(
        count: int, *, layout: str = "dense", dtype: torch.dtype = torch.float32, norm: str = "l2", ball: bool = False,
        sigma: float = 0.0, columns: bool = False, grads: tuple[bool, ...] = (False, False),
    ) -> Sample:  # fmt: skip
        z, grad = (make.normal(count, 9, dtype=dtype, layout=layout).requires_grad_(g) for g in grads)
        anchor = make.normal(count, 9, dtype=dtype) if ball else None
        steps, radii, sigmas = (make.uniform(count, 1) if columns else None for _ in range(3))
        radius = 0.5 if ball and not columns else None
        ids, replicas = make.integers(1 << 40, count), make.integers(1 << 16, count) if columns else None
        args = (
            z, grad, steps, 0.5, make.uniform(9) if columns else None, anchor, radii if ball else None, radius, norm,
            "l2" if norm == "l2" else "linf", sigmas, sigma, None, 3, ids, None, 2, replicas, 1, backend,
        )  # fmt: skip
        return latent.ascend_op, args, {}

    for count, grads in itertools.product((0, 4), itertools.product((False, True), repeat=2)):
        yield call(count, grads=grads, ball=True)
    for layout in ("sliced", "transposed", "every-other"):
        yield call(4, layout=layout, sigma=0.1)
    for dtype, norm in zip((torch.float64, torch.bfloat16, torch.float16), ("l2", "linf", "raw"), strict=True):
        yield call(4, dtype=dtype, norm=norm, ball=True)
    yield call(4, columns=True, ball=True, sigma=0.1)


def _linear(make: _Maker, backend: str, tails: tuple[str, ...]) -> Iterator[Sample]:  # of the teacher's records
    student_classes, teacher_classes, hidden = 13, 15, (6, 5)
    both = DistillOptions(hard_weight=0.5, label_smoothing=0.1)
    padded, one_row = LinearOptions(vocab_size=12), LinearOptions(vocab_size=13, memory_budget=1)
    capped = LinearOptions(2.0, 3.0, 0.5, 4.0, vocab_size=13)

    def tensors(
        count: int, *, grads: tuple[bool, ...] = (True,) * DIFFERENTIABLE, layout: str = "dense", biased: bool = True,
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32), given: bool = False,
        extra: bool = False, record: TeacherTopK | None = None,
    ) -> LinearTensors:  # fmt: skip
        sides: list[Tensor | None] = []
        for classes, width, dtype in zip((student_classes, teacher_classes), hidden, dtypes, strict=True):
            sides.append(make.normal(count, width, dtype=dtype, layout=layout))
            sides.append(make.normal(classes, width, dtype=dtype, layout=layout))
            sides.append(make.normal(classes, dtype=dtype) if biased else None)
        if given:
            sides[3:] = [make.normal(count, teacher_classes, dtype=dtypes[1], layout=layout), None, None]
        if record is not None:
            sides[3:] = [record.log_probs, None, None]
        made: list[Any] = [x if x is None else x.requires_grad_(g) for x, g in zip(sides, grads, strict=True)]
        made.append(make.integers(5, count))
        if extra:
            ids = torch.arange(teacher_classes, device=made[0].device) - 2
            made += [make.uniform(count), ids.clamp_min(-1), ids[2:] != 5]
        elif record is not None:
            made += [None, None, None]
        return LinearTensors(*made, *(() if record is None else (record.ids, record.rest())))

    def call(
        t: LinearTensors, heads: LinearOptions = padded, options: DistillOptions = both, stats: bool = False,
        divisor: tuple[Tensor | None, float | None] = (None, None), adjust: Adjustments = Adjustments(),  # noqa: B008
    ) -> Sample:  # fmt: skip
        args = (*t, *divisor, *heads, *options, *adjust, stats, backend)
        return linear.linear_distillation_loss, args, {}

    some = [tuple(i in wanted for i in range(DIFFERENTIABLE)) for wanted in ((), (0,), (3,), (0, 1), (1, 2, 4, 5))]
    for count, grads in itertools.product((0, 4), [*some, (True,) * DIFFERENTIABLE]):
        yield call(tensors(count, grads=grads), stats=True)
    for heads in (one_row, capped):
        yield call(tensors(4), heads, DistillOptions(reduction="none", hard_weight=1.0), stats=True)
    for layout in ("sliced", "transposed", "every-other"):
        yield call(tensors(4, layout=layout))
    halves = (torch.float16, torch.float16)
    for dtypes in (halves, (torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)):
        yield call(tensors(4, dtypes=dtypes, biased=False), one_row)
    yield call(tensors(4, extra=True), LinearOptions(), DistillOptions(hard_weight=1.0, reduction="sum"))
    without = (True,) * 4 + (False,) * 2
    yield call(tensors(4, given=True, grads=without))
    yield call(tensors(4, given=True, grads=without, extra=True), LinearOptions())
    for count, (tail, grads), reduction in itertools.product((0, 4), zip(tails, some, strict=False), ("mean", "none")):
        record = topk_teacher(make.normal(count, student_classes), 4, tail=tail)
        heads = LinearOptions(student_softcap=3.0, tail_mode=tail, topk_classes=student_classes)
        for dtypes in (halves, (torch.float32, torch.float32)):
            student_alone = (*grads[:3], False, False, False)
            given = tensors(count, grads=student_alone, dtypes=dtypes, record=record)
            yield call(given, heads, DistillOptions(hard_weight=0.5, reduction=reduction))
    if tails:
        record = topk_teacher(make.normal(4, teacher_classes), 4, tail="renormalize")
        heads = LinearOptions(tail_mode="renormalize", topk_classes=teacher_classes)
        yield call(tensors(4, grads=(True,) * 3 + (False,) * 3, record=record, extra=True), heads)
    for count, reduction in itertools.product((0, 4), ("mean", "none")):  # as the contrastive loss calls it
        both_scaled = LinearOptions(20.0, None, 10.0, None, memory_budget=1)
        queries = tensors(count, biased=False)._replace(
            teacher_weight=make.normal(student_classes, hidden[1]).requires_grad_(),
            class_ids=make.integers(6, student_classes), own_class=make.integers(student_classes, count),
        )  # fmt: skip
        queries = queries._replace(target=queries.own_class)
        yield call(queries, both_scaled, DistillOptions(hard_weight=1.0, reduction=reduction), stats=True)
    for divisor in ((make.uniform(1).reshape(()), None), (None, 7.0)):
        yield call(tensors(4), divisor=divisor)
    for adjust in _adjustments(make, 4, student_classes - 1):  # of those that are shared
        yield call(tensors(4), adjust=adjust._replace(student_bias=None, teacher_bias=None), stats=True)
    scales = torch.tensor([20.0, 10.0], dtype=torch.float64)
    yield call(tensors(4), LinearOptions(memory_budget=1, scales=scales), _late(both))
    for wanted in [*some, (True,) * DIFFERENTIABLE]:
        t = tensors(4, grads=(False,) * DIFFERENTIABLE)
        options = (*padded, *both, *Adjustments())
        yield linear.linear_distill_forward, (*t, None, None, *options, False, backend, *wanted), {}
        yield linear.linear_distill_backward, (*t, None, 5.0, *options, make.uniform(4), backend, *wanted), {}


def _topk(make: _Maker, backend: str) -> Iterator[Sample]:
    classes, k = 13, 4

    def call(
        count: int, options: DistillOptions, tail: str = "bucket", *, grad: bool = True, layout: str = "dense",
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32), weighted: bool = False,
        divisor: Tensor | float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        student = make.normal(count, classes, dtype=dtypes[0], layout=layout).requires_grad_(grad)
        record = topk_teacher(make.normal(count, classes), k, options.temperature, tail=tail)
        teacher = TopK(record.ids, record.log_probs.to(dtypes[1]), record.rest(), tail)
        target = make.integers(classes, count) if options.hard_weight > 0 else None
        weight = make.uniform(count) if weighted else None
        return distill.packed_call(DistillCall(options, student, teacher, target, weight, divisor))

    def loss(*args: Any, **options: Any) -> Sample:
        return distill.distillation_loss, (*call(*args, **options), False, backend), {}

    both = DistillOptions(hard_weight=0.5, label_smoothing=0.1)
    for count, grad, options in itertools.product((0, 5), (False, True), (both, DistillOptions(reduction="none"))):
        yield loss(count, options, grad=grad)
    for layout in ("sliced", "transposed", "every-other"):
        yield loss(5, both, layout=layout)
    for divergence, tail in itertools.product(TOPK_DIVERGENCES, TAILS):
        options = DistillOptions(divergence=divergence, temperature=2.0, teacher_temperature=2.0, reduction="sum")
        yield loss(5, options, tail, weighted=True)
    halves = (torch.float16, torch.float16)
    for dtypes in (halves, (torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)):
        yield loss(5, both, dtypes=dtypes)
    for divisor in (make.uniform(1).reshape(()), 7.0):
        yield loss(5, both, divisor=divisor)
    yield loss(5, _late(both))
    for tail, wanted in itertools.product(TAILS, (False, True)):
        yield from _passes(make, call(5, both, tail, grad=False), backend, (wanted, False))


def _key(make: _Maker, samples: int) -> tuple[Any, ...]:
    return None, 5, make.integers(2**40, samples), None, 3, make.integers(2**16, samples), 1


def _tokens(make: _Maker, backend: str) -> Iterator[Sample]:
    classes = 13
    for count, layout in ((0, "dense"), (6, "dense"), (6, "sliced"), (6, "transposed"), (6, "every-other")):
        late = torch.tensor([0.7, 0.8, 0.1], dtype=torch.float64)
        for filters in ((1.0, None, None, None, None), (0.7, 5, 0.8, 0.1, None), (1.0, 5, 1.0, 1.0, late)):
            rows = make.normal(count, classes, layout=layout)
            yield tokens.sample_op, (rows, *filters, *_key(make, count // 2), backend), {}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        rows = make.normal(6, classes, dtype=dtype)
        yield tokens.sample_op, (rows, 1.0, None, 0.9, None, None, *_key(make, 6), backend), {}
    held = (make.integers(2**40, 1).reshape(()), 0, make.integers(9, 6), make.integers(9, 1).reshape(()), 0, None, 0)
    yield tokens.sample_op, (make.normal(6, classes), 1.0, None, None, None, None, *held, backend), {}


def _soft(make: _Maker, backend: str) -> Iterator[Sample]:
    classes, width = 13, 4
    both = torch.float32, torch.float32
    forms = [(count, both, "dense") for count in (0, 6)] + [(6, both, layout) for layout in ("sliced", "transposed")]
    forms += [(6, dtypes, "dense") for dtypes in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16))]
    for (count, dtypes, layout), hard in itertools.product(forms, (False, True)):
        for grads in itertools.product((False, True), repeat=2):
            rows = make.normal(count, classes, dtype=dtypes[0], layout=layout).requires_grad_(grads[0])
            table = make.normal(classes, width, dtype=dtypes[1], layout=layout).requires_grad_(grads[1])
            yield tokens.soft_op, (rows, table, 0.7, True, hard, None, *_key(make, count // 2), backend), {}
    for hard, keep in itertools.product((False, True), repeat=2):
        rows, table = make.normal(6, classes), make.normal(classes, width)
        tau = torch.tensor([0.7], dtype=torch.float64) if keep else None
        options = (0.7, hard, hard, tau, *_key(make, 6), backend)
        yield tokens._soft_forward, (rows, table, *options, keep), {}
        _, state, chosen = tokens._soft_forward(rows, table, *options, True)
        wanted = (keep, hard)
        args = (rows, table, state, chosen, make.normal(6, width), *options, *wanted)
        yield tokens._soft_backward, args, {}


def _listwise(make: _Maker, backend: str) -> Iterator[Sample]:
    """With a label and without, of logits and of records, of no rows, and of dtype pairs that differ."""
    for rows, layout, dtype, other, labeled, listed in (
        (3, "sliced", torch.bfloat16, torch.float32, True, False),
        (0, "dense", torch.float32, torch.float32, True, True),
        (2, "transposed", torch.float64, torch.float16, False, False),
        (2, "every-other", torch.float16, torch.bfloat16, True, True),
    ):
        student = make.normal(rows, 5, dtype=dtype, layout=layout)
        teacher, factor = make.normal(rows, 5, dtype=other, layout=layout), make.normal(rows, dtype=torch.float64).abs()
        label = torch.arange(rows, device=student.device) - 1 if labeled else None
        given: tuple[Any, ...] = (teacher, None, None)
        if listed:
            record = topk_teacher(teacher, 2)
            given = (record.log_probs, record.ids, make.normal(rows, dtype=torch.float64).abs())
        given = (*given, label, factor, 1.5, backend)
        yield listwise.listwise_op, (student.clone().requires_grad_(), *given), {}
        yield listwise._forward_op, (student, *given, labeled), {}
