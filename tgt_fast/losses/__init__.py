"""The losses as modules, which keep their options.

Those that run fused kernels (``DistillationLoss``, ``LinearDistillationLoss``, ``ContrastiveDistillationLoss``,
``ListwiseDistillationLoss``) are in ``tgt_fast``, too. The others are written in PyTorch's operations, and are called
``loss(student, teacher, target=None, *, weight=None)``, with the same rows, masks and reductions.
"""

from tgt_fast.losses.contrast import ContrastiveDistillationLoss
from tgt_fast.losses.correlation import DIST, MLKDBatch, MLKDClass
from tgt_fast.losses.distill import DistillationLoss
from tgt_fast.losses.features import AttentionTransfer, EmbeddingDistillation, FitNets
from tgt_fast.losses.linear import LinearDistillationLoss
from tgt_fast.losses.listwise import ListwiseDistillationLoss
from tgt_fast.losses.ranking import BiLD, MarginMSE
from tgt_fast.losses.relational import RKDAngle, RKDDistance, SimilarityPreserving
from tgt_fast.losses.rows import RowLoss
from tgt_fast.losses.split import GDKD, NKD
from tgt_fast.losses.tempered import WTTM, SymmetricCE, TopKReverseKL
from tgt_fast.losses.terms import GradientBalance, Term, warmup

__all__ = [
    "DIST",
    "GDKD",
    "NKD",
    "WTTM",
    "AttentionTransfer",
    "BiLD",
    "ContrastiveDistillationLoss",
    "DistillationLoss",
    "EmbeddingDistillation",
    "FitNets",
    "GradientBalance",
    "LinearDistillationLoss",
    "ListwiseDistillationLoss",
    "MLKDBatch",
    "MLKDClass",
    "MarginMSE",
    "RKDAngle",
    "RKDDistance",
    "RowLoss",
    "SimilarityPreserving",
    "SymmetricCE",
    "Term",
    "TopKReverseKL",
    "warmup",
]
