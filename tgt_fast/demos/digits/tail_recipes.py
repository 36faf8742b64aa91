"""Recipes for the long tail: losses, sampling, second stages, and exploration that minds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from tgt_fast import long_tail
from tgt_fast.demos.digits import models
from tgt_fast.demos.digits.methods import Objective, sampler
from tgt_fast.demos.digits.recipe import Kitchen, Number, Recipe, WithHard, distillation, loss_of
from tgt_fast.train import TGTObjective

TAIL_POWER: Final = 0.25  # of the inverse counts, by which tail-aware exploration draws its anchors
TAIL_SIGMA: Final = 1.3  # of the rarest class, in units of the settings' sigma; between it and 1 for the others
REWEIGHT_FROM: Final = 0.8  # of the steps: the last fifth is re-weighted
STAGE_SHARE: Final = 0.2  # of the steps, that a second stage takes in addition


def explored(kitchen: Kitchen, hard_weight: float = 1.0, **options: Any) -> TGTObjective:
    """Random exploration; ``options`` of its sampler."""
    explorer = sampler("tgt-random", kitchen.teacher, kitchen.settings, kitchen.seed, **options)
    explorer.calibrate([(kitchen.images.x, kitchen.images.y)])
    return TGTObjective(kitchen.teacher, explorer, loss=loss_of(kitchen, hard_weight))


def tail_options(counts: Tensor, sigma: float, power: float = TAIL_POWER, most: float = TAIL_SIGMA) -> dict[str, Any]:
    """Anchors drawn by ``n_c ** -power``, and noise that grows from ``sigma`` to ``most`` times as much in the tail."""
    inverse = counts.clamp(min=1).double().reciprocal()
    rarity = (counts.max() * inverse).log() / (counts.max() * inverse.max()).log().clamp(min=1e-12)  # 0 .. 1
    return {"anchors": inverse**power, "sigma": sigma * most**rarity}


def tail_aware(kitchen: Kitchen, hard_weight: float = 1.0) -> TGTObjective:
    return explored(kitchen, hard_weight, **tail_options(kitchen.counts, kitchen.settings.sigma))


def adjusted(base: Callable[..., TGTObjective]) -> Callable[[Kitchen], Objective]:
    """With logit adjustment in the place of the hard term."""

    def made(kitchen: Kitchen) -> Objective:
        loss = long_tail.LogitAdjustmentLoss(kitchen.counts)
        return WithHard(base(kitchen, 0.0), lambda logits, y, step: loss(logits, y))

    return made


def _with_hard(hard: Callable[[Tensor, Kitchen], Callable[[Tensor, Tensor, int], Tensor]]) -> Callable[..., Objective]:
    def made(kitchen: Kitchen) -> Objective:
        base = TGTObjective(kitchen.teacher, None, loss=loss_of(kitchen, 0.0))
        return WithHard(base, hard(kitchen.counts, kitchen))

    return made


def _of_loss(make: Callable[[Tensor, float], Any]) -> Callable[..., Any]:
    def made(counts: Tensor, kitchen: Kitchen) -> Callable[[Tensor, Tensor, int], Tensor]:
        loss = make(counts, kitchen.number)
        return lambda logits, y, step: loss(logits, y)

    return made


def _deferred(counts: Tensor, kitchen: Kitchen) -> Callable[[Tensor, Tensor, int], Tensor]:
    loss = long_tail.LDAMLoss(counts, max_margin=kitchen.number)
    reweighting = long_tail.DeferredReweighting(counts, int(REWEIGHT_FROM * kitchen.settings.steps))

    def hard(cosines: Tensor, y: Tensor, step: int) -> Tensor:
        loss.class_weight = reweighting(step)
        found: Tensor = loss(cosines / loss.scale, y)  # the student's logits are scaled, for the soft term
        return found

    return hard


class _Scaled(long_tail.CosineClassifier):
    """Cosines times LDAM's scale, so that they serve as logits for the soft term, too."""

    def forward(self, x: Tensor) -> Tensor:
        return 30.0 * super().forward(x)


def _cosine_student() -> nn.Module:
    layers = list(models.student())
    head = layers[-1]
    assert isinstance(head, nn.Linear)
    return nn.Sequential(*layers[:-1], _Scaled(head.in_features, head.out_features))


def _post_hoc(student: nn.Module, kitchen: Kitchen) -> nn.Module:
    head = student.get_submodule("2")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.bias.copy_(head.bias - long_tail.log_priors(kitchen.counts, kitchen.number).to(head.bias.dtype))
    return student


def _normalized(student: nn.Module, kitchen: Kitchen) -> nn.Module:
    made = models.student()
    made.load_state_dict(student.state_dict())
    head = made[2]
    assert isinstance(head, nn.Linear)
    made[2] = long_tail.tau_normalize(head, kitchen.number)
    return made


