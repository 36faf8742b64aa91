"""``tensorboard``: a callback of ``fit`` that writes to a SummaryWriter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tgt_fast.errors import ArgumentError
from tgt_fast.ops import _checks
from tgt_fast.train import RunView


def tensorboard(writer: Any, *, every: int = 10) -> Callable[[str, RunView], None]:
    """A callback for ``fit(callbacks=[...])``: losses as ``step/NAME``, records of the history as ``record/NAME``.

    Args:
        writer: a ``SummaryWriter`` of ``torch.utils.tensorboard`` or of tensorboardX; anything with
            ``add_scalar(name, value, step)``, and ``flush()`` or not. The first process writes to it.
        every: steps between two looks at the loss, which wait for the device; 0: records alone.

    Raises:
        ArgumentError: not such a writer.

    >>> import tgt_fast as tgt
    >>> class Writer:
    ...     def add_scalar(self, name, value, step): print(name, step)
    >>> callback = tgt.report.tensorboard(Writer())
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise ArgumentError(f"tensorboard: expected a SummaryWriter, got {type(writer).__name__}")
    every = _checks.integer("tensorboard", "every", every, 0, 1 << 31)

    def write(event: str, run: RunView) -> None:
        if run.rank != 0:
            return
        if event == "step" and every and (run.steps % every == 0 or run.steps == 1):
            for name, value in run.losses.items():
                writer.add_scalar(f"step/{name}", value, run.steps)
        elif event == "record":
            for name, value in run.history[-1].items():
                if name != "step" and not (isinstance(value, float) and math.isnan(value)):
                    writer.add_scalar(f"record/{name}", value, run.steps)
        elif event == "end" and hasattr(writer, "flush"):
            writer.flush()

    return write
