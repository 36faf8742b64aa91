"""Tokens from logits: ids that are drawn, and embeddings that a gradient can pass through."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels import late, select
from tgt_fast.kernels.options import OP_GUMBEL, OP_TOKENS
from tgt_fast.kernels.philox import NoiseKey
from tgt_fast.kernels.tokens_calls import (
    Direct,
    Gradients,
    Outputs,
    SampleCall,
    SampleOptions,
    SoftCall,
    SoftOptions,
    SoftState,
    TokensCall,
    gradients,
    outputs,
)
from tgt_fast.ops import _checks, library
from tgt_fast.ops._distill_op import dense_rows
from tgt_fast.ops._noise import KEY, KEY_COUNT, check_key, for_kernel, noise_key, packed, unpacked

# Checks


def _check_logits(name: str, logits: Tensor) -> int:
    """The number of samples that they are of."""
    _checks.floating(name, "logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ShapeError(f"{name}: logits must be (..., V) with V >= 1, got {tuple(logits.shape)}")
    return 1 if logits.dim() == 1 else logits.shape[0]


def _sample_options(classes: int, temperature: Any, top_k: Any, top_p: Any, min_p: Any) -> SampleOptions:
    name = "sample_tokens"
    temperature = _checks.number(name, "temperature", temperature, 0, _checks.LARGE, late=True)
    if top_k is not None:
        top_k = _checks.integer(name, "top_k", top_k, 1, 1 << 62)
        top_k = top_k if top_k < classes else None
    if top_p is not None:
        top_p = _checks.number(name, "top_p", top_p, 0, 1, open_low=True, late=True)
        top_p = top_p if isinstance(top_p, Tensor) or top_p < 1 else None
    if min_p is not None:
        min_p = _checks.number(name, "min_p", min_p, 0, 1, late=True)
        min_p = min_p if late.is_on(min_p) else None
    if not late.is_on(temperature):  # the first of the order is the only one
        return SampleOptions(1.0, 1 if classes > 1 else None)
    return SampleOptions(temperature, top_k, top_p, min_p)


def _soft_options(tau: Any, gumbel: bool, hard: bool) -> SoftOptions:
    tau = _checks.number("soft_embedding", "tau", tau, 0, _checks.LARGE, open_low=True, late=True)
    return SoftOptions(tau, gumbel, hard)


def _checked_key(name: str, call: TokensCall) -> NoiseKey:
    key, rows, samples = check_key(name, call.noise), call.logits.shape[0], call.noise.sample_ids.shape[0]
    if rows % samples if samples else rows:
        raise ArgumentError(f"{name}: {rows} rows are no whole number of positions for {samples} sample_ids")
    return key


# Autograd


class _Dispatched:
    """The same as ``Direct``, each call an op that a tracer can see."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def forward(self, call: SoftCall) -> Outputs:
        out, *state = library.dispatched(_soft_forward, *_packed_soft(call), self.backend, call.want_state)
        return Outputs(out, SoftState(*state) if call.want_state else None)

    def backward(self, call: SoftCall, state: SoftState, d_out: Tensor) -> Gradients:
        logits, table, *rest = _packed_soft(call)
        wanted = call.want_d_logits, call.want_d_table
        made = library.dispatched(_soft_backward, logits, table, *state, d_out, *rest, self.backend, *wanted)
        return made[0] if wanted[0] else None, made[1] if wanted[1] else None


