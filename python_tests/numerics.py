"""The comparison of a result with the float64 truth: the error measure, its floors and its bars.

``test_numerics.py`` shows that every assertion here fails for zeros, for a 5 % scale and for a swapped row.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.kernels.options import DistillOptions, DistillStats
from tgt_fast.kernels.reference import distillation_loss as reference_loss

FLOAT64_BAR = 1e-9
FLOAT32_BAR = 1e-5
HALF_FACTOR = 1.5  # a bf16 or fp16 gradient may err so many times as much as the rounded truth does
ELEMENT_FACTOR = 10.0  # and a single element so many times as much, relative to its row, as the whole may

# The public function, for callers who know whether they asked for one value or for a pair.
distillation_loss: Callable[..., Any] = tgt.distillation_loss


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch on ``count`` threads. The truth takes one: on a busy machine small parallel loops only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Result:
    """A loss and the gradients that were asked for."""

    loss: Tensor
    d_student: Tensor | None
    d_teacher: Tensor | None
    stats: DistillStats | None = None


def evaluate(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    backend: str,
    needs: tuple[bool, bool] = (True, True),
    upstream: Tensor | None = None,
    **options: Any,
) -> Result:
    """The public loss and its gradients; without ``upstream`` those of ``loss.sum()``."""
    student = student.detach().requires_grad_(needs[0])
    teacher = teacher.detach().requires_grad_(needs[1])
    with threads(1) if backend == "reference" else contextlib.nullcontext():
        out = distillation_loss(student, teacher, target, backend=backend, **options)
        loss, stats = out if isinstance(out, tuple) else (out, None)
        return _differentiate(loss, student, teacher, upstream, stats)


@threads(1)
def truth(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    needs: tuple[bool, bool] = (True, True),
    upstream: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> Result:
    """The same in float64, from the reference itself, on the same (already rounded) inputs."""
    shape = student.shape
    if options.get("teacher_temperature") is None:
        options["teacher_temperature"] = options.get("temperature", 1.0)
    student = student.detach().double().requires_grad_(needs[0])
    teacher = teacher.detach().double().requires_grad_(needs[1])
    loss, stats = reference_loss(
        student.reshape(-1, shape[-1]),
        teacher.reshape(-1, shape[-1]),
        None if target is None else target.reshape(-1),
        None if sample_weight is None else sample_weight.reshape(-1),
        normalizer,
        DistillOptions(**options),
        want_stats=True,
    )
    if options.get("reduction") == "none":
        loss = loss.reshape(shape[:-1])
    return _differentiate(loss, student, teacher, upstream, stats)


def _differentiate(
    loss: Tensor, student: Tensor, teacher: Tensor, upstream: Tensor | None, stats: DistillStats | None
) -> Result:
    wanted = [x for x in (student, teacher) if x.requires_grad]
    if not wanted:
        return Result(loss, None, None, stats)
    if upstream is None:
        upstream = torch.ones_like(loss)
    grads = iter(torch.autograd.grad(loss, wanted, upstream.to(loss.dtype)))
    d_student = next(grads) if student.requires_grad else None
    d_teacher = next(grads) if teacher.requires_grad else None
    return Result(loss.detach(), d_student, d_teacher, stats)


@dataclass(frozen=True)
class Floors:
    """Below these a row's loss, or the norm of a row's gradient, counts as small: errors are measured against them."""

    loss: float
    d_student: float
    d_teacher: float


def floors(divergence: str, temperature: float, teacher_temperature: float, hard: bool) -> Floors:
    """1e-2 of the natural size of a row, for an upstream gradient of 1.

    With one temperature T the soft term is of size T^2 and its gradients of size T; with two, the teacher's is of size
    Ts^2 / Tt. mse has no factor Ts^2. A hard term is of size 1.
    """
    squared = 1.0 if divergence == "mse" else temperature**2
    least = 1.0 if hard else 0.0
    return Floors(
        loss=1e-2 * max(squared, least),
        d_student=1e-2 * max(squared / temperature, least),
        d_teacher=1e-2 * squared / teacher_temperature,
    )


def relative_error(out: Tensor, reference: Tensor, floor: float) -> float:
    """||out - reference|| / max(||reference||, floor), in float64."""
    if out.shape != reference.shape:
        raise AssertionError(f"shape {tuple(out.shape)} instead of {tuple(reference.shape)}")
    expected = reference.double()
    return float((out.double() - expected).norm() / max(float(expected.norm()), floor))


def largest_element_error(out: Tensor, reference: Tensor, floor: float) -> float:
    """max over elements of |out - reference| / max(||reference's row||, floor); ``floor`` is a row's."""
    if out.numel() == 0:
        return 0.0
    expected = reference.double()
    scale = expected.norm(dim=-1, keepdim=True).clamp_min(floor) if expected.dim() else expected.abs() + floor
    return float(((out.double() - expected).abs() / scale).max())


def magnitude(*scaled_logits: Tensor) -> float:
    """max |logit / T| over what is finite: exp magnifies the rounding of an argument of this size."""
    largest = 0.0
    for logits in scaled_logits:
        finite = logits.detach()[logits.isfinite()].double().abs()
        largest = max(largest, float(finite.max()) if finite.numel() else 0.0)
    return largest


def arithmetic_bar(result_dtype: torch.dtype, largest: float) -> float:
    """The bar of a result that was computed in float32 or float64."""
    if result_dtype == torch.float64:
        return FLOAT64_BAR
    return FLOAT32_BAR * max(1.0, largest / 10.0)


def assert_close(name: str, out: Tensor, reference: Tensor, *, bar: float, floor: float) -> None:
    """``out`` has the reference's NaN and infinities at their places, and errs within ``bar`` elsewhere.

    ``floor`` is that of the whole tensor; single elements are held to ``ELEMENT_FACTOR`` times the bar,
    relative to the norm of their own row, so that large rows cannot hide a wrong small one.
    """
    if out.shape != reference.shape:
        raise AssertionError(f"{name}: shape {tuple(out.shape)} instead of {tuple(reference.shape)}")
    if not torch.equal(out.isnan(), reference.isnan()):
        raise AssertionError(f"{name}: NaN at other places than in the reference")
    infinite = reference.isinf()
    if not torch.equal(out.isinf(), infinite) or not torch.equal(out[infinite].sign(), reference[infinite].sign()):
        raise AssertionError(f"{name}: infinities at other places than in the reference")
    usable = reference.isfinite()
    out, reference = torch.where(usable, out, 0.0), torch.where(usable, reference, 0.0)
    error = relative_error(out, reference, floor)
    if not error <= bar:
        raise AssertionError(f"{name}: relative error {error:.3g} exceeds {bar:.3g}")
    if out.dim() >= 2:
        rows = max(1, math.prod(out.shape[:-1]))
        error = largest_element_error(out, reference, floor / math.sqrt(rows))
        if not error <= ELEMENT_FACTOR * bar:
            raise AssertionError(f"{name}: an element errs by {error:.3g} of its row, over {ELEMENT_FACTOR * bar:.3g}")


def gradient_bar(dtype: torch.dtype, loss_dtype: torch.dtype, largest: float, reference: Tensor, floor: float) -> float:
    """The bar of a gradient of ``dtype``: its arithmetic's, or 1.5 times what rounding the truth costs."""
    bar = arithmetic_bar(loss_dtype, largest)
    if dtype == loss_dtype:
        return bar
    usable = torch.where(reference.isfinite(), reference, 0.0)
    return max(bar, HALF_FACTOR * relative_error(usable.to(dtype), usable, floor))


def assert_matches_truth(
    result: Result,
    expected: Result,
    student: Tensor,
    teacher: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    hard: bool = False,
    per_row: float = 1.0,
) -> None:
    """Loss and gradients within the bars of their dtypes.

    ``hard``: there is a hard term, which sees the student at temperature 1.
    ``per_row``: the upstream gradient that a row sees.
    """
    teacher_temperature = teacher_temperature or temperature
    scaled = [student / temperature, teacher / teacher_temperature]
    largest = magnitude(*scaled, *([student] if hard else []))
    small = floors(divergence, temperature, teacher_temperature, hard)
    is_fp64 = torch.float64 in (student.dtype, teacher.dtype)
    loss_dtype = torch.float64 if is_fp64 else torch.float32
    if result.loss.dtype != loss_dtype:
        raise AssertionError(f"loss of {result.loss.dtype} instead of {loss_dtype}")
    # The rows' errors are independent: in a vector of row losses and in their sum alike they add up to sqrt(rows).
    whole = per_row * math.sqrt(max(1, math.prod(student.shape[:-1])))
    floor = small.loss * whole
    assert_close("loss", result.loss, expected.loss, bar=arithmetic_bar(loss_dtype, largest), floor=floor)

    for name, grad, reference, logits, a_row in (
        ("d_student", result.d_student, expected.d_student, student, small.d_student),
        ("d_teacher", result.d_teacher, expected.d_teacher, teacher, small.d_teacher),
    ):
        floor = a_row * whole
        if grad is None or reference is None:
            if grad is not reference:
                raise AssertionError(f"{name}: present on one side only")
            continue
        if grad.dtype != logits.dtype:
            raise AssertionError(f"{name}: {grad.dtype} for logits of {logits.dtype}")
        rounded = reference.to(logits.dtype).to(reference.dtype)
        reference = torch.where(rounded.isinf(), rounded, reference)  # beyond what half precision holds
        bar = gradient_bar(logits.dtype, loss_dtype, largest, reference, floor)
        assert_close(name, grad, reference, bar=bar, floor=floor)


def check(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    backend: str,
    needs: tuple[bool, bool] = (True, True),
    upstream: Tensor | None = None,
    per_row: float = 1.0,
    **options: Any,
) -> Result:
    """Evaluate on a backend and hold loss and gradients against the truth."""
    result = evaluate(student, teacher, target, backend=backend, needs=needs, upstream=upstream, **options)
    expected = truth(student, teacher, target, needs=needs, upstream=upstream, **options)
    assert_matches_truth(
        result,
        expected,
        student,
        teacher,
        divergence=options.get("divergence", "forward_kl"),
        temperature=options.get("temperature", 1.0),
        teacher_temperature=options.get("teacher_temperature"),
        hard=target is not None,
        per_row=per_row,
    )
    return result


def logits(rows: int | tuple[int, ...], classes: int, seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random logits; every second row is peaked, since flat rows alone hide errors of large probabilities."""
    shape = (rows,) if isinstance(rows, int) else rows
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, classes, generator=generator, dtype=torch.float64).reshape(-1, classes)
    values[1::2] *= 4.0
    return values.reshape(*shape, classes).to(dtype)


def targets(rows: int, classes: int, seed: int) -> Tensor:
    """Random class indices.  -> [rows] int64"""
    return torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))
