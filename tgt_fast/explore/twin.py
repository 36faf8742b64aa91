"""Another sampler of the same settings, to look at what one does without moving it."""

from __future__ import annotations

import dataclasses
from typing import Any

from tgt_fast.explore.replay import SyntheticReplay
from tgt_fast.explore.sampler import LatentSampler


def twin(sampler: LatentSampler | SyntheticReplay, **changes: Any) -> LatentSampler:
    """A sampler of the same teacher, options, seed, scale and balanced anchors, with its own counters and chains.

    Of a replay: one like the sampler that explores for it.

    ``changes``: options that it has instead.
    """
    if isinstance(sampler, SyntheticReplay):
        sampler = sampler.sampler
    options = {one.name: getattr(sampler.options, one.name) for one in dataclasses.fields(sampler.options)} | changes
    made = LatentSampler(sampler.teacher, **options, seed=sampler.seed, rank=0, world_size=1)
    made.scale, made._pool = sampler.scale, sampler._pool
    return made
