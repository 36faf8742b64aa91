"""Cases of the op noun tokens: drawing from rows of logits, and soft embeddings, forward and backward.

Bytes: the logits read once and a token a row written; of a soft embedding the logits and the table read once in
forward and once in backward, and the gradient to the logits written.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.bench import rivals
from tgt_fast.bench.case import Call, Case, Check, Result, UnfitError, Work
from tgt_fast.bench.check import edge_rows, relative_error, result_bar

TOP_K, TOP_P = 50, 0.95
_CHECKED_ROWS: Final = 32
_FLOOR: Final = 1e-2


@dataclass(frozen=True)
class Spec:
    """The computation of a case. ``width``: of the embeddings; 0 to draw tokens."""

    rows: int
    classes: int
    width: int
    dtype: torch.dtype
    options: str  # of what follows
    peak: bool = False

    @property
    def gumbel(self) -> bool:
        return "gumbel" in self.options

    @property
    def filters(self) -> dict[str, Any]:
        words = self.options.split(", ")
        return ({"top_k": TOP_K} if "top-k" in words else {}) | ({"top_p": TOP_P} if "top-p" in words else {})


_CPU_FULL = (
    Spec(256, 32000, 0, torch.float32, "top-k, top-p"),
    Spec(256, 32000, 0, torch.float32, "top-p"),
    Spec(256, 32000, 0, torch.float32, "all"),
    Spec(512, 30522, 384, torch.float32, "gumbel", peak=True),
    Spec(512, 30522, 384, torch.float32, "plain"),
    Spec(64, 2000, 64, torch.float32, "gumbel"),  # small: with it memory's peak is primed
)
_CPU_QUICK = (Spec(16, 4000, 0, torch.float32, "top-k, top-p"), Spec(16, 1000, 16, torch.float32, "gumbel"))
_CUDA_FULL = (
    Spec(256, 32000, 0, torch.float32, "top-k, top-p"),
    Spec(1024, 128256, 0, torch.float32, "top-k, top-p"),
    Spec(1024, 128256, 0, torch.bfloat16, "top-p"),
    Spec(8192, 30522, 384, torch.bfloat16, "gumbel", peak=True),
    Spec(8192, 30522, 384, torch.float32, "gumbel"),
    Spec(8192, 50265, 1024, torch.bfloat16, "gumbel"),
)
_CUDA_QUICK = (_CUDA_FULL[0], _CUDA_FULL[3])


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases of this noun, for a device."""
    on_cuda, on_cpu = (_CUDA_QUICK, _CPU_QUICK) if quick else (_CUDA_FULL, _CPU_FULL)
    return [case(spec, device) for spec in (on_cuda if device.type == "cuda" else on_cpu)]


def case(spec: Spec, device: torch.device) -> Case:
    size = spec.dtype.itemsize
    matrix, table = spec.rows * spec.classes * size, spec.classes * spec.width * size
    if spec.width:
        work: type[_Work] = SoftWork
        moved = 3 * matrix + 2 * (table + spec.rows * spec.width * size)
    else:
        work, moved = SampleWork, matrix + 8 * spec.rows
    return Case(
        noun="tokens",
        op=f"soft embedding, {spec.options}" if spec.width else f"sample, {spec.options}",
        shape=f"{spec.rows} x {spec.classes}" + (f" x {spec.width}" if spec.width else ""),
        dtype=spec.dtype,
        device=device,
        bytes_moved=moved,
        bytes_needed=12 * matrix + 4 * table + (1 << 29),
        unit_bytes=matrix,
        build=lambda: work(spec, device),
        rivals=(rivals.EAGER,),  # sorting and drawing leave torch.compile nothing to fuse
        numbers={"rows": spec.rows, "classes": spec.classes, "width": spec.width},
        kernels="soft_embedding" if spec.width else "",
        peak=spec.peak,
    )


class _Work(Work):
    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec = spec
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape, dtype=spec.dtype, device=device).normal_(0.0, scale, generator=generator)

        self.logits = normal(spec.rows, spec.classes, scale=2.0)
        self.table = normal(spec.classes, spec.width)
        self.upstream = normal(spec.rows, spec.width)
        self.operands = (self.logits, self.table) if spec.width else (self.logits,)
        self.rows = edge_rows(spec.rows, _CHECKED_ROWS).to(device)