def _stage(kind: Callable[..., Any]) -> Callable[[nn.Module, Kitchen], nn.Module]:
    """A second stage on class-balanced batches, by the distillation's own loss."""

    def after(student: nn.Module, kitchen: Kitchen) -> nn.Module:
        stage, images, settings = kind(student, "2"), kitchen.images, kitchen.settings
        steps = max(1, int(STAGE_SHARE * settings.steps))
        size = 2 * settings.real
        rows = long_tail.ClassBalancedSampler(images.y, num_samples=steps * size, seed=kitchen.seed)
        loss, optimizer = loss_of(kitchen), torch.optim.Adam(list(stage.trainable()), kitchen.number)
        stage.train()
        for some in torch.split(torch.tensor(list(rows)), size):
            x, y = images.x[some], images.y[some]
            optimizer.zero_grad()
            torch.autograd.backward(loss(stage(x), kitchen.teacher.label(x), y))  # type: ignore[arg-type]
            optimizer.step()
        return stage  # type: ignore[no-any-return]

    return after


def _mixed(kitchen: Kitchen) -> Objective:
    mix = long_tail.LatentMixUp(kitchen.teacher, alpha=kitchen.number, seed=kitchen.seed)
    return TGTObjective(kitchen.teacher, mix, loss=loss_of(kitchen))


_TAIL, _TGT = "long tail", "exploration"
_STAGE_RATES: Final = (1e-3, 3e-3, 1e-2)
TAIL_RECIPES: Final[dict[str, Recipe]] = {
    "logit-adjustment": Recipe(
        _TAIL,
        "logit adjustment",
        _with_hard(_of_loss(long_tail.LogitAdjustmentLoss)),
        number=Number("tau", 1.0, (0.5, 1.0, 2.0)),
    ),
    "post-hoc-adjustment": Recipe(
        _TAIL,
        "logit adjustment, post hoc",
        distillation,
        after=_post_hoc,
        number=Number("tau", 1.0, (0.5, 1.0, 2.0)),
    ),
    "balanced-softmax": Recipe(
        _TAIL, "balanced softmax", _with_hard(_of_loss(lambda counts, _: long_tail.BalancedSoftmaxLoss(counts)))
    ),
    "ldam-drw": Recipe(
        _TAIL,
        "LDAM-DRW, cosine classifier",
        _with_hard(_deferred),
        student=_cosine_student,
        number=Number("largest margin", 0.5, (0.05, 0.15, 0.5)),
    ),
    "effective-number": Recipe(
        _TAIL,
        "effective-number weights",
        _with_hard(
            _of_loss(
                lambda counts, beta: long_tail.LogitAdjustmentLoss(
                    counts, 0.0, class_weight=long_tail.effective_number_weights(counts, beta)
                )
            )
        ),
        number=Number("beta", 0.9999, (0.9, 0.99, 0.9999)),
    ),
    "class-balanced": Recipe(_TAIL, "class-balanced sampling", distillation, draw=long_tail.ClassBalancedSampler),
    "square-root": Recipe(_TAIL, "square-root sampling", distillation, draw=long_tail.SquareRootSampler),
    "crt": Recipe(
        _TAIL,
        "cRT",
        distillation,
        after=_stage(long_tail.ClassifierRetraining),
        number=Number("its rate", 1e-2, _STAGE_RATES),
    ),
    "lws": Recipe(
        _TAIL,
        "LWS",
        distillation,
        after=_stage(long_tail.LearnableWeightScaling),
        number=Number("its rate", 1e-2, _STAGE_RATES),
    ),
    "tau-norm": Recipe(
        _TAIL, "tau-normalisation", distillation, after=_normalized, number=Number("tau", 1.0, (0.25, 0.5, 1.0))
    ),
    "tgt-batch": Recipe(_TGT, "TGT, batch anchors", lambda k: explored(k, anchors="batch"), synthetic=True),
    "tgt-balanced": Recipe(_TGT, "TGT, balanced anchors", lambda k: explored(k, anchors="balanced"), synthetic=True),
    "tgt-tail": Recipe(_TGT, "TGT, tail-aware", tail_aware, synthetic=True),
    "tgt-batch-adjusted": Recipe(
        _TGT,
        "TGT, batch anchors, logit adjustment",
        adjusted(lambda kitchen, hard: explored(kitchen, hard, anchors="batch")),
        synthetic=True,
    ),
    "tgt-tail-adjusted": Recipe(_TGT, "TGT, tail-aware, logit adjustment", adjusted(tail_aware), synthetic=True),
    "latent-mixup": Recipe(
        _TGT, "MixUp between latents", _mixed, synthetic=True, number=Number("alpha", 1.0, (0.3, 1.0, 3.0))
    ),
}
