"""A teacher's head that gets a gradient is named, once."""

from __future__ import annotations

import warnings

import pytest
import torch

import tgt_fast as tgt
from tgt_fast.ops import _linear_arguments


@pytest.fixture(autouse=True)
def _unwarned(monkeypatch):
    monkeypatch.setattr(_linear_arguments, "_warned_of_trained_teacher", False, raising=False)


def _loss(teacher_weight, teacher_bias=None):
    hidden, weight = torch.ones(2, 3, requires_grad=True), torch.eye(4, 3, requires_grad=True)
    return tgt.linear_distillation_loss(hidden, weight, torch.ones(2, 5), teacher_weight, teacher_bias=teacher_bias)


def test_a_trained_teacher_head_is_named_once_and_keeps_its_gradient():
    head = torch.eye(4, 5, requires_grad=True)
    with pytest.warns(UserWarning, match=r"teacher_weight\.detach\(\)"):
        loss = _loss(head)
    loss.backward()
    assert head.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _loss(head)


def test_a_trained_teacher_bias_is_named():
    with pytest.warns(UserWarning, match=r"teacher_bias\.detach\(\)"):
        _loss(torch.eye(4, 5), torch.zeros(4, requires_grad=True))


def test_a_detached_head_and_a_call_without_gradients_are_silent():
    head = torch.eye(4, 5, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _loss(head.detach())
        with torch.no_grad():
            _loss(head)


def test_both_docstrings_state_that_only_one_loss_carries_the_squared_temperature():
    assert "contrastive_distillation_loss" in (tgt.distillation_loss.__doc__ or "")
    assert "temperature ** 2" in (tgt.contrastive_distillation_loss.__doc__ or "")