class SoftEmbedding(torch.autograd.Function):
    """Keeps two numbers a row; the probabilities, noise included, are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, table: Tensor, call: SoftCall, kernel: Any) -> Tensor:
        # Counters may advance in place before backward asks for the same noise again.
        held = [v.clone() if isinstance(v, Tensor) and v.dim() == 0 else v for v in call.noise]
        ctx.kernel, ctx.options, (ctx.seed, _, *ctx.rest_of_key) = kernel, call.options, held
        out: Outputs = kernel.forward(call._replace(want_state=True))
        library.save(ctx, logits, table, *(out.state or ()), call.noise.sample_ids)
        return out.out

    @staticmethod
    @one_thread_in_forks
    def backward(ctx: Any, d_out: Tensor) -> Any:  # type: ignore[override]
        logits, table, rows, chosen, sample_ids = library.saved(ctx)
        name, key = "soft_embedding", NoiseKey(ctx.seed, sample_ids, *ctx.rest_of_key)
        _checks.all_readable(f"{name}, backward", logits=logits, table=table, **key._asdict())
        d_out = _checks.upstream(name, d_out)
        call = SoftCall(logits, table, ctx.options, key, False, *ctx.needs_input_grad[:2])
        grads: Any = ctx.kernel.backward(call, SoftState(rows, chosen), d_out)
        if torch.is_grad_enabled():
            refusal = f"{name}: the compiled backends have no second derivative; pass backend='reference'"
            grads = library.once(refusal, grads, (logits, table, d_out))
        return (*grads, None, None)


def _embedded(call: SoftCall, kernel: Any) -> Tensor:
    """Embeddings, differentiable in logits and table; ``kernel``: of the form of ``Direct``."""
    if library.graph_wanted(call.logits, call.table):
        made: Tensor = library.apply(SoftEmbedding, call.logits, call.table, call, kernel)
        return made
    out: Outputs = kernel.forward(call)
    return out.out


# Registration


def _packed_sample(call: SampleCall) -> tuple[Any, ...]:
    """A call in the order of the schema."""
    temperature, top_k, top_p, min_p, _ = call.options
    (temperature, top_p, min_p), numbers = late.packed(temperature, top_p, min_p)
    return call.logits, temperature, top_k, top_p, min_p, numbers, *packed(call.noise)


def _sample_call(logits: Tensor, *rest: Any) -> tuple[SampleCall, str]:
    """And back, where the op runs."""
    options, (*key, backend) = SampleOptions(*rest[:5]), rest[5:]
    return SampleCall(logits, options, unpacked(tuple(key), OP_TOKENS)), backend


def _packed_soft(call: SoftCall) -> tuple[Any, ...]:
    """A call in the order of the schemas."""
    tau, gumbel, hard, numbers = call.options
    if numbers is None:
        (tau,), numbers = late.packed(tau)
    return call.logits, call.table, tau, gumbel, hard, numbers, *packed(call.noise)


def _soft_call(logits: Tensor, table: Tensor, rest: tuple[Any, ...]) -> tuple[SoftCall, tuple[Any, ...]]:
    """And back, with what follows in the schema; tau may still be late."""
    options, rest = SoftOptions(*rest[:4]), rest[4:]
    return SoftCall(logits, table, options, unpacked(rest[:KEY_COUNT], OP_GUMBEL)), rest[KEY_COUNT:]


def _sample_kernel(*arguments: Any) -> Tensor:
    call, backend = _sample_call(*arguments)
    options, key = call.options, _checked_key("sample_tokens", call)
    temperature, top_k, top_p, min_p, numbers = options
    if numbers is not None:
        temperature, top_p, min_p = late.unpacked((temperature, top_p, min_p), numbers)
        options = _sample_options(call.logits.shape[1], temperature, top_k, top_p, min_p)
    call = SampleCall(dense_rows(call.logits), options, key)
    kernel = select.kernel("tokens", select.choose("tokens", backend, (call.logits,)))
    return Direct(kernel).forward(call).out


def _ready(call: SoftCall, backend: str) -> tuple[SoftCall, Direct]:
    """A call with all its numbers and dense rows, and the kernel that runs it."""
    tau, gumbel, hard, numbers = call.options
    if numbers is not None:
        (tau,) = late.unpacked((tau,), numbers)
        call = call._replace(options=_soft_options(tau, gumbel, hard))
    call = call._replace(logits=dense_rows(call.logits), noise=_checked_key("soft_embedding", call))
    return call, Direct(select.kernel("tokens", select.choose("soft_embedding", backend, (call.logits, call.table))))


def _returned(call: SoftCall, out: Outputs) -> tuple[Tensor, ...]:
    new = call.logits.new_empty
    return out.out, *(out.state or (new(0), new(0, dtype=torch.int64)))


def _forward(logits: Tensor, table: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    call, (backend, keep) = _soft_call(logits, table, rest)
    call, kernel = _ready(call._replace(want_state=keep), backend)
    return _returned(call, kernel.forward(call))


def _forward_fake(logits: Tensor, table: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    call, (_, keep) = _soft_call(logits, table, rest)
    call = call._replace(want_state=keep)
    return _returned(call, outputs(call))


def _backward_call(arguments: tuple[Any, ...]) -> tuple[SoftCall, str, SoftState, Tensor]:
    logits, table, rows, chosen, d_out, *rest = arguments
    call, (backend, d_logits, d_table) = _soft_call(logits, table, tuple(rest))
    return call._replace(want_d_logits=d_logits, want_d_table=d_table), backend, SoftState(rows, chosen), d_out


def _returned_gradients(call: SoftCall, made: Gradients) -> tuple[Tensor, Tensor]:
    return library.or_nothing(made[0], call.logits), library.or_nothing(made[1], call.table)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, backend, state, d_out = _backward_call(arguments)
    call, kernel = _ready(call, backend)
    return _returned_gradients(call, kernel.backward(call, state, d_out))


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, *_ = _backward_call(arguments)
    return _returned_gradients(call, gradients(call))


def _soft_autograd(logits: Tensor, table: Tensor, *rest: Any) -> Tensor:
    call, (backend,) = _soft_call(logits, table, rest)
    return _embedded(call, _Dispatched(backend))


_KEYED: Final = f"{library.schema_of(SoftOptions)}, {KEY}, str backend"
sample_op = library.define(
    f"sample_tokens(Tensor logits, {library.schema_of(SampleOptions)}, {KEY}, str backend) -> Tensor",
    _sample_kernel,
    lambda *arguments: outputs(_sample_call(*arguments)[0]).out,
)
soft_op = library.define(
    f"soft_embedding(Tensor logits, Tensor table, {_KEYED}) -> Tensor",
    lambda *arguments: _forward(*arguments, False)[0],
    lambda *arguments: _forward_fake(*arguments, False)[0],
    _soft_autograd,
    differentiable=2,
)
_soft_forward = library.define(
    f"soft_embedding_forward(Tensor logits, Tensor table, {_KEYED}, bool keep) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_soft_backward = library.define(
    f"soft_embedding_backward(Tensor logits, Tensor table, Tensor rows, Tensor chosen, Tensor d_out, {_KEYED}, "
    "bool want_logits, bool want_table) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


# The public functions


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
    options = _sample_options(logits.shape[-1], temperature, top_k, top_p, min_p)
    key = noise_key(name, "logits", logits, samples, seed, sample_ids, step, replica, OP_TOKENS)
    call = SampleCall(dense_rows(logits.detach()), options, key)
    if backend != "reference" and library.seen_by_dispatcher(call.logits, key.sample_ids, key.replica):
        ids: Tensor = sample_op(*_packed_sample(call), backend)
    else:
        chosen = select.choose("tokens", backend, (call.logits,))
        ids = Direct(select.kernel("tokens", chosen)).forward(call._replace(noise=for_kernel(key))).out
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
    options = _soft_options(tau, gumbel, hard)
    positions = math.prod(logits.shape[1:-1])
    if gumbel and not torch.compiler.is_compiling() and positions * ((logits.shape[-1] + 3) // 4) > 1 << 32:
        raise ShapeError(f"{name}: logits {tuple(logits.shape)} need more than 2**34 Gumbel numbers a sample")
    key = noise_key(name, "logits", logits, samples, seed, sample_ids, step, replica, OP_GUMBEL)
    call = SoftCall(dense_rows(logits), table, options, key)
    if backend != "reference" and library.seen_by_dispatcher(call.logits, table, key.sample_ids, key.replica):
        out: Tensor = soft_op(*_packed_soft(call), backend)
    else:
        chosen = select.choose("soft_embedding", backend, (call.logits, table))
        kernel, call = select.kernel("tokens", chosen), call._replace(noise=for_kernel(key))
        # The reference: plain PyTorch, which anything can differentiate and transform.
        out = kernel.value(call) if chosen == "reference" else _embedded(call, Direct(kernel))
    return out.reshape(*logits.shape[:-1], table.shape[1])
