"""Small calls that together reach every kernel of a backend, by name: for tools that look at each of its accesses, and
for the first look at a new device, where one that hangs should be known by its name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from cuda_calls import PLANS, Plan, planned
from numerics import logits, targets
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.kernels.options import DIVERGENCES, DistillOptions

Call = Callable[[torch.device], list[Tensor]]  # what it computed, without a NaN if all went well


def every_kernel_once(device: torch.device) -> list[Tensor]:
    """All results of the native calls."""
    return [result for call in native_calls().values() for result in call(device)]


def calls() -> dict[str, Call]:
    """Those of both compiled backends."""
    return native_calls() | triton_calls()


def native_calls() -> dict[str, Call]:
    """The core's CUDA kernels, with every way to lay a row on the chip."""
    made: dict[str, Call] = {}
    for name, plan in PLANS.items():
        for inplace in (False, True):
            made[f"native distill: {name}" + (", in place" if inplace else "")] = functools.partial(
                _planned, plan=plan, inplace=inplace
            )
    made["native distill: gradients in backward"] = functools.partial(
        _weighted, dtypes=(torch.float16, torch.float64), backend="native"
    )
    for inplace in (False, True):
        made["native adjusted" + (", in place" if inplace else "")] = functools.partial(
            _adjusted, inplace=inplace, backend="native"
        )
    # a warp, a block, clusters of 2 and of 4 a sample
    for size in (5, 2000, 20_000, 40_000):
        made[f"native latent: {size}"] = functools.partial(_latents, size=size, backend="native")
    # rows on the chip, of one block and of clusters, and rows that are streamed
    for dtype, size in ((torch.float32, 603), (torch.bfloat16, 150_000), (torch.float64, 603)):
        made[f"native topk: {size} {dtype}"] = functools.partial(_topk, dtype=dtype, size=size)
    for dtype in (torch.bfloat16, torch.float64):  # in float and in double; the second draws among equal logits
        made[f"native tokens: {dtype}"] = functools.partial(_tokens, dtype=dtype)
    return made


def triton_calls() -> dict[str, Call]:
    """Triton's kernels: rows in registers, several and one a program, and streamed rows."""
    made: dict[str, Call] = {}
    for inplace in (False, True):  # of the same kernels: the first compiles them, which takes seconds
        for classes in (10, 1000, 4096, 33_001):
            for divergence in DIVERGENCES:
                made[f"triton distill: {divergence}, {classes}" + (", in place" if inplace else "")] = (
                    functools.partial(_divergence, divergence=divergence, classes=classes, inplace=inplace)
                )
    made["triton distill: gradients in backward"] = functools.partial(
        _weighted, dtypes=(torch.float16, torch.float64), backend="triton"
    )
    made["triton distill: a factor a row"] = _factors
    for inplace in (False, True):
        made["triton adjusted" + (", in place" if inplace else "")] = functools.partial(
            _adjusted, inplace=inplace, backend="triton"
        )
    for size in (7, 4096, 20_001):  # within a tile, and in phases
        made[f"triton latent: {size}"] = functools.partial(_latents, size=size, backend="triton")
    for hard in (False, True):
        for dtype in (torch.bfloat16, torch.float32):
            made[f"triton soft embedding: {'hard' if hard else 'soft'}, {dtype}"] = functools.partial(
                _soft, dtype=dtype, hard=hard
            )
    return made


def _planned(device: torch.device, *, plan: Plan, inplace: bool) -> list[Tensor]:
    out: list[Tensor | None] = []
    for dtype, other in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)):
        # rows start at multiples of 16 bytes, as bulk copies want them, and end in part of a vector
        student, teacher = (
            logits(3, 608, seed, dtype=each).to(device)[:, :603] for seed, each in enumerate((dtype, other))
        )
        target = targets(3, 603, 2).to(device)
        student[1, 5] = teacher[1, 5] = -math.inf
        student[2, 9] = teacher[2, 11] = 30.0  # peaks
        # An emulated cluster takes seconds, and is the same for every divergence.
        few = device.type == "cpu" and plan[1] > 1
        for divergence in ("forward_kl", "jsd") if few else DIVERGENCES:
            options = DistillOptions(divergence=divergence, hard_weight=1.0, label_smoothing=0.1)
            made = planned(
                student.clone() if inplace else student, teacher, target, None, None, options,
                wanted=(True, True), inplace=inplace, want_stats=not inplace, plan=plan,
            )  # fmt: skip
            out += [made.loss, made.d_student, made.d_teacher, made.stats]
    return [result for result in out if result is not None]


def _divergence(device: torch.device, *, divergence: str, classes: int, inplace: bool) -> list[Tensor]:
    out: list[Tensor] = []
    options: dict[str, Any] = {"divergence": divergence, "hard_weight": 1.0, "label_smoothing": 0.1}
    for dtype in (torch.bfloat16, torch.float32):
        leaf, teacher = (logits(3, classes, seed, dtype=dtype).to(device).requires_grad_() for seed in (0, 1))
        loss, stats = tgt.distillation_loss(
            leaf * 1, teacher, targets(3, classes, 2).to(device), inplace=inplace, return_stats=True, backend="triton",
            **options,
        )  # fmt: skip
        out += [loss.detach(), *torch.autograd.grad(loss, (leaf, teacher)), *stats]
    return out


