"""The tokens ops in PyTorch's dispatcher, and the derivative of the soft embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.errors import ArgumentError
from tgt_fast.kernels import late, select
from tgt_fast.kernels.late import is_on
from tgt_fast.kernels.options import LateSoft, SampleOptions, SoftOptions, SoftState
from tgt_fast.ops import _checks, library
from tgt_fast.ops._checks import all_readable, upstream
from tgt_fast.ops._distill_op import dense_rows
from tgt_fast.ops._noise import KEY, KEY_COUNT, check_key, for_kernel, packed, unpacked

_SOFT = "float tau, bool gumbel, bool hard, Tensor? numbers"
_SOFT_COUNT = 4
_LARGE = 1e30


def _checked_key(name: str, rows: Tensor, arguments: tuple[Any, ...]) -> dict[str, Any]:
    key = unpacked(*arguments)
    check_key(name, key)
    samples = key["sample_ids"].shape[0]
    if rows.shape[0] % samples if samples else rows.shape[0]:
        raise ArgumentError(f"{name}: {rows.shape[0]} rows are no whole number of positions for {samples} sample_ids")
    return for_kernel(key)


# Drawing tokens


def sample_options(name: str, classes: int, temperature: Any, top_k: Any, top_p: Any, min_p: Any) -> SampleOptions:
    temperature = _checks.number(name, "temperature", temperature, 0, _LARGE, late=True)
    if top_k is not None:
        top_k = _checks.integer(name, "top_k", top_k, 1, 1 << 62)
        top_k = top_k if top_k < classes else None
    if top_p is not None:
        top_p = _checks.number(name, "top_p", top_p, 0, 1, open_low=True, late=True)
        top_p = top_p if isinstance(top_p, Tensor) or top_p < 1 else None
    if min_p is not None:
        min_p = _checks.number(name, "min_p", min_p, 0, 1, late=True)
        min_p = min_p if is_on(min_p) else None
    if not is_on(temperature):  # the first of the order is the only one
        return SampleOptions(1.0, 1 if classes > 1 else None)
    return SampleOptions(temperature, top_k, top_p, min_p)


def sample_as_op(logits: Tensor, options: SampleOptions, key: dict[str, Any], backend: str) -> Tensor:
    """Tokens of rows [N, V] as one call of the registered op."""
    (temperature, top_p, min_p), numbers = late.packed(options.temperature, options.top_p, options.min_p)
    ids: Tensor = sample_tokens(logits, temperature, options.top_k, top_p, min_p, numbers, *packed(**key), backend)
    return ids


def _sample_kernel(logits: Tensor, *rest: Any) -> Tensor:
    temperature, top_k, top_p, min_p, numbers = rest[:5]
    options, key, backend = (SampleOptions(*rest[:4]), _checked_key("sample_tokens", logits, rest[5:-1]), rest[-1])
    if numbers is not None:
        temperature, top_p, min_p = late.unpacked((temperature, top_p, min_p), numbers)
        options = sample_options("sample_tokens", logits.shape[1], temperature, top_k, top_p, min_p)
    rows = dense_rows(logits)
    kernel = select.kernel("tokens", select.choose("tokens", backend, (rows,)))
    ids: Tensor = kernel.sample(rows, options, **key)
    return ids


def _sample_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


# The soft embedding


def soft_embed(kernel: Any, logits: Tensor, table: Tensor, options: SoftOptions, key: dict[str, Any]) -> Tensor:
    """softmax((logits + noise) / tau) @ table of rows [N, V] by a kernel; differentiable in both."""
    if library.graph_wanted(logits, table):
        out: Tensor = library.apply(SoftEmbedding, logits, table, (kernel, options, key))
        return out
    without_graph: Tensor = kernel.soft_forward(logits, table, options, **key)[0]
    return without_graph


class SoftEmbedding(torch.autograd.Function):
    """Keeps two numbers a row; the probabilities, noise included, are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, table: Tensor, call: tuple[Any, SoftOptions, dict[str, Any]]) -> Tensor:
        kernel, options, key = call
        # Counters may advance in place before backward asks for the same noise again.
        held = {name: v.clone() if isinstance(v, Tensor) and v.dim() == 0 else v for name, v in key.items()}
        out, state = kernel.soft_forward(logits, table, options, keep=True, **key)
        ctx.call = (kernel, options, {name: value for name, value in held.items() if name != "sample_ids"})
        library.save(ctx, logits, table, *state, key["sample_ids"])
        result: Tensor = out
        return result

    @staticmethod
    @one_thread_in_forks
    def backward(ctx: Any, d_out: Tensor) -> Any:  # type: ignore[override]
        kernel, options, key = ctx.call
        logits, table, rows, chosen, sample_ids = library.saved(ctx)
        all_readable("soft_embedding, backward", logits=logits, table=table, sample_ids=sample_ids, **key)
        d_out = upstream("soft_embedding", d_out)
        grads = kernel.soft_backward(
            logits, table, SoftState(rows, chosen), d_out, options, wanted=tuple(ctx.needs_input_grad[:2]),
            sample_ids=sample_ids, **key,
        )  # fmt: skip
        if torch.is_grad_enabled():
            refusal = "soft_embedding: the compiled backends have no second derivative; pass backend='reference'"
            grads = library.once(refusal, grads, (logits, table, d_out))
        return (*grads, None)


def soft_as_op(logits: Tensor, table: Tensor, options: SoftOptions, key: dict[str, Any], backend: str) -> Tensor:
    """The same as one call of the registered op."""
    out: Tensor = soft_embedding(logits, table, *_packed_options(options), *packed(**key), backend)
    return out


