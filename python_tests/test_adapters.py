"""Heads and tables under adapters of PEFT: what a weight leaves out is named, and is there where a layer is given."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast.ops import _heads

HIDDEN, CLASSES = 6, 11
X = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
TEACHER = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, HIDDEN)
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, CLASSES, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.body(x))
        return logits


@pytest.fixture(autouse=True)
def _unsearched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("peft")  # seconds, of each process that merely collects tests if it stood above
    monkeypatch.setattr(_heads, "_looked_for", set())
    yield
    gc.collect()


def adapted(*targets: str, tied: bool = False) -> Any:
    """The model under LoRA, whose adapters are not the zeros that they begin as."""
    import peft

    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        model = peft.get_peft_model(Model(tied=tied), peft.LoraConfig(target_modules=list(targets), r=2))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
    return model.base_model.model


def loss_of(model: Any, weight: Tensor, **teacher: Tensor) -> Tensor:
    teacher = teacher or {"teacher_logits": TEACHER}
    return tgt.linear_distillation_loss(model.body(X), weight, **teacher)  # type: ignore[arg-type]


def test_a_head_under_lora_is_named_once_and_the_advice_trains_it() -> None:
    model = adapted("lm_head", "body")
    head = model.lm_head
    with pytest.warns(
        UserWarning, match=r"student_weight is the weight under the adapters \['default'\].*nor trains"
    ) as seen:
        loss_of(model, head.weight).backward()
    advice = str(seen[0].message).split("student_weight=")[1].split(", head being")[0]
    adapter = [p for name, p in head.named_parameters() if "lora_" in name]
    assert all(p.grad is None for p in adapter)  # which is why
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model, head.weight)  # said once
        weight = eval(advice, {"head": head})
        loss = loss_of(model, weight)
        expected = tgt.distillation_loss(model(X), TEACHER)
        torch.testing.assert_close(loss, expected)
        made = torch.autograd.grad(loss, adapter)
        for mine, theirs in zip(made, torch.autograd.grad(expected, adapter), strict=True):
            torch.testing.assert_close(mine, theirs)
            assert mine.abs().sum() > 0


def test_a_detached_weight_and_a_teachers_head_are_found_too() -> None:
    teacher = adapted("lm_head")
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    own, hidden = torch.randn(CLASSES, HIDDEN, requires_grad=True), teacher.body(X)
    with pytest.warns(UserWarning, match=r"teacher_weight is the weight under the adapters"):
        tgt.linear_distillation_loss(X, own, hidden, teacher.lm_head.weight.detach())


@pytest.mark.parametrize("case", ["no adapter on it", "tied", "off", "merged", "self-distillation", "trained base"])
def test_heads_whose_weight_is_all_there_is_are_silent(case: str) -> None:
    model = adapted(
        *(["embed"] if case == "tied" else ["body"] if case == "no adapter on it" else ["lm_head"]), tied=case == "tied"
    )
    head = model.lm_head
    if case == "off":
        head.enable_adapters(False)
    if case == "merged":
        head.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if case == "self-distillation":  # the model without its adapters teaches the one with them
            effective = head.weight + head.get_delta_weight("default")
            loss_of(model, effective, teacher_hidden=X, teacher_weight=head.weight)
        elif case == "trained base":
            loss_of(model, nn.Parameter(head.weight.clone()))
        else:
            loss_of(model, head.weight)


def test_the_search_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted("lm_head")
    searches = []
    monkeypatch.setattr(_heads, "_layers_on", lambda weight: searches.append(1) or [])
    kept = []
    for _ in range(50):  # memory that moves at each step
        kept.append(torch.randn(CLASSES, HIDDEN))
        tgt.linear_distillation_loss(X, kept[-1], teacher_logits=TEACHER)
    assert len(searches) == 16


def test_a_table_under_adapters_is_the_layers_own() -> None:
    model = adapted("embed")
    layer = model.embed
    every = torch.arange(CLASSES)
    torch.testing.assert_close(_heads.with_adapters(layer, layer.weight), layer(every))
    layer.enable_adapters(False)
    assert _heads.with_adapters(layer, layer.weight) is layer.weight
    plain = nn.Embedding(3, 2)
    assert _heads.with_adapters(plain, plain.weight) is plain.weight


def test_a_student_under_lora_reads_relaxed_texts_with_its_own_table() -> None:
    pytest.importorskip("transformers")
    import peft
    import text_kit

    student = text_kit.distilbert()
    under = peft.get_peft_model(student, peft.LoraConfig(target_modules=["word_embeddings"], r=2))
    layer = under.get_input_embeddings()
    nn.init.normal_(layer.lora_embedding_B["default"])
    teacher, _ = text_kit.text_teacher(text_kit.KINDS[1])
    side = teacher._generator.sides[1]
    side.embedding = layer
    layer.eval()
    everything = torch.arange(layer.weight.shape[0])
    torch.testing.assert_close(side._weight(), layer(everything).detach())


def test_a_head_inside_a_transform_is_passed_over() -> None:
    """It has no address by which a layer could be told."""
    weight = Model().lm_head.weight.detach()

    def loss(x: Tensor) -> Tensor:
        made: Tensor = tgt.linear_distillation_loss(x, weight, teacher_logits=TEACHER)
        return made

    leaf = X.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(X), torch.autograd.grad(loss(leaf), leaf)[0])
    inside = torch.func.grad(lambda head: tgt.linear_distillation_loss(X, head, teacher_logits=TEACHER))(weight)
    head = weight.clone().requires_grad_()
    outside = tgt.linear_distillation_loss(X, head, teacher_logits=TEACHER)
    torch.testing.assert_close(inside, torch.autograd.grad(outside, head)[0])