def plain_sample(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """The usual code of users: sort, cut, draw."""
    if top_k is None and top_p is None:
        return torch.multinomial(torch.softmax(logits, -1), 1)[:, 0]
    ordered, ids = logits.sort(dim=-1, descending=True)
    if top_k is not None:
        ordered[:, top_k:] = -math.inf
    probabilities = torch.softmax(ordered, -1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return ids.gather(-1, torch.multinomial(probabilities, 1))[:, 0]


class SampleWork(_Work):
    """Rows of logits."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        super().__init__(spec, device)
        self.result_bytes = 8 * spec.rows

    def ours(self, backend: str) -> Call:
        return lambda: {"tokens": tgt.sample_tokens(self.logits, seed=1, **self.spec.filters, backend=backend)}

    def rival(self, name: str) -> Call:
        if name != rivals.EAGER:
            raise UnfitError("draws no tokens")
        return lambda: {"tokens": plain_sample(self.logits, **self.spec.filters)}

    def check(self, result: Result) -> Check:
        truth = tgt.sample_tokens(
            self.logits[self.rows], seed=1, sample_ids=self.rows, **self.spec.filters, backend="reference"
        )
        return Check({"tokens": float((result["tokens"][self.rows] != truth).sum())}, {"tokens": 0.0})

    def compare(self, result: Result) -> Check:
        """Its numbers are another generator's: its tokens have to be among the kept."""
        logits, tokens = self.logits[self.rows].double(), result["tokens"][self.rows, None]
        taken = logits.gather(-1, tokens)
        larger = logits.masked_fill(logits <= taken, -math.inf)
        outside = ((logits > taken).sum(-1, keepdim=True) >= self.spec.filters.get("top_k", math.inf)).sum()
        if "top_p" in self.spec.filters and "top_k" not in self.spec.filters:
            share = (larger.logsumexp(-1) - logits.logsumexp(-1)).exp()
            outside += (share >= TOP_P + 1e-5).sum()
        return Check({"tokens outside": float(outside)}, {"tokens outside": 0.0})


class SoftWork(_Work):
    """Logits, a table of embeddings, and the gradient that comes from above."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        super().__init__(spec, device)
        self.logits.requires_grad_()
        self.result_bytes = self.logits.numel() * self.logits.element_size()

    def _differentiate(self, out: Tensor) -> Result:
        (grad,) = torch.autograd.grad(out, self.logits, self.upstream)
        return {"embedding": out.detach(), "d_logits": grad}

    def ours(self, backend: str) -> Call:
        return lambda: self._differentiate(
            tgt.soft_embedding(self.logits, self.table, gumbel=self.spec.gumbel, seed=1, backend=backend)
        )

    def rival(self, name: str) -> Call:
        if name != rivals.EAGER:
            raise UnfitError("has no soft embedding")
        weigh = F.gumbel_softmax if self.spec.gumbel else torch.softmax
        return lambda: self._differentiate(weigh(self.logits, dim=-1) @ self.table)

    def check(self, result: Result) -> Check:
        errors, bars = {}, {}
        for name, truth in self._truth.items():
            floor = _FLOOR * math.sqrt(truth.shape[0])
            made = result[name][self.rows]
            errors[name] = relative_error(made, truth, floor)
            bars[name] = result_bar(self.spec.dtype, truth, floor, float(self.logits.detach().abs().amax()))
        return Check(errors, bars)

    def compare(self, result: Result) -> Check:
        truth = self._truth
        if not self.spec.gumbel:
            return Check({n: relative_error(result[n][self.rows], truth[n], _FLOOR) for n in truth},
                         dict.fromkeys(truth, 0.05))  # fmt: skip
        # Its noise is another generator's: how long embeddings and gradients are has to agree, within a chance.
        errors = {n: float(abs(result[n][self.rows].double().norm() / truth[n].norm() - 1)) for n in truth}
        return Check(errors, dict.fromkeys(truth, 0.5))

    @functools.cached_property
    def _truth(self) -> dict[str, Tensor]:
        leaf = self.logits.detach()[self.rows].double().requires_grad_()
        with torch.enable_grad():
            out = tgt.soft_embedding(
                leaf, self.table.double(), gumbel=self.spec.gumbel, seed=1, sample_ids=self.rows, backend="reference"
            )
            (grad,) = torch.autograd.grad(out, leaf, self.upstream[self.rows].double())
        return {"embedding": out.detach(), "d_logits": grad}
