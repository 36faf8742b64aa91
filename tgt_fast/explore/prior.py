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


def prior_latents(teacher: Teacher, x: Any, key: Key, options: SamplerOptions) -> Latents:
    """prior(sigma * noise): zeros in the shape of the latents, noised, through the teacher's prior."""
    return teacher.from_prior(with_noise(_origin(teacher, x, key), None, key, options))


def _origin(teacher: Teacher, x: Any, key: Key) -> Latents:
    if isinstance(teacher.prior, tuple):
        like: Tensor | None = next((t for t in teacher.frozen_tensors() if t.is_floating_point()), None)
        dtype = torch.get_default_dtype() if like is None else like.dtype
        return Latents(torch.zeros(key.ids.shape[0], *teacher.prior, dtype=dtype, device=key.ids.device))
    anchors = teacher.encode(x)
    return replace(anchors, z=torch.zeros_like(anchors.z))
