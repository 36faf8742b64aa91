"""Exponentially averaged weights beside those that are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tgt_fast.errors import CheckpointError


class Average:
    """``average = decay * average + (1 - decay) * weight`` of each floating-point parameter, after each step.

    Kept in float32 at least, in which a small share is not rounded away. Buffers, such as running statistics, are the
    student's own.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._share = module, 1.0 - decay
        self.values = {name: _wide(value) for name, value in self._weights()}

    def _weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._module.named_parameters():
            if parameter.is_floating_point():
                yield name, parameter

    @torch.no_grad()
    def update(self) -> None:
        for name, weight in self._weights():
            average = _local(self.values[name])
            average.lerp_(_local(weight).to(average.dtype), self._share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the student's weights are the averages."""
        with torch.no_grad():
            own = {name: _local(weight).clone() for name, weight in self._weights()}
            self._write(self.values)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights():
            _local(weight).copy_(_local(values[name]))

    def load(self, values: Any) -> None:
        """Those of a checkpoint."""
        if not isinstance(values, dict) or values.keys() != self.values.keys():
            raise CheckpointError("its averaged weights are not of this student")
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.shape != self.values[name].shape:
                raise CheckpointError(f"its averaged weights are not of this student: {name} differs")
        with torch.no_grad():
            for name, value in values.items():
                _local(self.values[name]).copy_(_local(value))


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _local(value: Tensor) -> Tensor:
    """This process's part of a tensor that is sharded over several."""
    to_local = getattr(value, "to_local", None)
    part: Tensor = value if to_local is None else to_local()
    return part.detach()
