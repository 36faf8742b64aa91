"""TGTLoss by the protocol of torchtitan's losses: what it takes from there is a stand-in."""

from __future__ import annotations

import importlib
import sys
import types
from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, DependencyError

T, V, H = 12, 20, 8


class BaseLoss(ABC):  # noqa: B024, as there
    @dataclass(kw_only=True, slots=True)
    class Config:
        pass


@pytest.fixture
def loss_type(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    names = ("torchtitan", "torchtitan.components", "torchtitan.components.loss")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules[names[-1]], "BaseLoss", BaseLoss, raising=False)
    sys.modules.pop("tgt_fast.integrations.torchtitan", None)
    yield importlib.import_module("tgt_fast.integrations.torchtitan").TGTLoss
    sys.modules.pop("tgt_fast.integrations.torchtitan", None)


def case() -> tuple[Tensor, Tensor, nn.Linear, nn.Linear, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, V, (T,))
    labels[::4] = -100
    head, teacher_head = nn.Linear(H, V, bias=False), nn.Linear(2 * H, V)
    return torch.randn(T, H, requires_grad=True), torch.randn(T, 2 * H), head, teacher_head, labels


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_sum_over_global_tokens_in_both_forms_and_in_chunks(loss_type: Any, divergence: str) -> None:
    hidden, teacher_hidden, head, teacher_head, labels = case()
    said = teacher_head(teacher_hidden).detach()
    tokens = torch.tensor(31)  # of all processes
    options = {"temperature": 2.0, "reduction": "sum", "divergence": divergence}
    expected = tgt.distillation_loss(head(hidden), said, labels, hard_weight=1.0, **options) / tokens
    (d_hidden, d_head) = torch.autograd.grad(expected, (hidden, head.weight))
    soft = tgt.distillation_loss(head(hidden), said, labels, **options) / tokens

    leaf = loss_type(loss_type.Config(divergence=divergence))
    on_logits = leaf(head(hidden), labels, tokens, teacher_logits=said, positions=None)
    chunks = [
        leaf(head(h), y, tokens, teacher_logits=t)
        for h, y, t in zip(hidden.chunk(3), labels.chunk(3), said.chunk(3), strict=True)
    ]
    whole = loss_type(loss_type.Config(divergence=divergence))
    whole.set_lm_head(head)
    whole.set_teacher_head(teacher_head.weight, teacher_head.bias)
    on_hidden = whole(hidden, labels, tokens, teacher_hidden=teacher_hidden)
    for loss, metrics in (on_logits, on_hidden, (sum(one for one, _ in chunks), None)):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        grads = torch.autograd.grad(loss, (hidden, head.weight), retain_graph=True)
        torch.testing.assert_close(grads, (d_hidden, d_head), rtol=1e-4, atol=1e-6)
        if metrics is not None:
            torch.testing.assert_close(metrics["soft"].float(), soft.detach(), rtol=1e-5, atol=1e-6)
            assert float(metrics["soft"] + metrics["hard"]) == pytest.approx(loss.item(), rel=1e-5)
            assert not metrics["hard"].requires_grad
    alone, _ = leaf(head(hidden), labels, teacher_logits=said)
    torch.testing.assert_close(alone, expected * tokens)


def test_a_record_of_the_teacher_and_what_is_refused(loss_type: Any) -> None:
    hidden, teacher_hidden, head, teacher_head, labels = case()
    record = tgt.topk_teacher(teacher_head(teacher_hidden).detach(), k=4, temperature=2.0)
    whole, leaf = loss_type(loss_type.Config()), loss_type(loss_type.Config())
    whole.set_lm_head(head)
    found = whole(hidden, labels, torch.tensor(9.0), teacher_logits=record)[0]
    torch.testing.assert_close(found, leaf(head(hidden), labels, torch.tensor(9.0), teacher_logits=record)[0])
    with pytest.raises(ArgumentError, match="teacher_logits or teacher_hidden"):
        leaf(head(hidden), labels)
    with pytest.raises(ArgumentError, match="set_teacher_head"):
        leaf(head(hidden), labels, teacher_hidden=teacher_hidden)


def test_without_torchtitan_it_says_what_is_missing() -> None:
    if importlib.util.find_spec("torchtitan") is not None:
        pytest.skip("torchtitan is here")
    with pytest.raises(DependencyError, match="needs torchtitan"):
        importlib.import_module("tgt_fast.integrations.torchtitan")
