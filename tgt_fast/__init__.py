"""tgt_fast: teacher-guided training for PyTorch.

A frozen teacher explores the neighbourhood of each training example in its own latent space, decodes what it finds into
new examples, labels them softly, and the student learns from both. Importing this package starts nothing: the compiled
core is loaded at first use.
"""

from __future__ import annotations

from tgt_fast import _interrupted  # noqa: F401  (first: the others take seconds)
from tgt_fast.cache import Fingerprint, TeacherCache, teacher_fingerprint
from tgt_fast.explore import LatentSampler, Synthetic
from tgt_fast.kernels.native import release_buffers
from tgt_fast.kernels.options import DistillStats
from tgt_fast.kernels.select import backends, explain
from tgt_fast.losses.contrast import ContrastiveDistillationLoss
from tgt_fast.losses.distill import DistillationLoss
from tgt_fast.losses.linear import LinearDistillationLoss
from tgt_fast.ops._sparse_record import TeacherTopK
from tgt_fast.ops.contrast import contrastive_distillation_loss
from tgt_fast.ops.distill import distillation_loss
from tgt_fast.ops.latent import ascend_latents, perturb_latents
from tgt_fast.ops.linear import linear_distillation_loss
from tgt_fast.ops.sparse import topk_teacher
from tgt_fast.ops.tokens import sample_tokens, soft_embedding
from tgt_fast.ops.vocabulary import align_logits
from tgt_fast.teacher import Latents, Teacher
from tgt_fast.train import TGTObjective, fit

__version__ = "0.1.0"

__all__ = [
    "ContrastiveDistillationLoss",
    "DistillStats",
    "DistillationLoss",
    "Fingerprint",
    "LatentSampler",
    "Latents",
    "LinearDistillationLoss",
    "Synthetic",
    "TGTObjective",
    "Teacher",
    "TeacherCache",
    "TeacherTopK",
    "__version__",
    "align_logits",
    "ascend_latents",
    "backends",
    "contrastive_distillation_loss",
    "distillation_loss",
    "explain",
    "fit",
    "linear_distillation_loss",
    "perturb_latents",
    "release_buffers",
    "sample_tokens",
    "soft_embedding",
    "teacher_fingerprint",
    "topk_teacher",
]
