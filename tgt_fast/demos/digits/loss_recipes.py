"""Recipes of losses: those that take the soft term's place, and those that stand beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from tgt_fast import losses
from tgt_fast.demos.digits import models
from tgt_fast.demos.digits.recipe import Kitchen, Recipe, loss_of
from tgt_fast.long_tail import log_priors
from tgt_fast.train import TGTObjective

HIDDEN: Final = 24  # of the student, before its last layer


class Features:
    """What the last layers of student and labeler are given."""

    def __init__(self, kitchen: Kitchen) -> None:
        self.labeler: Any = kitchen.teacher.labeler
        assert isinstance(self.labeler, nn.Sequential)
        self.maps = next(place for place, layer in enumerate(self.labeler) if isinstance(layer, nn.Flatten))

    def __call__(self, student: Any, x: Tensor, *, maps: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student's features and logits, then the labeler's; with ``maps`` its features are (B, channels, 2, 2)."""
        hidden = student[:-1](x)
        with torch.no_grad():
            theirs = self.labeler[: self.maps](x)
            logits = self.labeler[self.maps :](theirs)
        return hidden, student[-1](hidden), theirs if maps else theirs.flatten(1), logits


class With:
    """Cross-entropy with the labels, distillation if it is kept, and ``weight`` times a loss of logits or features."""

    def __init__(
        self, kitchen: Kitchen, loss: Callable[[int], Any], weight: float, *, beside: bool, of: str = "logits"
    ) -> None:
        self.features = Features(kitchen)
        width = models.labeler(kitchen.settings.labeler_width)[-1].in_features
        assert isinstance(width, int)
        self.loss, self.weight, self.of = loss(width), weight * kitchen.factor, of
        self.base = loss_of(kitchen, soft_weight=1.0 if beside else 0.0)

    def parameters(self) -> list[nn.Parameter]:
        """Of the loss, which are trained with the student."""
        return list(self.loss.parameters())

    def __call__(self, student: nn.Module, x: Tensor, y: Tensor, /, **_: Any) -> Mapping[str, Any]:
        ours, logits, theirs, opinions = self.features(student, x, maps=self.of == "maps")
        pair = (logits, opinions) if self.of == "logits" else (ours, theirs)
        return {"loss": self.base(logits, opinions, y) + self.weight * self.loss(*pair, y)}


def _instead(label: str, loss: Callable[..., Any], weight: float = 1.0) -> Recipe:
    def objective(kitchen: Kitchen) -> Any:
        return With(kitchen, lambda width: loss(), weight, beside=False)

    return Recipe("instead of the KL divergence", label, objective)


def _beside(label: str, loss: Callable[..., Any], weight: float, of: str = "logits", sized: bool = False) -> Recipe:
    def objective(kitchen: Kitchen) -> Any:
        return With(kitchen, loss if sized else lambda width: loss(), weight, beside=True, of=of)

    return Recipe("beside the KL divergence", label, objective)


def _projection(width: int) -> nn.Module:
    return nn.Linear(HIDDEN, width)


def _to_maps(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, width), nn.Unflatten(1, (width // 4, 2, 2)))


def _option(label: str, **options: Any) -> Recipe:
    """The distillation loss with other options."""

    def objective(kitchen: Kitchen) -> Any:
        return TGTObjective(kitchen.teacher, None, loss=loss_of(kitchen, **options))

    return Recipe("options of the distillation loss", label, objective)


def _biased(kitchen: Kitchen) -> Any:
    """Logit adjustment of student and teacher, in the soft and the hard term."""
    prior = log_priors(kitchen.counts).float()
    return TGTObjective(kitchen.teacher, None, loss=loss_of(kitchen, student_bias=prior, teacher_bias=prior))


LOSS_RECIPES: Final[dict[str, Recipe]] = {
    "reverse-kl": _option("reverse KL", divergence="reverse_kl"),
    "jsd": _option("Jensen-Shannon", divergence="jsd"),
    "standardized": _option("logit standardisation", standardize=True),
    "decoupled": _option("decoupled (DKD)", decoupled=(1.0, 8.0)),
    "skew": _option("skew KL", skew=0.1),
    "corrected": _option("label-corrected teacher", correct_teacher=0.2),
    "biased": Recipe("options of the distillation loss", "both sides' logits adjusted", _biased),
    "dist": _instead("DIST", losses.DIST, 2.0),
    "nkd": _instead("NKD", losses.NKD),
    "wttm": _instead("WTTM", losses.WTTM, 2.0),
    "gdkd": _instead("GDKD", losses.GDKD),
    "bild": _instead("BiLD", losses.BiLD),
    "topk-reverse-kl": _instead("reverse KL on the student's top classes", partial(losses.TopKReverseKL, k=5)),
    "symmetric-ce": _instead("symmetric cross-entropy", losses.SymmetricCE),
    "mlkd-class": _beside("MLKD, classes", losses.MLKDClass, 0.003),
    "mlkd-batch": _beside("MLKD, batch", losses.MLKDBatch, 0.1),
    "rkd-distance": _beside("RKD, distances", losses.RKDDistance, 1.0, "features"),
    "rkd-angle": _beside("RKD, angles", losses.RKDAngle, 1.0, "features"),
    "similarity": _beside("similarity-preserving", losses.SimilarityPreserving, 10.0, "features"),
    "embedding": _beside(
        "embedding distillation",
        lambda width: losses.EmbeddingDistillation(projection=_projection(width)),
        1.0,
        "features",
        sized=True,
    ),
    "fitnets": _beside("FitNets", lambda width: losses.FitNets(projection=_to_maps(width)), 1.0, "maps", sized=True),
}
