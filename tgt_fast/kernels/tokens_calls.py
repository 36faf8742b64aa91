"""Calls of the tokens ops: what goes in, and room for what comes out, whoever computes it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgt_fast.kernels.latent_calls import accumulate_dtype
from tgt_fast.kernels.memory import gradient_like
from tgt_fast.kernels.philox import NoiseKey


class SampleOptions(NamedTuple):
    """Which tokens may be drawn and how likely, validated by ``tgt_fast.ops.tokens``. None: no such filter."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None  # below 1
    min_p: float | None = None  # above 0
    numbers: Tensor | None = None  # [3] float64, the others where they are known when the op runs


class SoftOptions(NamedTuple):
    """The making of a soft embedding, validated by ``tgt_fast.ops.tokens``."""

    tau: float = 1.0
    gumbel: bool = False
    hard: bool = False
    numbers: Tensor | None = None  # [1] float64, tau where it is known when the op runs


class SampleCall(NamedTuple):
    """Inputs of a draw: rows of B samples, with L = N / B positions each."""

    logits: Tensor  # [N, V] dense rows
    options: SampleOptions
    noise: NoiseKey


class SoftCall(NamedTuple):
    """Inputs of a soft embedding of such rows, and what is wanted of it."""

    logits: Tensor  # [N, V] dense rows
    table: Tensor  # [V, D]
    options: SoftOptions
    noise: NoiseKey
    want_state: bool = False  # what backward needs to make the probabilities again
    want_d_logits: bool = False
    want_d_table: bool = False


TokensCall = SampleCall | SoftCall


class SoftState(NamedTuple):
    """State of a forward over the rows of y = logits + noise, for its backward."""

    rows: Tensor  # [2, N] max y, and sum exp((y - max y) / tau); float64 as soon as an input is, else float32
    chosen: Tensor  # [N] int64, the first place of max y; empty where the embedding is soft


class Outputs(NamedTuple):
    """Results of a forward."""

    out: Tensor  # [N] int64 tokens, or [N, D] embeddings in the table's dtype
    state: SoftState | None = None


Gradients = tuple[Tensor | None, Tensor | None]  # to logits and table


def outputs(call: TokensCall) -> Outputs:
    """Room for all that is wanted."""
    count = call.logits.shape[0]
    if isinstance(call, SampleCall):
        return Outputs(call.logits.new_empty(count, dtype=torch.int64))
    return Outputs(call.table.new_empty(count, call.table.shape[1]), state_of(call) if call.want_state else None)


def state_of(call: SoftCall) -> SoftState:
    """Room for the state of the rows, which a kernel may need whether or not it is wanted."""
    logits = call.logits
    count = logits.shape[0]
    dtype = accumulate_dtype(logits, call.table)
    return SoftState(
        logits.new_empty((2, count), dtype=dtype),
        logits.new_empty(count if call.options.hard else 0, dtype=torch.int64),
    )


def gradients(call: SoftCall) -> Gradients:
    """Room for the gradients that are wanted."""
    return (
        gradient_like(call.logits) if call.want_d_logits else None,
        call.table.new_empty(call.table.shape) if call.want_d_table else None,
    )


class Direct:
    """A backend's kernel, called from Python."""

    __slots__ = ("kernel",)

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def forward(self, call: TokensCall) -> Outputs:
        """Tokens, or embeddings and what backward needs."""
        out = outputs(call)
        self.kernel.forward(call, out)
        return out

    def backward(self, call: SoftCall, state: SoftState, d_out: Tensor) -> Gradients:
        """The gradients that are wanted."""
        made = gradients(call)
        self.kernel.backward(call, state, d_out, made)
        return made


# What kernels do, whichever backend they belong to


def positions_of(call: TokensCall) -> int:
    """Rows a sample."""
    return max(1, call.logits.shape[0] // max(1, call.noise.sample_ids.shape[0]))


def take(table: Tensor, chosen: Tensor, out: Tensor) -> None:
    """out = table[chosen], NaN where chosen is -1.  [V, D], [N], [N, D]"""
    torch.index_select(table.detach(), 0, chosen.clamp_min(0), out=out)
    out.masked_fill_((chosen < 0)[:, None], math.nan)


def give_back(d_table: Tensor, chosen: Tensor, d_out: Tensor) -> None:
    """The gradient of that to the table: the upstream gradients of each row's takers, added in a fixed order."""
    dtype = accumulate_dtype(d_table, d_out)
    upstream = d_out.detach().to(dtype).masked_fill((chosen < 0)[:, None], 0.0)
    total = torch.zeros(d_table.shape, dtype=dtype, device=d_table.device)
    d_table.copy_(total.index_put_((chosen.clamp_min(0),), upstream, accumulate=True))
