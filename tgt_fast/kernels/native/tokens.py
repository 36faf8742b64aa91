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
from tgt_fast.kernels.native.latent import noise_values, run
from tgt_fast.kernels.tokens_calls import (
    Gradients,
    Outputs,
    SampleCall,
    SoftCall,
    SoftState,
    TokensCall,
    give_back,
    positions_of,
    state_of,
    take,
)

BUDGET: Final = 16 << 20  # bytes of a chunk's probabilities: a matrix product gains little from more rows


def forward(call: TokensCall, out: Outputs) -> None:
    """Tokens, -1 for a row that is no distribution; or embeddings, a chunk of rows at a time."""
    if not isinstance(call, SampleCall):
        _soft_forward(call, out)
    elif out.out.numel():
        logits, options = call.logits, call.options
        least = -math.inf if options.min_p is None else math.log(options.min_p)
        filters = (options.temperature, options.top_k or 0, 1.0 if options.top_p is None else options.top_p, least)
        before = (*logits.shape, positions_of(call), *matrix(logits), *filters)
        run("tokens_sample", "SampleCall", logits, before, call.noise, (out.out.data_ptr(),))


class _Soft:
    """A call's rows in chunks, with the kernel that makes a chunk's probabilities or its gradient."""

    def __init__(self, call: SoftCall) -> None:
        self.dtype = accumulate_dtype(call.logits, call.table)
        self.logits = call.logits.detach()
        self.table = call.table.detach().to(self.dtype)  # a 16-bit table is widened whole, once
        self.count, self.classes = self.logits.shape
        self._options = call.options
        self._key = call.noise._replace(sample_ids=call.noise.sample_ids.contiguous())
        self._positions = positions_of(call)
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
            *matrix(self.logits[at]), self._options.tau, self._options.gumbel, *noise_values(self._key),
            state[0, at].data_ptr(), state[1, at].data_ptr(), pointer(weights), pointer(chosen), pointer(slope),
            *matrix(d_logits),
        )  # fmt: skip
        getattr(compiled, kernel)(packer(compiled, "SoftCall")(*values), threads())


def _soft_forward(call: SoftCall, out: Outputs) -> None:
    job = _Soft(call)
    state, chosen = out.state or state_of(call)
    kernel = "tokens_soft_forward"
    if call.options.hard:
        if job.count:
            job.call(kernel, slice(0, job.count), state, None, chosen=chosen)
        take(call.table, chosen, out.out)
        return
    sums = out.out if out.out.dtype == job.dtype else torch.empty(out.out.shape, dtype=job.dtype, device="cpu")
    weights = job.buffer()
    for at in job.chunks(job.rows):
        job.call(kernel, at, state, weights)
        torch.mm(weights[: at.stop - at.start], job.table, out=sums[at])
    out.out.copy_(sums.div_(state[1][:, None]))


def backward(call: SoftCall, state: SoftState, d_out: Tensor, grads: Gradients) -> None:
    """The gradients to logits and table, from probabilities made anew, a chunk of rows at a time."""
    job = _Soft(call)
    upstream, kernel = d_out.detach().to(job.dtype), "tokens_soft_backward"
    rows = state.rows.contiguous()
    d_logits, d_table = grads
    if d_table is not None and call.options.hard:
        give_back(d_table, state.chosen, d_out)
        d_table = None
    total = None
    if d_table is not None:
        total = d_table if d_table.dtype == job.dtype else torch.empty(d_table.shape, dtype=job.dtype, device="cpu")
        total.zero_()
    weights = None if total is None else job.buffer()
    # The slope of a chunk lies where its gradient will be written over it, or in memory of its own.
    slope = job.buffer() if d_logits is not None and d_logits.dtype != job.dtype else None
    alone = weights is None and slope is None  # no buffer: all rows at once
    for at in job.chunks(max(1, job.count) if alone else job.rows) if d_logits is not None or total is not None else ():
        count, here = at.stop - at.start, None
        if d_logits is not None:
            here = d_logits[at] if slope is None else slope[:count]
            torch.mm(upstream[at], job.table.T, out=here)
        part = None if d_logits is None else d_logits[at]
        job.call(kernel, at, rows, weights, slope=here, d_logits=part)
        if total is not None and weights is not None:
            total.addmm_(weights[:count].T, upstream[at])
    if total is not None and d_table is not None and total is not d_table:
        d_table.copy_(total)