def _packed_options(options: SoftOptions) -> tuple[float, bool, bool, Tensor | None]:
    tau: Any = options.tau
    numbers = options.numbers if isinstance(options, LateSoft) else None
    if numbers is None:
        (tau,), numbers = late.packed(tau)
    return tau, options.gumbel, options.hard, numbers


def _unpacked_options(tau: float, gumbel: bool, hard: bool, numbers: Tensor | None) -> SoftOptions:
    """Whose tau may still be late."""
    return SoftOptions(tau, gumbel, hard) if numbers is None else LateSoft(tau, gumbel, hard, numbers)


def soft_options(tau: Any, gumbel: bool, hard: bool) -> SoftOptions:
    """Checked options of a soft embedding."""
    return SoftOptions(_checks.number("soft_embedding", "tau", tau, 0, _LARGE, open_low=True, late=True), gumbel, hard)


class _Dispatched:
    """The kernel as autograd wants it, each call an op that a tracer can see."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def soft_forward(
        self, logits: Tensor, table: Tensor, options: SoftOptions, *, keep: bool = False, **key: Any
    ) -> tuple[Tensor, SoftState | None]:
        out, rows, chosen = library.dispatched(
            _soft_forward, logits, table, *_packed_options(options), *packed(**key), self.backend, keep
        )
        return out, SoftState(rows, chosen) if keep else None

    def soft_backward(
        self, logits: Tensor, table: Tensor, state: SoftState, d_out: Tensor, options: SoftOptions, *,
        wanted: tuple[bool, bool], **key: Any,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        d_logits, d_table = library.dispatched(
            _soft_backward, logits, table, *state, d_out, *_packed_options(options), *packed(**key), self.backend,
            *wanted,
        )  # fmt: skip
        return d_logits if wanted[0] else None, d_table if wanted[1] else None


def _kernel(backend: str, *tensors: Tensor) -> Any:
    return select.kernel("tokens", select.choose("soft_embedding", backend, tensors))


def _soft_call(rows: Tensor, rest: tuple[Any, ...]) -> tuple[SoftOptions, dict[str, Any], tuple[Any, ...]]:
    """(options, key, what follows them in the schema)."""
    options, rest = _unpacked_options(*rest[:_SOFT_COUNT]), rest[_SOFT_COUNT:]
    if isinstance(options, LateSoft):
        (tau,) = late.unpacked((options.tau,), options.numbers)
        options = soft_options(tau, options.gumbel, options.hard)
    return options, _checked_key("soft_embedding", rows, rest[:KEY_COUNT]), rest[KEY_COUNT:]


def _forward(logits: Tensor, table: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    options, key, (backend, keep) = _soft_call(logits, rest)
    logits = dense_rows(logits)
    out, state = _kernel(backend, logits, table).soft_forward(logits, table, options, keep=keep, **key)
    rows, chosen = (logits.new_empty(0), logits.new_empty(0, dtype=torch.int64)) if state is None else state
    return out, rows, chosen


def _forward_fake(logits: Tensor, table: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    hard, keep = rest[2], rest[-1]
    count = logits.shape[0]
    dtype = torch.float64 if torch.float64 in (logits.dtype, table.dtype) else torch.float32
    return (
        table.new_empty(count, table.shape[1]),
        logits.new_empty((2, count), dtype=dtype) if keep else logits.new_empty(0),
        logits.new_empty(count if keep and hard else 0, dtype=torch.int64),
    )


def _backward(
    logits: Tensor, table: Tensor, rows: Tensor, chosen: Tensor, d_out: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    options, key, (backend, *wanted) = _soft_call(logits, rest)
    logits = dense_rows(logits)
    d_logits, d_table = _kernel(backend, logits, table).soft_backward(
        logits, table, SoftState(rows, chosen), d_out, options, wanted=tuple(wanted), **key
    )
    return (
        logits.new_empty(0) if d_logits is None else d_logits.contiguous(),
        table.new_empty(0) if d_table is None else d_table.contiguous(),
    )


def _backward_fake(
    logits: Tensor, table: Tensor, rows: Tensor, chosen: Tensor, d_out: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(x.shape if want else 0) for x, want in zip((logits, table), rest[-2:], strict=True))  # type: ignore[return-value]


def _soft_kernel(logits: Tensor, table: Tensor, *rest: Any) -> Tensor:
    return _forward(logits, table, *rest, False)[0]


def _soft_fake(logits: Tensor, table: Tensor, *rest: Any) -> Tensor:
    return _forward_fake(logits, table, *rest, False)[0]


def _soft_autograd(logits: Tensor, table: Tensor, *rest: Any) -> Tensor:
    options, (*key, backend) = _unpacked_options(*rest[:_SOFT_COUNT]), rest[_SOFT_COUNT:]
    return soft_embed(_Dispatched(backend), logits, table, options, unpacked(*key))


sample_tokens = library.define(
    f"sample_tokens(Tensor logits, float temperature, int? top_k, float? top_p, float? min_p, Tensor? numbers, "
    f"{KEY}, str backend) "
    "-> Tensor",
    _sample_kernel,
    _sample_fake,
)
soft_embedding = library.define(
    f"soft_embedding(Tensor logits, Tensor table, {_SOFT}, {KEY}, str backend) -> Tensor",
    _soft_kernel,
    _soft_fake,
    _soft_autograd,
    differentiable=2,
)
_soft_forward = library.define(
    f"soft_embedding_forward(Tensor logits, Tensor table, {_SOFT}, {KEY}, str backend, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_soft_backward = library.define(
    f"soft_embedding_backward(Tensor logits, Tensor table, Tensor rows, Tensor chosen, Tensor d_out, {_SOFT}, {KEY}, "
    "str backend, bool want_logits, bool want_table) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
