"""Recipes of losses: those that take the soft term's place, and those that stand beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from tgt_fast import losses
from tgt_fast.demos.digits import models
from tgt_fast.demos.digits.recipe import Kitchen, Number, Recipe, loss_of
from tgt_fast.long_tail import log_priors
from tgt_fast.train import TGTObjective

HIDDEN: Final = 24  # of the student, before its last layer


class Features:
    """What the last layers of student and labeler are given, or the labeler's maps before its last convolution."""

    def __init__(self, kitchen: Kitchen) -> None:
        self.labeler: Any = kitchen.teacher.labeler
        assert isinstance(self.labeler, nn.Sequential)
        self.flatten = next(place for place, layer in enumerate(self.labeler) if isinstance(layer, nn.Flatten))

    def __call__(self, student: Any, x: Tensor, *, of: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student's features and logits, then the labeler's.

        Args:
            of: "features"; "maps", the labeler's (B, channels, 2, 2); or "hint", (B, channels, 4, 4).
        """
        hidden, place = student[:-1](x), self.flatten - (2 if of == "hint" else 0)
        with torch.no_grad():
            theirs = self.labeler[:place](x)
            logits = self.labeler[place:](theirs)
        return hidden, student[-1](hidden), theirs.flatten(1) if of == "features" else theirs, logits


class With:
    """Cross-entropy with the labels and distillation, where they are kept, and a weight times a further loss.

    Args:
        loss: makes it, given the number of the labeler's features.
        of: what it compares, "logits" or one of those of :class:`Features`.
        hard, soft: whether the cross-entropy, and the distillation, are kept.
    """

    def __init__(
        self, kitchen: Kitchen, loss: Callable[[int], Any], weight: float, of: str, *, hard: bool, soft: bool
    ) -> None:
        self.features = Features(kitchen)
        width = models.labeler(kitchen.settings.labeler_width)[-1].in_features
        assert isinstance(width, int)
        self.loss, self.weight, self.of = loss(width), weight, of
        self.base = loss_of(kitchen, float(hard), soft_weight=float(soft)) if hard or soft else None

    def parameters(self) -> list[nn.Parameter]:
        """Of the loss, which are trained with the student."""
        return list(self.loss.parameters())

    def __call__(self, student: nn.Module, x: Tensor, y: Tensor, /, **_: Any) -> Mapping[str, Any]:
        of = "features" if self.of == "logits" else self.of
        ours, logits, theirs, opinions = self.features(student, x, of=of)
        pair = (logits, opinions) if self.of == "logits" else (ours, theirs)
        found = self.weight * self.loss(*pair, y)
        return {"loss": found if self.base is None else found + self.base(logits, opinions, y)}


def _around(value: float) -> tuple[float, ...]:
    return tuple(float(f"{value * factor:.1g}") for factor in (0.3, 1, 3))


def _instead(label: str, loss: Callable[[], Any], chosen: float, middle: float = 1.0) -> Recipe:
    def objective(kitchen: Kitchen) -> Any:
        return With(kitchen, lambda width: loss(), kitchen.number, "logits", hard=True, soft=False)

    number = Number("weight", chosen, _around(middle))
    return Recipe("instead of the KL divergence", label, objective, number=number)


def _beside(
    label: str, loss: Callable[..., Any], chosen: float, middle: float, of: str = "logits", sized: bool = False
) -> Recipe:
    def objective(kitchen: Kitchen) -> Any:
        made = loss if sized else lambda width: loss()
        return With(kitchen, made, kitchen.number, of, hard=True, soft=True)

    return Recipe("beside the KL divergence", label, objective, number=Number("weight", chosen, _around(middle)))


def _projection(width: int) -> nn.Module:
    return nn.Linear(HIDDEN, width)


def _to_hint(width: int) -> nn.Module:
    """The student's features to maps of as many channels as the labeler's last ones, in 4 x 4 places."""
    return nn.Sequential(nn.Linear(HIDDEN, 4 * width), nn.Unflatten(1, (width // 4, 4, 4)))


class _InPlaces(losses.AttentionTransfer):
    """The student's features, which are in no places, taken as six channels of 2 x 2."""

    def prepare(self, student: Tensor) -> Tensor:
        return student.reshape(-1, HIDDEN // 4, 2, 2)


def _listwise(kitchen: Kitchen) -> Any:
    """Alone: it has the label in it."""
    loss = losses.ListwiseDistillationLoss(kitchen.number)
    return With(kitchen, lambda width: loss, 1.0, "logits", hard=False, soft=False)


_OPTION: Final = "options of the distillation loss"


def _option(label: str, number: Number, options: Callable[[float], dict[str, Any]]) -> Recipe:
    """The distillation loss with other options, which depend on the number."""

    def objective(kitchen: Kitchen) -> Any:
        return TGTObjective(kitchen.teacher, None, loss=loss_of(kitchen, **options(kitchen.number)))

    return Recipe(_OPTION, label, objective, number=number)


def _biased(kitchen: Kitchen) -> Any:
    """Logit adjustment of student and teacher, in the soft and the hard term."""
    prior = log_priors(kitchen.counts, kitchen.number).float()
    return TGTObjective(kitchen.teacher, None, loss=loss_of(kitchen, student_bias=prior, teacher_bias=prior))


def _at(temperature: float) -> Number:
    return Number("temperature", temperature, (1.0, 2.0, 4.0))


LOSS_RECIPES: Final[dict[str, Recipe]] = {
    "reverse-kl": _option("reverse KL", _at(2.0), lambda n: {"divergence": "reverse_kl", "temperature": n}),
    "jsd": _option("Jensen-Shannon", _at(2.0), lambda n: {"divergence": "jsd", "temperature": n}),
    "standardized": _option(  # logits of deviation 1 have a temperature of their own
        "logit standardisation", Number("soft weight", 1.0, (1.0, 3.0, 9.0)),
        lambda n: {"standardize": True, "temperature": 2.0, "soft_weight": n},
    ),
    "decoupled": _option(
        "decoupled (DKD)", Number("weight of the others", 8.0, (0.5, 2.0, 8.0)), lambda n: {"decoupled": (1.0, n)}
    ),
    "skew": _option("skew KL", Number("skew", 0.1, (0.03, 0.1, 0.3)), lambda n: {"skew": n}),
    "corrected": _option(
        "label-corrected teacher", Number("threshold", 0.2, (0.05, 0.2, 0.5)), lambda n: {"correct_teacher": n}
    ),
    "biased": Recipe(_OPTION, "both sides' logits adjusted", _biased, number=Number("tau", 1.0, (0.25, 0.5, 1.0))),
    "dist": _instead("DIST", losses.DIST, 0.6, 2.0),
    "nkd": _instead("NKD", losses.NKD, 3.0),
    "wttm": _instead("WTTM", losses.WTTM, 6.0, 2.0),
    "gdkd": _instead("GDKD", losses.GDKD, 0.3),
    "listwise": Recipe(
        "instead of the KL divergence", "listwise (Plackett-Luce)", _listwise,
        number=Number("teacher's temperature", 1.0, (1.0, 2.0, 4.0)),
    ),
    "bild": _instead("BiLD", losses.BiLD, 0.3),
    "topk-reverse-kl": _instead("reverse KL on the student's top classes", partial(losses.TopKReverseKL, k=5), 1.0),
    "symmetric-ce": _instead("symmetric cross-entropy", losses.SymmetricCE, 0.3),
    "margin-mse": _instead("MarginMSE between classes", losses.MarginMSE, 0.03, 0.1),
    "mlkd-class": _beside("MLKD, classes", losses.MLKDClass, 0.003, 0.003),
    "mlkd-batch": _beside("MLKD, batch", losses.MLKDBatch, 0.1, 0.1),
    "rkd-distance": _beside("RKD, distances", losses.RKDDistance, 1.0, 1.0, "features"),
    "rkd-angle": _beside("RKD, angles", losses.RKDAngle, 1.0, 1.0, "features"),
    "similarity": _beside("similarity-preserving", losses.SimilarityPreserving, 10.0, 10.0, "features"),
    "embedding": _beside(
        "embedding distillation", lambda width: losses.EmbeddingDistillation(projection=_projection(width)),
        1.0, 1.0, "features", sized=True,
    ),
    "fitnets": _beside(
        "FitNets", lambda width: losses.FitNets(projection=_to_hint(width)), 0.3, 1.0, "hint", sized=True
    ),
    "attention": _beside("attention transfer", _InPlaces, 3.0, 10.0, "maps"),
}  # fmt: skip
