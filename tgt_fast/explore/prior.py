"""Prior: z drawn from the generator's prior, anchored nowhere (this project's, a control of the others)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tgt_fast.explore.draws import with_noise
from tgt_fast.explore.options import SamplerOptions
from tgt_fast.teacher import Latents, Teacher
from tgt_fast.teacher.key import Key


def prior_latents(teacher: Teacher, x: Any, key: Key, options: SamplerOptions, known: Latents | None = None) -> Latents:
    """prior(sigma * noise): zeros in the shape of the latents, noised, through the teacher's prior.

    ``known``: Enc(x), whose shape it is, where that need not be computed.
    """
    return teacher.from_prior(with_noise(_origin(teacher, x, key, known), None, key, options))


def _origin(teacher: Teacher, x: Any, key: Key, known: Latents | None) -> Latents:
    if isinstance(teacher.prior, tuple):
        like: Tensor | None = next((t for t in teacher.frozen_tensors() if t.is_floating_point()), None)
        dtype = torch.get_default_dtype() if like is None else like.dtype
        return Latents(torch.zeros(key.ids.shape[0], *teacher.prior, dtype=dtype, device=key.ids.device))
    anchors = teacher.encode(x) if known is None else known
    return replace(anchors, z=torch.zeros_like(anchors.z))
