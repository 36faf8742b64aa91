"""Long-tailed labels: counts of classes, losses and samplers that mind them, and second stages of training."""

from tgt_fast.long_tail.adjustment import BalancedSoftmaxLoss, LogitAdjustmentLoss, log_priors, post_hoc_adjustment
from tgt_fast.long_tail.counts import class_counts, class_priors
from tgt_fast.long_tail.margins import CosineClassifier, LDAMLoss
from tgt_fast.long_tail.mixup import LatentMixUp
from tgt_fast.long_tail.sampling import ClassBalancedSampler, SquareRootSampler
from tgt_fast.long_tail.stages import ClassifierRetraining, LearnableWeightScaling, tau_normalize
from tgt_fast.long_tail.weights import DeferredReweighting, effective_number_weights, effective_numbers

__all__ = [
    "BalancedSoftmaxLoss",
    "ClassBalancedSampler",
    "ClassifierRetraining",
    "CosineClassifier",
    "DeferredReweighting",
    "LDAMLoss",
    "LatentMixUp",
    "LearnableWeightScaling",
    "LogitAdjustmentLoss",
    "SquareRootSampler",
    "class_counts",
    "class_priors",
    "effective_number_weights",
    "effective_numbers",
    "log_priors",
    "post_hoc_adjustment",
    "tau_normalize",
]
