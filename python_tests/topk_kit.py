"""Calls of the loss against a top-k record, for its tests: the float64 truth, and the comparison of the two."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from numerics import arithmetic_bar, assert_close, floors, gradient_bar, logits, magnitude, targets
from strategies import DTYPES
from torch import Tensor

import tgt_fast as tgt
from tgt_fast import TeacherTopK
from tgt_fast.kernels.options import TAILS, TOPK_DIVERGENCES

INF = math.inf
divergences = pytest.mark.parametrize("divergence", TOPK_DIVERGENCES)
tails = pytest.mark.parametrize("tail", TAILS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def loss_and_gradient(
    student: Tensor, topk: TeacherTopK, target: Tensor | None = None, *, upstream: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    student = student.detach().requires_grad_()
    options.setdefault("temperature", topk.temperature)
    loss = tgt.distillation_loss(student, topk, target, **options)
    assert isinstance(loss, Tensor)
    grad = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, student, grad)[0]


def in_double(topk: TeacherTopK) -> TeacherTopK:
    tail = topk.tail_log_prob
    return dataclasses.replace(
        topk, log_probs=topk.log_probs.double(), tail_log_prob=None if tail is None else tail.double()
    )


def check(
    student: Tensor, topk: TeacherTopK, target: Tensor | None = None, *, per_row: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient within the bars of their dtypes of the float64 truth."""
    out = loss_and_gradient(student, topk, target, **options)
    truth = loss_and_gradient(
        student.double(), in_double(topk), target, **{**options, "backend": "reference"}
    )  # fmt: skip
    assert_near(out, truth, student, topk, hard=target is not None, divergence=options["divergence"], per_row=per_row)
    return out


def assert_near(
    out: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], student: Tensor, topk: TeacherTopK, *, hard: bool,
    divergence: str, per_row: float = 1.0,
) -> None:  # fmt: skip
    t = topk.temperature
    small = floors(divergence, t, t, hard)
    whole = per_row * math.sqrt(max(1, student.shape[:-1].numel()))
    is_fp64 = torch.float64 in (student.dtype, topk.log_probs.dtype)
    result = torch.float64 if is_fp64 else torch.float32
    largest = magnitude(student / t, topk.log_probs, *([student] if hard else []))
    assert out[0].dtype == result
    assert out[1].dtype == student.dtype
    assert_close("loss", out[0], truth[0], bar=arithmetic_bar(result, largest), floor=small.loss * whole)
    floor = small.d_student * whole
    bar = gradient_bar(student.dtype, result, largest, truth[1], floor)
    assert_close("d_student", out[1], truth[1], bar=bar, floor=floor)


def peaked(rows: int, classes: int, margin: float, seed: int) -> Tensor:
    """Rows whose largest class has all but exp(-margin) of the mass, or so."""
    values = logits(rows, classes, seed)
    values[torch.arange(rows), targets(rows, classes, seed)] += margin
    return values
