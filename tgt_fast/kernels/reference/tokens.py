"""The meaning of the tokens ops: a token drawn from each row of logits, and the embedding of a soft one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tgt_fast.kernels.options import OP_GUMBEL, OP_TOKENS
from tgt_fast.kernels.philox import philox_words
from tgt_fast.kernels.tokens_calls import (
    Gradients,
    Outputs,
    SampleCall,
    SoftCall,
    SoftOptions,
    SoftState,
    TokensCall,
    give_back,
    positions_of,
)

__all__ = ["backward", "forward", "gumbel_noise", "token_uniform", "value"]


def token_uniform(
    seed: int | Tensor, sample_ids: Tensor, positions: int, *, step: int | Tensor = 0, replica: int | Tensor = 0
) -> Tensor:
    """One uniform number a position: (word + 1/2) / 2^32, word l of the sample's stream for position l.

    Args:
        seed, sample_ids, step, replica: the key, see :func:`standard_normal`.
        positions: L, rows a sample.

    Returns:
        [B, L] float64, in (0, 1).
    """
    words = philox_words(seed, sample_ids, (positions + 3) // 4, step, replica, OP_TOKENS).to(torch.float64)
    return (words.flatten(start_dim=1)[:, :positions] + 0.5) * 2.0**-32


def gumbel_noise(
    seed: int | Tensor,
    sample_ids: Tensor,
    positions: int,
    classes: int,
    *,
    step: int | Tensor = 0,
    replica: int | Tensor = 0,
) -> Tensor:
    """Standard Gumbel numbers, -log(-log u) with u = (word + 1/2) / 2^32.

    Position l of a sample starts at block l * ceil(V / 4) of its stream, so that every row starts a block of four.

    Returns:
        [B, L, V] float32.
    """
    blocks = (classes + 3) // 4
    words = philox_words(seed, sample_ids, positions * blocks, step, replica, OP_GUMBEL)
    words = words.reshape(sample_ids.shape[0], positions, 4 * blocks)[..., :classes]
    uniform = (words.to(torch.float64) + 0.5) * 2.0**-32
    return -(-uniform.log()).log().to(torch.float32)


def _drawn(call: SampleCall) -> Tensor:
    """A token a row: of the kept ones in the order of their ids, the first whose cumulated weight exceeds u * total.

    Tokens are ordered by value, largest first, and among equals by id. Of these: the first ``top_k``; of these the
    shortest beginning that holds ``top_p`` of their mass; of these the ones at least ``min_p`` as likely as the first.

    Returns:
        [N] int64; -1 for a row that is no distribution: only -inf, or with +inf or NaN.
    """
    logits, options, key = call
    if logits.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    x = logits.detach().to(torch.float64)
    largest = x.amax(dim=-1, keepdim=True)
    whole = (x < math.inf).all(dim=-1, keepdim=True) & (largest > -math.inf)
    scaled = torch.where(whole, x - torch.where(whole, largest, 0.0), 0.0) / options.temperature
    order = torch.sort(torch.where(whole, x, 0.0), dim=-1, descending=True, stable=True).indices
    below = scaled.gather(-1, order)
    kept = torch.ones_like(below, dtype=torch.bool)
    if options.top_k is not None:
        kept[:, options.top_k :] = False
    if options.top_p is not None:
        weight = below.exp() * kept
        before = weight.cumsum(dim=-1) - weight
        kept &= before < options.top_p * weight.sum(dim=-1, keepdim=True)
    if options.min_p is not None:
        kept &= below >= math.log(options.min_p)
    weight = scaled.exp() * torch.zeros_like(kept).scatter(-1, order, kept)
    mass = weight.cumsum(dim=-1)
    uniform = token_uniform(key.seed, key.sample_ids, positions_of(call), step=key.step, replica=key.replica)
    uniform = uniform.reshape(-1, 1)
    token = (mass <= uniform * mass[:, -1:]).sum(dim=-1)
    return torch.where(whole[:, 0], token, -1)


def _noisy(call: SoftCall) -> Tensor:
    """The logits in float64, with their Gumbel noise where it is asked for."""
    key, classes = call.noise, call.logits.shape[1]
    noisy = call.logits.to(torch.float64)
    if call.options.gumbel and call.logits.shape[0]:
        noise = gumbel_noise(key.seed, key.sample_ids, positions_of(call), classes, step=key.step, replica=key.replica)
        noisy = noisy + noise.reshape(noisy.shape).to(torch.float64)
    return noisy


def _first_largest(noisy: Tensor) -> Tensor:
    """The place of each row's largest number, the first of several; -1 for no distribution.  [N, V] -> [N]"""
    if noisy.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=noisy.device)
    place = torch.arange(noisy.shape[1], device=noisy.device)
    largest = noisy.amax(dim=-1, keepdim=True)
    first = torch.where(noisy == largest, place, noisy.shape[1]).amin(dim=-1)
    return torch.where(largest[:, 0].abs() < math.inf, first, -1)


def _embedding(noisy: Tensor, table: Tensor, options: SoftOptions) -> Tensor:
    """softmax(noisy / tau) @ table; with ``hard`` the row of the largest instead, whose gradient to the logits is that
    of the soft one and whose gradient to the table is its own."""
    rows64 = table.to(torch.float64)
    probability = torch.softmax(noisy / options.tau, dim=-1)
    if options.hard:
        soft = probability @ rows64.detach()
        chosen = _first_largest(noisy)[:, None]
        return torch.where(chosen >= 0, rows64[chosen[:, 0]], math.nan) + (soft - soft.detach())
    return probability @ rows64


def value(call: TokensCall) -> Tensor:
    """The tokens of a call, or softmax((logits + noise) / tau) @ table in the table's dtype, which is differentiable;
    float64 inside."""
    if isinstance(call, SampleCall):
        return _drawn(call)
    return _embedding(_noisy(call), call.table, call.options).to(call.table.dtype)


def forward(call: TokensCall, out: Outputs) -> None:
    """The same without a graph, and what the backward of a compiled kernel needs to know of each row."""
    with torch.no_grad():
        out.out.copy_(value(call))
        if isinstance(call, SampleCall) or out.state is None:
            return
        noisy = _noisy(call)
        rows, chosen = out.state
        if noisy.shape[0]:
            largest = noisy.amax(dim=-1)
            rows[0] = largest
            rows[1] = ((noisy - largest[:, None]) / call.options.tau).exp().sum(dim=-1)
        if call.options.hard:
            chosen.copy_(_first_largest(noisy))


def backward(call: SoftCall, state: SoftState, d_out: Tensor, grads: Gradients) -> None:
    """The gradients to logits and table, written out: inside a registered op there is no autograd to ask."""
    d_logits, d_table = grads
    with torch.no_grad():
        rows64, upstream = call.table.to(torch.float64), d_out.to(torch.float64)
        probability = torch.softmax(_noisy(call) / call.options.tau, dim=-1)
        if d_logits is not None:
            slope = upstream @ rows64.T
            mean = (probability * slope).sum(dim=-1, keepdim=True)
            d_logits.copy_(probability * (slope - mean) / call.options.tau)
        if d_table is not None and call.options.hard:
            give_back(d_table, state.chosen, upstream)
        elif d_table is not None:
            d_table.copy_(probability.T @ upstream)
