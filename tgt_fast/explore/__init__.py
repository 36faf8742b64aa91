"""Exploration of the teacher's latent space: fresh examples with soft labels."""

from tgt_fast.explore import scores
from tgt_fast.explore.replay import SyntheticReplay
from tgt_fast.explore.sampler import LatentSampler
from tgt_fast.explore.synthetic import Synthetic

__all__ = ["LatentSampler", "Synthetic", "SyntheticReplay", "scores"]
