"""Training a student: the objective, a thin loop, checkpoints and metrics."""

from tgt_fast.train.checkpoint import Checkpoint, checkpoint_weights, load_checkpoint, save_checkpoint, save_weights
from tgt_fast.train.data import BatchStream
from tgt_fast.train.loop import fit
from tgt_fast.train.metrics import accuracy, agreement, class_accuracy, class_thirds, evaluate, mean_kl
from tgt_fast.train.objective import TGTObjective
from tgt_fast.train.run import FitResult
from tgt_fast.train.view import RunView

__all__ = [
    "BatchStream",
    "Checkpoint",
    "FitResult",
    "RunView",
    "TGTObjective",
    "accuracy",
    "agreement",
    "checkpoint_weights",
    "class_accuracy",
    "class_thirds",
    "evaluate",
    "fit",
    "load_checkpoint",
    "mean_kl",
    "save_checkpoint",
    "save_weights",
]
