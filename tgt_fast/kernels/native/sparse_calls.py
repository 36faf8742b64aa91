"""What the CPU and the CUDA side of the loss against a top-k record share: how a record reaches the core."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tgt_fast.kernels.native import DTYPES
from tgt_fast.kernels.native.distill_calls import matrix
from tgt_fast.kernels.options import TAILS, Listed


def dense_record(record: Listed) -> Listed:
    """The record with dense rows."""
    ids, log_probs = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in record[:2])
    tail = None if record.tail_log_prob is None else record.tail_log_prob.contiguous()
    return Listed(ids, log_probs.detach(), tail, record.tail)


def record_of(record: Listed) -> tuple[Any, ...]:
    """A dense record as the core takes it."""
    ids: Tensor = record.ids
    tail = record.tail_log_prob
    rest = (0, 0, 0) if tail is None else (tail.data_ptr(), 1, DTYPES[tail.dtype])
    form = TAILS.index(record.tail)
    return ids.data_ptr(), ids.stride(0), ids.shape[1], matrix(record.log_probs), rest, form
