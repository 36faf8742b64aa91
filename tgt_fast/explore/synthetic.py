"""Synthetic: what a sampler returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tgt_fast.teacher import Latents


@dataclass(frozen=True, eq=False)
class Synthetic:
    """``x = Dec(z)`` and ``teacher_logits = h(x)``, for M = replicas * B synthetic examples.

    Row ``r * B + b`` is replica r of the batch's row b: its noise is keyed by that row's id and by which copy of the id
    it is in the batch, and it starts from that row's example, unless anchors are balanced, or drawn by class: then from
    the example ``anchor_ids``, of class ``anchor_labels``. With replicas by class M is what the rows' classes ask for:
    first a replica 0 of each row that has one, then a replica 1, and so on.
    Everything is detached, except in persistent mode, where x (the decoder's relaxed output, if it has one) and
    teacher_logits keep their graph to ``latents.z``.
    """

    x: Any  # data, a pytree of M examples, in the teacher's data space
    latents: Latents  # z [M, ...]
    teacher_logits: Tensor  # [M, ..., C]
    source: str  # the sampler's mode
    ids: Tensor  # [M] int64, the sample id that each example's noise is keyed by
    # [M] int64, the sample id of the real example that each starts from; None in prior mode, which starts from none. Of
    # balanced anchors: the id that calibrate's loader gave, or, where it gave none, the place in it, counted from 0.
    anchor_ids: Tensor | None = None
    # [M] int64, the class of that example, where the sampler knows it: of balanced anchors, or of ones drawn by class,
    # the label that calibrate's loader gave, or the labeler's argmax; else the ``labels`` of the call, negative where
    # there was none. None: the labels are the caller's, y.repeat(replicas).
    anchor_labels: Tensor | None = None