def _weighted(device: torch.device, *, dtypes: tuple[torch.dtype, ...], backend: str) -> list[Tensor]:
    """Those of float16 are made there; those of float64 are scaled there."""
    out: list[Tensor] = []
    for dtype in dtypes:
        leaf = logits(3, 603, 0, dtype=dtype)
        leaf[2, 9] = 30.0  # a peak
        leaf = leaf.to(device).requires_grad_()
        weight = torch.tensor([1.0, 0.0, 2.0], device=device)
        for inplace in (False, True):
            loss = tgt.distillation_loss(
                leaf * 1, logits(3, 603, 1).to(device), sample_weight=weight, inplace=inplace, backend=backend
            )
            out += [loss.detach(), *torch.autograd.grad(3 * loss, leaf)]
    return out


def _adjusted(device: torch.device, *, inplace: bool, backend: str) -> list[Tensor]:
    """Every divergence, and of each kind of adjustment one; statistics; in place also gradients made in backward."""
    out: list[Tensor] = []
    forms: list[dict[str, Any]] = [{"divergence": divergence} for divergence in DIVERGENCES]
    forms += [{"decoupled": (1.0, 2.0)}, {"correct_teacher": 0.2}, {"skew": 0.1}, {"soft_weight": 0.0}]
    bias, margin, target = logits(603, 1, 5)[:, 0].to(device), logits(603, 1, 6)[:, 0].to(device), targets(3, 603, 2)
    for standardize in (False, True):
        for dtype in (torch.float32, torch.float16, torch.float64):
            for form in forms if dtype == torch.float32 else forms[:1]:
                leaf = logits(3, 603, 0, dtype=dtype)
                leaf[2, 9] = 30.0  # a peak
                leaf, teacher = (x.to(device).requires_grad_() for x in (leaf, logits(3, 603, 1)))
                given: Any = leaf * 1
                loss, stats = tgt.distillation_loss(
                    given, teacher, target.to(device), student_bias=bias, label_margin=margin, hard_weight=1.0,
                    standardize=standardize, inplace=inplace, return_stats=True, backend=backend, **form,
                )  # fmt: skip
                out += [loss.detach(), *torch.autograd.grad(2 * loss, (leaf, teacher)), *stats]
    return out


def _factors(device: torch.device) -> list[Tensor]:
    leaf = logits(3, 603, 0).to(device).requires_grad_()
    loss = tgt.distillation_loss(leaf, logits(3, 603, 1).to(device), reduction="none", backend="triton")
    return [loss.detach(), *torch.autograd.grad(loss, leaf, torch.arange(3.0, device=device))]


def _latents(device: torch.device, *, size: int, backend: str) -> list[Tensor]:
    z = torch.zeros(2, size, device=device)
    moved = tgt.perturb_latents(z, 1.0, seed=3, backend=backend)
    ball = tgt.perturb_latents(z, 1.0, seed=3, sphere_radius=2.0, truncation=1.5, backend=backend)
    out = [moved, ball]
    for norm, radius_norm in (("l2", "l2"), ("linf", "linf")):
        out.append(
            tgt.ascend_latents(
                z, moved, step_size=1.0, norm=norm, sigma=0.1, anchor=z, radius=0.5, radius_norm=radius_norm, seed=3,
                backend=backend,
            )
        )  # fmt: skip
    return out


def _topk(device: torch.device, *, dtype: torch.dtype, size: int) -> list[Tensor]:
    out: list[Tensor] = []
    leaf = logits(2, size, 0, dtype=dtype).to(device).requires_grad_()
    teacher = logits(2, size, 1, dtype=dtype).to(device)
    target = targets(2, size, 2).to(device)
    for tail in ("bucket", "renormalize", "uniform"):
        record = tgt.topk_teacher(teacher, 7, 2.0, tail=tail)
        for inplace in (False, True):
            loss = tgt.distillation_loss(
                leaf * 1, record, target, temperature=2.0, hard_weight=0.5, inplace=inplace, backend="native"
            )
            out += [loss.detach(), *torch.autograd.grad(3 * loss, leaf)]
    return out


def _tokens(device: torch.device, *, dtype: torch.dtype) -> list[Tensor]:
    x = logits(3, 4099, 0, dtype=dtype).to(device).round(decimals=1 if dtype == torch.float64 else 3)
    kinds: tuple[dict[str, Any], ...] = ({}, {"top_k": 50, "top_p": 0.95, "min_p": 0.01}, {"temperature": 0})
    return [tgt.sample_tokens(x, **kept, seed=3, backend="native") for kept in kinds]


def _soft(device: torch.device, *, dtype: torch.dtype, hard: bool) -> list[Tensor]:
    out: list[Tensor] = []
    x = logits(5, 1100, 0, dtype=dtype).to(device).requires_grad_()
    table = logits(1100, 96, 1, dtype=dtype).to(device).requires_grad_()
    for gumbel in (False, True):
        made = tgt.soft_embedding(x, table, gumbel=gumbel, hard=hard, seed=3, backend="triton")
        out += [made.detach(), *torch.autograd.grad(made.float().sum(), (x, table))]
    return out
