"""The distillation loss from hidden states as others compute it: soft term * T^2 + cross-entropy, mean over rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tgt_fast.bench import distill_rivals, rivals
from tgt_fast.bench.case import UnfitError

CHUNKED: Final = "chunked"
ALL: Final = (rivals.EAGER, rivals.COMPILE, CHUNKED, "liger", "orda", "cce")
_ROWS: Final = 256  # of a chunk

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # hidden, weight, teacher's two, target -> 0-d


def loss_of(name: str, divergence: str, temperature: float, scale: float = 1.0) -> Loss:
    """A rival's loss, of logits ``scale * hidden @ weight.T`` on both sides.

    Raises:
        UnfitError: the rival has nothing that computes it.
    """
    if name not in (rivals.EAGER, rivals.COMPILE, CHUNKED):
        raise UnfitError("has no such divergence of two heads together with the hard term")
    on_logits = distill_rivals.loss_of(rivals.EAGER, divergence, temperature)

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, target: Tensor) -> Tensor:
        student, other = hidden @ weight.T, teacher @ teacher_weight.T
        if scale != 1.0:
            student, other = student * scale, other * scale
        return on_logits(student, other, target)

    def chunked(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, target: Tensor) -> Tensor:
        """As a user saves memory with PyTorch alone: a chunk's logits are made again in backward."""
        rows = hidden.shape[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, rows, _ROWS):
            at = slice(start, start + _ROWS)
            part = checkpoint(loss, hidden[at], weight, teacher[at], teacher_weight, target[at], use_reentrant=False)
            total = total + part.float() * (min(_ROWS, rows - start) / rows)
        return total

    return chunked if name == CHUNKED else loss
