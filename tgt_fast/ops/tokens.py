"""Tokens from logits: ids that are drawn, and embeddings that a gradient can pass through."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels import select
from tgt_fast.ops import _checks
from tgt_fast.ops._distill_op import dense_rows
from tgt_fast.ops._noise import for_kernel, noise_key
from tgt_fast.ops._tokens_op import sample_as_op, sample_options, soft_as_op, soft_embed, soft_options
from tgt_fast.ops.library import seen_by_dispatcher

_LARGE = 1e30


@one_thread_in_forks
def sample_tokens(
    logits: Tensor,  # [..., V]
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,  # [B]
    step: int | Tensor = 0,
    replica: int | Tensor = 0,  # [B]
    backend: str = "auto",
) -> Tensor:
    r"""``torch.multinomial(torch.softmax(logits / temperature, -1), 1)`` of each row's kept tokens, noise by sample id.

    The kept tokens, ordered by logit, largest first, and equal ones by id: the first ``top_k``; of these the shortest
    beginning that holds at least ``top_p`` of *their* mass; of these the ones at least ``min_p`` times as likely as the
    first. (The order of Hugging Face's logits processors.) One of them is drawn, with its exact probability among them
    to 2**-32, by one uniform number a row: the l-th of the sample's Philox stream for position l. So a token depends on
    its logits and (seed, id, position, step, replica) alone: not on the batch's order, split or number of processes.
    Arithmetic in float64 for every dtype, so that backends draw the same tokens. Deterministic; no global random state.

    Args:
        logits: ``(V,)``, ``(B, V)`` or ``(B, ..., V)``, float64, float32, bfloat16 or float16: ``B`` samples, whose
            other axes are its positions, in order. -inf is probability 0. Not differentiable.
        temperature: >= 0, a number or a 0-d tensor. 0 takes the largest logit, of equal ones the lowest id, and draws
            nothing.
        top_k: keep that many tokens, >= 1; None, or as many as there are: all.
        top_p: in (0, 1]; None or 1: all.
        min_p: in [0, 1]; None or 0: all.
        seed: 64-bit integer, or a 0-d int64 tensor.
        sample_ids: ``(B,)`` integers, 0 <= id < 2**48 (``(1,)`` for ``(V,)`` logits); ``0..B-1`` by default.
        step: 0 <= step < 2**28, an integer or a 0-d int64 tensor.
        replica: 0 <= replica < 2**16: which of a sample's several synthetic examples. An integer, or ``(B,)`` integers,
            one a sample.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        ``(...)`` int64 ids; -1 where a row is no distribution: nothing but -inf, or +inf or NaN in it.

    Raises:
        ShapeError, DTypeError, DeviceError, ArgumentError: before anything runs, with the offending values.

    Source: top-k by Fan et al., ACL 2018; top-p by Holtzman et al., ICLR 2020; min-p by Nguyen et al., ICLR 2025.

    >>> import torch, tgt_fast as tgt
    >>> logits = torch.tensor([[0.0, 9.0, 1.0], [5.0, -1.0, 4.0]])
    >>> tgt.sample_tokens(logits, temperature=0)
    tensor([1, 0])
    >>> whole = tgt.sample_tokens(logits, top_p=0.9, seed=7)
    >>> part = tgt.sample_tokens(logits[1:], top_p=0.9, seed=7, sample_ids=torch.tensor([1]))
    >>> bool(whole[1] == part[0])
    True
    """
    name = "sample_tokens"
    _checks.refuse_tracing(name)
    samples = _check_logits(name, logits)
    options = sample_options(name, logits.shape[-1], temperature, top_k, top_p, min_p)
    key = noise_key(name, "logits", logits, samples, seed, sample_ids, step, replica)
    rows = dense_rows(logits.detach())
    if backend != "reference" and seen_by_dispatcher(rows, key["sample_ids"], key["replica"]):
        ids = sample_as_op(rows, options, key, backend)
    else:
        kernel = select.kernel("tokens", select.choose("tokens", backend, (rows,)))
        ids = kernel.sample(rows, options, **for_kernel(key))
    return ids.reshape(logits.shape[:-1])


@one_thread_in_forks
def soft_embedding(
    logits: Tensor,  # [..., V]
    table: Tensor,  # [V, D]
    *,
    tau: float = 1.0,
    gumbel: bool = False,
    hard: bool = False,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,  # [B]
    step: int | Tensor = 0,
    replica: int | Tensor = 0,  # [B]
    backend: str = "auto",
) -> Tensor:
    r"""``torch.softmax((logits + gumbel) / tau, -1) @ table``, without keeping a probability a token.

    With ``gumbel`` a Gumbel-softmax sample, with noise ``-log(-log u)`` keyed as in :func:`sample_tokens`, of a stream
    of its own; it is computed again in backward, not kept. With ``hard`` the forward is the row of the largest of
    ``logits + gumbel`` (the lowest id of equal ones) and straight-through: the gradient to the logits is that of the
    soft embedding, the gradient to the table that of the row taken, as of ``F.gumbel_softmax(hard=True) @ table``.

    Deterministic; safe in CUDA graphs and ``torch.compile(fullgraph=True)``; the compiled backends have no second
    derivative, ``backend="reference"`` does. Extra memory: a few chunks of rows, whatever their number.

    Args:
        logits: ``(V,)``, ``(B, V)`` or ``(B, ..., V)``, float64, float32, bfloat16 or float16: ``B`` samples, whose
            other axes are its positions, in order. -inf is probability 0, with gradient 0. Differentiable.
        table: ``(V, D)`` embeddings, any of these dtypes. Differentiable; its gradient is made on demand.
        tau: temperature, > 0; a number or a 0-d tensor. A schedule of either is compiled once.
        gumbel: add standard Gumbel noise: position l of a sample has the numbers from 4 l ceil(V / 4) on.
        hard: the embedding of one token, straight-through.
        seed, sample_ids, step, replica: the key of the noise, see :func:`sample_tokens`.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``(..., D)`` in the table's dtype. A row that is no distribution (nothing but -inf, or +inf or NaN in it) gives
        NaN, in the embedding and in the gradient to it.

    Raises:
        ShapeError, DTypeError, DeviceError, ArgumentError: before anything runs, with the offending values.

    Source: Jang et al. and Maddison et al., ICLR 2017; straight-through by Bengio et al., 2013; the keyed noise and the
    fused computation are ours.

    >>> import torch, tgt_fast as tgt
    >>> table = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> tgt.soft_embedding(torch.zeros(1, 2), table)
    tensor([[0.5000, 0.5000]])
    >>> tgt.soft_embedding(torch.tensor([[0.0, 3.0]]), table, hard=True)
    tensor([[0., 1.]])
    """
    name = "soft_embedding"
    _checks.refuse_tracing(name)
    samples = _check_logits(name, logits)
    _checks.floating(name, "table", table)
    if table.dim() != 2 or table.shape[0] != logits.shape[-1]:
        raise ShapeError(
            f"{name}: table {tuple(table.shape)} must be (V, D) with the V = {logits.shape[-1]} classes of logits "
            f"{tuple(logits.shape)}"
        )
    _checks.same_device(name, "table", table, "logits", logits)
    for what, flag in (("gumbel", gumbel), ("hard", hard)):
        if not isinstance(flag, bool):
            raise ArgumentError(f"{name}: {what} must be True or False, got {flag!r}")
    options = soft_options(tau, gumbel, hard)
    positions = math.prod(logits.shape[1:-1])
    if gumbel and not torch.compiler.is_compiling() and positions * ((logits.shape[-1] + 3) // 4) > 1 << 32:
        raise ShapeError(f"{name}: logits {tuple(logits.shape)} need more than 2**34 Gumbel numbers a sample")
    key = noise_key(name, "logits", logits, samples, seed, sample_ids, step, replica)
    rows = dense_rows(logits)
    if backend != "reference" and seen_by_dispatcher(rows, table, key["sample_ids"], key["replica"]):
        out = soft_as_op(rows, table, options, key, backend)
    else:
        chosen = select.choose("soft_embedding", backend, (rows, table))
        kernel, key = select.kernel("tokens", chosen), for_kernel(key)
        if chosen == "reference":  # plain PyTorch, which anything can differentiate and transform
            out = kernel.soft_embedding(rows, table, options, **key)
        else:
            out = soft_embed(kernel, rows, table, options, key)
    return out.reshape(*logits.shape[:-1], table.shape[1])


def _check_logits(name: str, logits: Tensor) -> int:
    """The number of samples that they are of."""
    _checks.floating(name, "logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ShapeError(f"{name}: logits must be (..., V) with V >= 1, got {tuple(logits.shape)}")
    return 1 if logits.dim() == 1 else logits.shape[0]
