"""Cases of the op noun latent: noise on latents, and steps up a gradient inside a trust region.

Bytes: each input read once, the output written once. Some samples, the first and the last, are checked against float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.bench import rivals
from tgt_fast.bench.case import Call, Case, Check, Result, UnfitError, Work
from tgt_fast.bench.check import edge_rows, relative_error, result_bar

SIGMA: Final = 0.3
STEP, RADIUS = 0.5, 0.3  # a coordinate: lengths are these times the root of a sample's size, so that all of it shows
_CHECKED_NUMBERS: Final = 1 << 20
_SAME: Final = 0.05
OPS: Final = {"perturb": 2, "ascend": 4, "ascend with noise": 4}  # matrices read and written


@dataclass(frozen=True)
class Spec:
    """The computation of a case."""

    op: str
    samples: int
    size: int
    dtype: torch.dtype
    compiled: bool = True


_CUDA_BYTES = 256 << 20  # of latents
_CUDA_SIZES = {torch.bfloat16: (64, 4096, 65536, 1048576), torch.float32: (4096, 1048576)}  # numbers a sample
_COMPILED_SIZE = 4096


def _on_cuda(op: str, size: int, dtype: torch.dtype, quick: bool) -> Spec:
    compiled = not quick and (size, dtype) == (_COMPILED_SIZE, torch.bfloat16)
    return Spec(op, _CUDA_BYTES // dtype.itemsize // size, size, dtype, compiled)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases of this noun, for a device."""
    if device.type == "cuda":
        specs = [_on_cuda(op, size, dtype, quick) for op in OPS for dtype in _CUDA_SIZES for size in _CUDA_SIZES[dtype]]
        specs = [spec for spec in specs if not quick or spec.size == _COMPILED_SIZE]
    else:
        shapes = ((16, 1000),) if quick else ((1024, 4096), (128, 32768), (128, 10))
        specs = [Spec(op, samples, size, torch.float32) for op in OPS for samples, size in shapes]
    return [case(spec, device) for spec in specs]


def case(spec: Spec, device: torch.device) -> Case:
    matrix = spec.samples * spec.size * spec.dtype.itemsize
    return Case(
        noun="latent",
        op=spec.op,
        shape=f"{spec.samples} x {spec.size}",
        dtype=spec.dtype,
        device=device,
        bytes_moved=OPS[spec.op] * matrix,
        bytes_needed=10 * matrix + (1 << 29),
        unit_bytes=matrix,
        build=lambda: LatentWork(spec, device),
        rivals=(rivals.EAGER, rivals.COMPILE),
        numbers={"samples": spec.samples, "size": spec.size},
        compiled=spec.compiled,
    )


def our_op(op: str, z: Tensor, grad: Tensor, anchor: Tensor, backend: str) -> Tensor:
    """The work that is timed."""
    return _op(op, z, grad, anchor, backend)


def _op(op: str, z: Tensor, grad: Tensor, anchor: Tensor, backend: str, sample_ids: Tensor | None = None) -> Tensor:
    if op == "perturb":
        return tgt.perturb_latents(z, SIGMA, seed=1, sample_ids=sample_ids, backend=backend)
    length = math.sqrt(z.shape[1])
    return tgt.ascend_latents(
        z, grad, step_size=STEP * length, anchor=anchor, radius=RADIUS * length, sample_ids=sample_ids, seed=1,
        sigma=SIGMA if op == "ascend with noise" else 0.0, backend=backend,
    )  # fmt: skip


def plain_perturb(z: Tensor, grad: Tensor, anchor: Tensor) -> Tensor:
    return z + SIGMA * torch.randn_like(z)


def plain_ascend(z: Tensor, grad: Tensor, anchor: Tensor) -> Tensor:
    size = math.sqrt(z.shape[1])
    length = grad.norm(dim=1, keepdim=True)
    moved = z + STEP * size * torch.where(length > 0, grad / length, 0.0)
    away = moved - anchor
    distance = away.norm(dim=1, keepdim=True)
    pulled: Tensor = anchor + away * (RADIUS * size / distance).clamp(max=1.0)
    return pulled


def plain_noisy_ascend(z: Tensor, grad: Tensor, anchor: Tensor) -> Tensor:
    return plain_ascend(z + SIGMA * torch.randn_like(z), grad, anchor)


_PLAIN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "perturb": plain_perturb,
    "ascend": plain_ascend,
    "ascend with noise": plain_noisy_ascend,
}


class LatentWork(Work):
    """Latents, a gradient, and anchors nearby."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec = spec
        generator = torch.Generator(device).manual_seed(0)

        def normal(scale: float = 1.0) -> Tensor:
            made: Tensor = torch.empty(spec.samples, spec.size, dtype=spec.dtype, device=device)
            made.normal_(0.0, scale, generator=generator)
            return made

        self.z = normal()
        self.grad = normal() if spec.op != "perturb" else self.z
        self.anchor = normal(0.02).add_(self.z) if spec.op != "perturb" else self.z
        self.operands = (self.z, self.grad, self.anchor)
        self.result_bytes = self.z.numel() * self.z.element_size()

    def ours(self, backend: str) -> Call:
        return lambda: {"latents": our_op(self.spec.op, self.z, self.grad, self.anchor, backend)}

    def rival(self, name: str) -> Call:
        if name not in (rivals.EAGER, rivals.COMPILE):
            raise UnfitError("has no latent ops")
        plain = _PLAIN[self.spec.op]
        run = rivals.compiled(plain) if name == rivals.COMPILE else plain
        return lambda: {"latents": run(self.z, self.grad, self.anchor)}

    def check(self, result: Result) -> Check:
        truth = self._truth
        error = relative_error(result["latents"][self._rows], truth, 1e-2)
        return Check({"latents": error}, {"latents": result_bar(self.spec.dtype, truth, 1e-2)})

    def compare(self, result: Result) -> Check:
        out, spec = result["latents"][self._rows].double(), self.spec
        if spec.op == "ascend":
            return Check({"latents": relative_error(out, self._truth, 1e-2)}, {"latents": _SAME})
        # Its noise is of another generator: how far the samples move has to agree.
        start = (self.z if spec.op == "perturb" else self.anchor)[self._rows].double()
        moved, expected = (out - start).norm(), (self._truth - start).norm()
        chance = 4.0 / math.sqrt(out.numel())  # that far two draws of so many numbers may lie apart
        return Check({"distance": float(abs(moved - expected) / expected)}, {"distance": _SAME + chance})

    @functools.cached_property
    def _rows(self) -> Tensor:
        count = max(1, min(64, _CHECKED_NUMBERS // self.spec.size))
        return edge_rows(self.spec.samples, count).to(self.z.device)

    @functools.cached_property
    def _truth(self) -> Tensor:
        rows = self._rows
        z, grad, anchor = (t[rows].double() for t in (self.z, self.grad, self.anchor))
        return _op(self.spec.op, z, grad, anchor, "reference", rows)
