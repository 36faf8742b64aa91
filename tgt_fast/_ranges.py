"""Named ranges in a profile: where a training step spends its time.

They are PyTorch's own ``record_function`` ranges: ``torch.profiler`` and ``tgt-fast profile`` show them, and under
``torch.autograd.profiler.emit_nvtx()`` they are NVTX ranges, which Nsight shows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import profiler

PREFIX = "tgt_fast."

_NOTHING = nullcontext()


def named_range(name: str) -> AbstractContextManager[Any]:
    """A range ``tgt_fast.NAME`` for a ``with`` block; nothing where no profiler runs, or under ``torch.compile``.

    Asking first matters: ``record_function`` costs microseconds also where nobody listens, this well below one.
    """
    if torch.compiler.is_compiling() or not profiler._is_profiler_enabled:
        return _NOTHING
    return profiler.record_function(PREFIX + name)
