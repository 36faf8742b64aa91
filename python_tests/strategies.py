"""Every hypothesis strategy of the tests: shapes, strides, dtypes, flags, and whole calls made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tgt_fast.kernels.options import DIVERGENCES, RADIUS_NORMS, REDUCTIONS, STEP_NORMS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

dtypes = st.sampled_from(DTYPES)
divergences = st.sampled_from(DIVERGENCES)
reductions = st.sampled_from(REDUCTIONS)
temperatures = st.one_of(st.just(1.0), st.floats(0.05, 100.0))
gradients_wanted = st.tuples(st.booleans(), st.booleans())
seeds = st.integers(0, 2**31)
batch_shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)
class_counts = st.one_of(st.integers(1, 40), st.sampled_from((64, 257)))
# How a tensor lies in memory: dense; rows of a wider buffer; every other element; dimensions swapped.
layouts = st.sampled_from(("dense", "row-strided", "column-strided", "transposed"))


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values, in memory as ``layout`` says. Between them lies NaN, so that reading it shows."""
    if values.dim() == 0 or layout == "dense":
        return values.contiguous()
    width = values.shape[-1]
    if layout == "row-strided":
        buffer = values.new_full((*values.shape[:-1], width + 3), math.nan)
        view = buffer[..., 1 : width + 1]
    elif layout == "column-strided":
        buffer = values.new_full((*values.shape[:-1], 2 * width), math.nan)
        view = buffer[..., ::2]
    else:
        view = values.new_empty(values.shape[::-1]).permute(*reversed(range(values.dim())))
    view.copy_(values)
    return view


def random_values(shape: tuple[int, ...], seed: int, scale: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


@dataclass
class DistillCase:
    """A call of the distillation loss. Tensors are left out of the repr: the seeds reproduce them."""

    student: Tensor = field(repr=False)
    teacher: Tensor = field(repr=False)
    target: Tensor | None = field(repr=False)
    needs: tuple[bool, bool]
    options: dict[str, Any]
    description: str

    @property
    def hard(self) -> bool:
        return self.target is not None


@st.composite
def distill_cases(draw: st.DrawFn, *, masks: bool = True) -> DistillCase:
    """Any legal call on logits of ordinary size; with ``masks`` some logits are -inf."""
    shape = (*draw(batch_shapes), draw(class_counts))
    divergence, hard = draw(divergences), draw(st.booleans())
    if divergence != "mse" or hard:  # of one class, every distribution is the same: refused
        shape = (*shape[:-1], max(shape[-1], 2))
    rows, seed = shape[:-1], draw(seeds)
    pair = (draw(dtypes), draw(dtypes))
    placement = (draw(layouts), draw(layouts))
    scale = draw(st.sampled_from((0.1, 1.0, 5.0)))
    logits = [random_values(shape, seed + side, scale, pair[side]) for side in (0, 1)]
    generator = torch.Generator().manual_seed(seed + 2)
    masked = masks and draw(st.booleans())
    if masked:
        both = torch.rand(shape, generator=generator) < 0.2
        alone = [torch.rand(shape, generator=generator) < 0.02 for _ in logits]
        logits = [x.masked_fill(both | one, -math.inf) for x, one in zip(logits, alone, strict=True)]
    options: dict[str, Any] = {
        "divergence": divergence,
        "beta": draw(st.floats(0.05, 0.95)),
        "temperature": draw(temperatures),
        "teacher_temperature": draw(st.one_of(st.none(), temperatures)),
        "reduction": draw(reductions),
    }
    target = None
    if hard:
        target = torch.randint(-1, shape[-1], rows, generator=generator)
        target = target.masked_fill(torch.rand(rows, generator=generator) < 0.2, -100)
        options["hard_weight"] = draw(st.floats(0.1, 2.0))
        options["soft_weight"] = draw(st.sampled_from((0.0, 0.5, 1.0)))
        options["label_smoothing"] = draw(st.sampled_from((0.0, 0.1, 1.0)))
    if draw(st.booleans()):
        weight = torch.rand(rows, generator=generator)
        options["sample_weight"] = weight.masked_fill(weight < 0.2, 0.0)
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from((0.0, 1.0, 7.5)))
    description = f"{shape} seed {seed} x {scale}, {pair}, {placement}" + (", masked" if masked else "")
    student, teacher = (lay_out(x, how) for x, how in zip(logits, placement, strict=True))
    return DistillCase(student, teacher, target, draw(gradients_wanted), options, description)


@dataclass
class AscendCase:
    """A call of ``ascend_latents`` with a trust region."""

    z: Tensor = field(repr=False)
    grad: Tensor = field(repr=False)
    options: dict[str, Any] = field(repr=False)
    radius: float
    radius_norm: str
    description: str


@st.composite
def ascend_cases(draw: st.DrawFn) -> AscendCase:
    """Latents, a gradient (some samples' 0 or not finite), an anchor and a radius."""
    shape = (draw(st.integers(0, 4)), *draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    seed, dtype = draw(seeds), draw(dtypes)
    z = lay_out(random_values(shape, seed, 1.0, dtype), draw(layouts))
    grad = random_values(shape, seed + 1, draw(st.sampled_from((1e-3, 1.0, 100.0))), dtype)
    for sample in range(shape[0]):
        grad[sample] *= draw(st.sampled_from((1.0, 1.0, 1.0, 0.0, math.nan, math.inf)))
    radius, radius_norm = draw(st.floats(0.01, 5.0)), draw(st.sampled_from(RADIUS_NORMS))
    options: dict[str, Any] = {
        "step_size": draw(st.floats(0.0, 10.0)),
        "anchor": lay_out(random_values(shape, seed + 2, 1.0, dtype), draw(layouts)),
        "radius": radius,
        "norm": draw(st.sampled_from(STEP_NORMS)),
        "radius_norm": radius_norm,
        "sigma": draw(st.sampled_from((0.0, 0.5))),
        "seed": seed,
    }
    if draw(st.booleans()):
        options["scale"] = random_values(shape[1:], seed + 3, 1.0, torch.float32).abs() + 0.1
    description = f"{shape} {dtype} " + ", ".join(
        f"{name}={value}" for name, value in options.items() if not isinstance(value, Tensor)
    )
    return AscendCase(z, grad, options, radius, radius_norm, description)
