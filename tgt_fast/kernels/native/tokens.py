"""Tokens and soft embeddings in the compiled core: csrc/cpu/tokens.cpp, and csrc/cuda/tokens.cu for CUDA tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from tgt_fast._forks import threads
from tgt_fast.kernels.latent_calls import accumulate_dtype
from tgt_fast.kernels.memory import workspace
from tgt_fast.kernels.native import core
from tgt_fast.kernels.native.abi import matrix, packer, pointer
from tgt_fast.kernels.native.latent import noise, run
from tgt_fast.kernels.options import OP_GUMBEL, OP_TOKENS, SampleOptions, SoftOptions, SoftState
from tgt_fast.kernels.tokens_table import given_back, taken

BUDGET: Final = 16 << 20  # bytes of a chunk's probabilities: a matrix product gains little from more rows


def sample(
    logits: Tensor,  # [N, V]
    options: SampleOptions,
    *,
    seed: int | Tensor,
    sample_ids: Tensor,  # [B]
    step: int | Tensor,
    replica: int,
) -> Tensor:
    """A token a row; -1 for a row that is no distribution."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if not tokens.numel():
        return tokens
    sample_ids = sample_ids.contiguous()
    shape = (*logits.shape, logits.shape[0] // sample_ids.shape[0])
    least = -math.inf if options.min_p is None else math.log(options.min_p)
    filters = (options.temperature, options.top_k or 0, 1.0 if options.top_p is None else options.top_p, least)
    run(
        "tokens_sample", "SampleCall", logits, (*shape, *matrix(logits), *filters), (tokens.data_ptr(),), seed=seed,
        sample_ids=sample_ids, step=step, replica=replica, op=OP_TOKENS,
    )  # fmt: skip
    return tokens


class _Soft:
    """A call's rows in chunks, with the kernel that makes a chunk's probabilities or its gradient."""

    def __init__(
        self, logits: Tensor, table: Tensor, options: SoftOptions, seed: int | Tensor, sample_ids: Tensor,
        step: int | Tensor, replica: int,
    ) -> None:  # fmt: skip
        self.dtype = accumulate_dtype(logits, table)
        self.logits = logits.detach()
        self.table = table.detach().to(self.dtype)  # a 16-bit table is widened whole, once
        self.count, self.classes = logits.shape
        self._options = options
        self._ids = sample_ids.contiguous()
        self._key = noise(seed, self._ids, step, replica, OP_GUMBEL)
        self._positions = max(1, self.count // max(1, self._ids.shape[0]))
        self.rows = max(1, min(self.count, BUDGET // (self.classes * self.dtype.itemsize)))

    def chunks(self, rows: int) -> Iterator[slice]:
        for start in range(0, self.count, rows):
            yield slice(start, min(start + rows, self.count))

    def buffer(self) -> Tensor:
        return workspace((self.rows, self.classes), self.dtype)

    def call(
        self, kernel: str, at: slice, state: Tensor, weights: Tensor | None, *, chosen: Tensor | None = None,
        slope: Tensor | None = None, d_logits: Tensor | None = None,
    ) -> None:  # fmt: skip
        compiled = core()
        values = (
            at.start, at.stop - at.start, self.classes, self._positions, self.dtype == torch.float64,
            *matrix(self.logits[at]), self._options.tau, self._options.gumbel, *self._key, state[0, at].data_ptr(),
            state[1, at].data_ptr(), pointer(weights), pointer(chosen), pointer(slope), *matrix(d_logits),
        )  # fmt: skip
        getattr(compiled, kernel)(packer(compiled, "SoftCall")(*values), threads())


def soft_forward(
    logits: Tensor,  # [N, V]
    table: Tensor,  # [V, D]
    options: SoftOptions,
    *,
    keep: bool = False,
    seed: int | Tensor,
    sample_ids: Tensor,  # [B]
    step: int | Tensor,
    replica: int,
) -> tuple[Tensor, SoftState | None]:
    """softmax((logits + noise) / tau) @ table a chunk of rows at a time; with ``keep`` what backward needs."""
    job = _Soft(logits, table, options, seed, sample_ids, step, replica)
    state = torch.empty(2, job.count, dtype=job.dtype, device="cpu")
    chosen = torch.empty(job.count if options.hard else 0, dtype=torch.int64, device="cpu")
    kernel = "tokens_soft_forward"
    if options.hard:
        if job.count:
            job.call(kernel, slice(0, job.count), state, None, chosen=chosen)
        out = taken(table, chosen)
    else:
        sums = torch.empty(job.count, table.shape[1], dtype=job.dtype, device="cpu")
        weights = job.buffer()
        for at in job.chunks(job.rows):
            job.call(kernel, at, state, weights)
            torch.mm(weights[: at.stop - at.start], job.table, out=sums[at])
        out = sums.div_(state[1][:, None]).to(table.dtype)
    return out, SoftState(state, chosen) if keep else None


def soft_backward(
    logits: Tensor,
    table: Tensor,
    state: SoftState,
    d_out: Tensor,  # [N, D]
    options: SoftOptions,
    *,
    wanted: tuple[bool, bool],
    seed: int | Tensor,
    sample_ids: Tensor,
    step: int | Tensor,
    replica: int,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to logits and table, from probabilities made anew, a chunk of rows at a time."""
    job = _Soft(logits, table, options, seed, sample_ids, step, replica)
    upstream, kernel = d_out.detach().to(job.dtype), "tokens_soft_backward"
    rows = state.rows.contiguous()
    d_logits = workspace(logits.shape, logits.dtype) if wanted[0] else None
    soft_table = wanted[1] and not options.hard
    d_table = torch.zeros(table.shape, dtype=job.dtype, device="cpu") if soft_table else None
    weights = job.buffer() if soft_table else None
    # The slope of a chunk lies where its gradient will be written over it, or in memory of its own.
    slope = job.buffer() if d_logits is not None and d_logits.dtype != job.dtype else None
    alone = weights is None and slope is None  # no buffer: all rows at once
    for at in job.chunks(max(1, job.count) if alone else job.rows) if wanted[0] or soft_table else ():
        count, here = at.stop - at.start, None
        if d_logits is not None:
            here = d_logits[at] if slope is None else slope[:count]
            torch.mm(upstream[at], job.table.T, out=here)
        part = None if d_logits is None else d_logits[at]
        job.call(kernel, at, rows, weights, slope=here, d_logits=part)
        if d_table is not None and weights is not None:
            d_table.addmm_(weights[:count].T, upstream[at])
    if options.hard and wanted[1]:
        return d_logits, given_back(table, state.chosen, d_out)
    return d_logits, None if d_table is None else d_table.to(table.dtype)
