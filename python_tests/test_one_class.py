"""A single class: its probability is 1 whatever the logit, so a loss over it teaches nothing. Losses say so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.errors import ShapeError
from tgt_fast.kernels.options import DIVERGENCES

S, T = torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5], [3.0]])
Y = torch.tensor([0, 0])
HIDDEN, HEAD = torch.ones(2, 3), torch.ones(1, 3)


def dense(**options: Any) -> Tensor:
    return tgt.distillation_loss(S, T, **options)


def module(**options: Any) -> Tensor:
    target = options.pop("target", None)
    return tgt.DistillationLoss(**options)(S, T, target)


def topk(**options: Any) -> Tensor:
    return tgt.distillation_loss(S, tgt.topk_teacher(T, 1), **options)


def linear(**options: Any) -> Tensor:
    return tgt.linear_distillation_loss(HIDDEN, HEAD, HIDDEN, HEAD, **options)


def linear_topk(**options: Any) -> Tensor:
    return tgt.linear_distillation_loss(HIDDEN, HEAD, teacher_logits=tgt.topk_teacher(T, 1), **options)


def linear_shared(**options: Any) -> Tensor:
    return tgt.linear_distillation_loss(HIDDEN, torch.ones(4, 3), HIDDEN, torch.ones(3, 3), vocab_size=1, **options)


def linear_mapped(**options: Any) -> Tensor:
    mapped = torch.tensor([2])
    return tgt.linear_distillation_loss(HIDDEN, torch.ones(4, 3), HIDDEN, HEAD, vocab_map=mapped, **options)


LOSSES = [dense, module, topk, linear, linear_topk, linear_shared, linear_mapped]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_a_distribution_over_one_class_is_refused_with_what_to_do(loss: Any, none_chosen: str) -> None:
    with pytest.raises(ShapeError, match=r"one class.*regression.*divergence='mse'.*binary.*torch\.cat"):
        loss(backend=none_chosen)
    with pytest.raises(ShapeError, match="one class"):
        loss(target=Y, hard_weight=1.0, soft_weight=0.0, backend=none_chosen)


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "mse"])
def test_every_divergence_of_distributions_is_refused(divergence: str) -> None:
    with pytest.raises(ShapeError, match=divergence):
        dense(divergence=divergence)


def test_a_compiled_call_is_refused_too() -> None:
    with pytest.raises(Exception, match="one class"):
        torch.compile(tgt.distillation_loss, backend="eager", fullgraph=True)(S, T)


def test_what_the_message_advises_works(backend: str) -> None:
    assert dense(divergence="mse", backend=backend).item() == pytest.approx(((S - T) ** 2).mean().item())
    assert linear(divergence="mse", backend=backend).item() == 0.0
    with pytest.raises(ShapeError, match="cross-entropy of the target is 0"):
        dense(divergence="mse", target=Y, hard_weight=1.0, backend=backend)
    student, teacher = (torch.cat([torch.zeros_like(z), z], -1) for z in (S, T))
    p, q = teacher.sigmoid()[:, 1], student.sigmoid()[:, 1]
    binary = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert tgt.distillation_loss(student, teacher, backend=backend).item() == pytest.approx(
        binary.mean().item(), rel=1e-5
    )


def test_losses_that_are_0_for_want_of_anything_to_compare_warn() -> None:
    q = torch.ones(1, 3)
    with pytest.warns(UserWarning, match="one passage.*drop_last"):
        tgt.contrastive_distillation_loss(q, q, q, q, temperature=1.0)
    student, teacher = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, 2.0, 3.0]])
    with pytest.warns(UserWarning, match="one class a row.*bucket"):
        loss = tgt.distillation_loss(student, tgt.topk_teacher(teacher, 1, tail="renormalize"))
    assert loss.item() == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tgt.contrastive_distillation_loss(q, q.repeat(2, 1), q, q.repeat(2, 1), temperature=1.0)
        tgt.distillation_loss(student, tgt.topk_teacher(teacher, 1))
        tgt.distillation_loss(student, tgt.topk_teacher(teacher, 2, tail="renormalize"))
