"""tgt_fast: teacher-guided training for PyTorch.

A frozen teacher explores the neighbourhood of each training example in its own latent space, decodes what it finds into
new examples, labels them softly, and the student learns from both. Importing this package starts nothing: its ops are
registered in ``torch.ops.tgt_fast``; all else is imported, and the compiled core is loaded, at first use.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from tgt_fast import _interrupted  # noqa: F401  (first: the others take seconds)

if TYPE_CHECKING:
    from tgt_fast import cache as cache
    from tgt_fast import data as data
    from tgt_fast import errors as errors
    from tgt_fast import explore as explore
    from tgt_fast import kernels as kernels
    from tgt_fast import long_tail as long_tail
    from tgt_fast import losses as losses
    from tgt_fast import ops as ops
    from tgt_fast import report as report
    from tgt_fast import synthesis as synthesis
    from tgt_fast import teacher as teacher
    from tgt_fast import testing as testing
    from tgt_fast import train as train
    from tgt_fast.cache import Fingerprint, TeacherCache, teacher_fingerprint
    from tgt_fast.explore import LatentSampler, Synthetic, SyntheticReplay, scores
    from tgt_fast.kernels.native import release_buffers
    from tgt_fast.kernels.options import DistillStats
    from tgt_fast.kernels.select import backends, explain
    from tgt_fast.losses.contrast import ContrastiveDistillationLoss
    from tgt_fast.losses.distill import DistillationLoss
    from tgt_fast.losses.linear import LinearDistillationLoss
    from tgt_fast.losses.listwise import ListwiseDistillationLoss
    from tgt_fast.losses.terms import Term
    from tgt_fast.ops.contrast import contrastive_distillation_loss
    from tgt_fast.ops.distill import distillation_loss
    from tgt_fast.ops.latent import ascend_latents, perturb_latents
    from tgt_fast.ops.linear import linear_distillation_loss
    from tgt_fast.ops.listwise import listwise_distillation_loss
    from tgt_fast.ops.record_stats import RecordStats
    from tgt_fast.ops.tokens import sample_tokens, soft_embedding
    from tgt_fast.ops.topk import TeacherTopK, topk_teacher
    from tgt_fast.ops.vocabulary import align_logits
    from tgt_fast.synthesis import SyntheticDataset, synthesize
    from tgt_fast.teacher import Latents, Teacher, TeacherEnsemble
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
    "ListwiseDistillationLoss",
    "RecordStats",
    "Synthetic",
    "SyntheticDataset",
    "SyntheticReplay",
    "TGTObjective",
    "Teacher",
    "TeacherCache",
    "TeacherEnsemble",
    "TeacherTopK",
    "Term",
    "__version__",
    "align_logits",
    "ascend_latents",
    "backends",
    "contrastive_distillation_loss",
    "distillation_loss",
    "explain",
    "fit",
    "linear_distillation_loss",
    "listwise_distillation_loss",
    "perturb_latents",
    "release_buffers",
    "sample_tokens",
    "scores",
    "soft_embedding",
    "synthesize",
    "teacher_fingerprint",
    "topk_teacher",
]

_MODULES: Final = (
    "cache",
    "data",
    "errors",
    "explore",
    "kernels",
    "long_tail",
    "losses",
    "ops",
    "report",
    "synthesis",
    "teacher",
    "testing",
    "train",
)
_OPS: Final = ("contrast", "distill", "latent", "linear", "listwise", "tokens", "topk")
_WHERE: Final = {
    "ContrastiveDistillationLoss": "tgt_fast.losses.contrast",
    "DistillStats": "tgt_fast.kernels.options",
    "DistillationLoss": "tgt_fast.losses.distill",
    "Fingerprint": "tgt_fast.cache",
    "LatentSampler": "tgt_fast.explore",
    "Latents": "tgt_fast.teacher",
    "LinearDistillationLoss": "tgt_fast.losses.linear",
    "ListwiseDistillationLoss": "tgt_fast.losses.listwise",
    "RecordStats": "tgt_fast.ops.record_stats",
    "Synthetic": "tgt_fast.explore",
    "SyntheticDataset": "tgt_fast.synthesis",
    "SyntheticReplay": "tgt_fast.explore",
    "TGTObjective": "tgt_fast.train",
    "Teacher": "tgt_fast.teacher",
    "TeacherEnsemble": "tgt_fast.teacher",
    "TeacherCache": "tgt_fast.cache",
    "TeacherTopK": "tgt_fast.ops.topk",
    "Term": "tgt_fast.losses.terms",
    "align_logits": "tgt_fast.ops.vocabulary",
    "ascend_latents": "tgt_fast.ops.latent",
    "backends": "tgt_fast.kernels.select",
    "contrastive_distillation_loss": "tgt_fast.ops.contrast",
    "distillation_loss": "tgt_fast.ops.distill",
    "explain": "tgt_fast.kernels.select",
    "fit": "tgt_fast.train",
    "linear_distillation_loss": "tgt_fast.ops.linear",
    "listwise_distillation_loss": "tgt_fast.ops.listwise",
    "perturb_latents": "tgt_fast.ops.latent",
    "release_buffers": "tgt_fast.kernels.native",
    "sample_tokens": "tgt_fast.ops.tokens",
    "scores": "tgt_fast.explore",
    "soft_embedding": "tgt_fast.ops.tokens",
    "synthesize": "tgt_fast.synthesis",
    "teacher_fingerprint": "tgt_fast.cache",
    "topk_teacher": "tgt_fast.ops.topk",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tgt_fast.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'tgt_fast' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


def _import_all() -> None:
    """Everything that is public, now."""
    for name in (*_MODULES, *_WHERE):
        getattr(sys.modules[__name__], name)


def _is_command() -> bool:
    """True if this process is ``tgt-fast`` or ``python -m tgt_fast``, whose help texts wait for no PyTorch."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    return module.split(".")[0] == "tgt_fast" or os.path.basename(getattr(sys, "argv", [""])[0]) == "tgt-fast"


if not _is_command():  # a program that was exported with these ops may be loaded next
    for _noun in _OPS:
        importlib.import_module(f"tgt_fast.ops.{_noun}")
