"""Synthetic: what a sampler returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tgt_fast.teacher import Latents


@dataclass(frozen=True, eq=False)
class Synthetic:
    """``x = Dec(z)`` and ``teacher_logits = h(x)``, for M = replicas * B synthetic examples.

    Row ``r * B + b`` is replica r of the batch's example b. Everything is detached, except in persistent
    mode, where x (the decoder's relaxed output, if it has one) and teacher_logits keep their graph to ``latents.z``.
    """

    x: Any  # data, a pytree of M examples, in the teacher's data space
    latents: Latents  # z [M, ...]
    teacher_logits: Tensor  # [M, ..., C]
    source: str  # the sampler's mode
    ids: Tensor  # [M] int64, the sample id that each example's noise is keyed by
