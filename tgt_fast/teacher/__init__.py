"""The frozen teacher and the latents that it works on."""

from tgt_fast.teacher.latents import Latents
from tgt_fast.teacher.teacher import Teacher

__all__ = ["Latents", "Teacher"]
