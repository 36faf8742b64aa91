"""The way of one loss from hidden states to its driver: through the dispatcher, straight to it, or the reference."""

from __future__ import annotations

from torch import Tensor

from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.late import beside
from tgt_fast.kernels.options import DIFFERENTIABLE, DistillOptions, DistillStats, LinearOptions, LinearTensors
from tgt_fast.kernels.reference import linear as reference_linear
from tgt_fast.ops import _linear_op
from tgt_fast.ops._distill_arguments import packed
from tgt_fast.ops._linear_op import Call, Direct, Linear, chosen, packed_call, packed_heads
from tgt_fast.ops.library import graph_wanted, without_autocast
from tgt_fast.ops.record_stats import RecordStats

Stats = DistillStats | RecordStats


def run_reference(
    tensors: LinearTensors, divisor: float | Tensor | None, heads: LinearOptions, options: DistillOptions,
    want_stats: bool, backend: str, adjust: Adjustments | None = None,
) -> tuple[Tensor, Stats | None]:  # fmt: skip
    """Plain PyTorch, which anything can differentiate and transform."""
    with without_autocast():
        loss, stats = reference_linear.linear_distillation_loss(tensors, divisor, heads, options, want_stats, adjust)
    return loss, RecordStats(*stats) if isinstance(stats, Tensor) else stats


def run_dispatched(
    tensors: LinearTensors, divisor: float | Tensor | None, heads: LinearOptions, options: DistillOptions,
    want_stats: bool, backend: str, adjust: Adjustments | None = None,
) -> tuple[Tensor, Stats | None]:  # fmt: skip
    """The dispatcher path to the driver."""
    divisor = beside(divisor, tensors.student_hidden)
    inputs = packed_call(tensors, divisor, packed_heads(heads), packed(options), adjust)
    loss, rows = _linear_op.linear_distillation_loss(*inputs, want_stats, backend)
    return loss, _stats(tensors, rows) if want_stats else None


def run_in_chunks(
    tensors: LinearTensors, divisor: float | Tensor | None, heads: LinearOptions, options: DistillOptions,
    want_stats: bool, backend: str, adjust: Adjustments | None = None,
) -> tuple[Tensor, Stats | None]:  # fmt: skip
    """The eager path to the driver."""
    kernel = Direct(chosen(backend, tensors), tensors)
    if graph_wanted(*tensors[:DIFFERENTIABLE]):
        loss, rows = Linear.apply(divisor, Call(heads, options, kernel, want_stats, adjust), *tensors)
    else:
        out = kernel.forward(tensors, divisor, heads, options, want_stats=want_stats, adjust=adjust)
        loss, rows = out.loss, out.stats
    return loss, None if rows is None else _stats(tensors, rows)


def _stats(tensors: LinearTensors, rows: Tensor) -> Stats:
    return DistillStats.from_rows(rows) if tensors.topk_ids is None else RecordStats(*rows)
