"""A target beside ``hard_weight=0``: it says which rows count, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import logits
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError
from tgt_fast.ops import _distill_arguments

S, T, W = logits(6, 5, 0), logits(6, 5, 1), logits(5, 5, 2)
TARGET = torch.tensor([0, -100, 4, -1, 2, -100])
KEPT = TARGET != -100


def _dense(student: Tensor, name: str, **options: Any) -> Any:
    return tgt.distillation_loss(student, T, backend=name, **options)


def _record(student: Tensor, name: str, **options: Any) -> Any:
    return tgt.distillation_loss(student, tgt.topk_teacher(T, 2), backend=name, **options)


def _linear(student: Tensor, name: str, **options: Any) -> Any:
    return tgt.linear_distillation_loss(student, W, teacher_logits=T, backend=name, **options)


LOSSES = [_dense, _record, _linear]
Loss = Callable[..., Any]


def with_gradient(loss: Loss, name: str, **options: Any) -> tuple[Tensor, Tensor]:
    student = S.clone().requires_grad_()
    made = loss(student, name, **options)
    return made.detach(), torch.autograd.grad(made.sum(), student)[0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_rows_are_dropped_and_unlabelled_ones_kept(host_backend: str, loss: Loss, reduction: str) -> None:
    made = with_gradient(loss, host_backend, target=TARGET, reduction=reduction)
    wanted = with_gradient(loss, host_backend, sample_weight=KEPT.float(), reduction=reduction)
    for ours, theirs in zip(made, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(made[1], with_gradient(loss, host_backend, reduction=reduction)[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_indices_of_the_callers_own(host_backend: str, loss: Loss) -> None:
    """Also where both are the same one: the row is dropped, as with a hard term."""
    wanted = with_gradient(loss, host_backend, sample_weight=(TARGET != 4).float())
    own = torch.where(TARGET == -100, -7, TARGET)
    for unlabeled, target in ((-7, torch.where(own == -1, -7, own)), (4, TARGET.clamp_min(0))):
        made = with_gradient(loss, host_backend, target=target, ignore_index=4, unlabeled_index=unlabeled)
        for ours, theirs in zip(made, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("loss", [_dense, _linear])
def test_statistics_know_the_dropped_rows(host_backend: str, loss: Loss) -> None:
    _, stats = loss(S, host_backend, target=TARGET, return_stats=True)
    _, wanted = loss(S, host_backend, sample_weight=KEPT.float(), return_stats=True)
    for ours, theirs in zip(stats, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_label_whose_class_is_impossible_does_no_harm(host_backend: str, loss: Loss) -> None:
    student = S.clone()
    if loss is not _linear:
        student[0, 0] = -torch.inf
    assert torch.isnan(loss(student, host_backend, target=TARGET, reduction="none")).sum() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_out_of_range_are_refused_as_with_a_hard_term(host_backend: str, loss: Loss) -> None:
    for label in (-2, 5):
        with pytest.raises(ArgumentError, match=rf"target\[2\] = {label}"):
            loss(S, host_backend, target=torch.tensor([0, 1, label, 0, 0, 0]))


@pytest.mark.parametrize("loss", LOSSES)
def test_through_the_dispatcher(loss: Loss) -> None:
    compiled = torch.compile(lambda s, t: loss(s, "auto", target=t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(S, TARGET), loss(S, "auto", target=TARGET))


def test_modules_pass_it_on() -> None:
    wanted = tgt.distillation_loss(S, T, sample_weight=KEPT.float())
    torch.testing.assert_close(tgt.DistillationLoss()(S, T, TARGET), wanted)
    linear = tgt.LinearDistillationLoss()(S, W, teacher_logits=T, target=TARGET)
    torch.testing.assert_close(linear, _linear(S, "auto", target=TARGET))


def maps(*, channels_last: bool = False, height: int = 4) -> Tensor:
    made = logits(2 * height * 4, 5, 0).reshape(2, 5, height, 4)
    return made.to(memory_format=torch.channels_last) if channels_last else made


@pytest.mark.parametrize("given", [maps(), maps(channels_last=True, height=3)], ids=["square", "channels last"])
def test_maps_without_labels_warn_once(given: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_distill_arguments, "_warned_of_maps", False)
    with pytest.warns(UserWarning, match=r"maps.*class_dim=1") as caught:
        tgt.distillation_loss(given, given)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tgt.distillation_loss(given, given)


def test_maps_as_they_should_come_do_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_distill_arguments, "_warned_of_maps", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (maps().movedim(1, -1), maps(channels_last=True).movedim(1, -1), logits((2, 3, 4), 5, 0)):
            tgt.distillation_loss(given, given)
