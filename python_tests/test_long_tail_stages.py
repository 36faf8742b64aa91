"""Second stages of decoupled training, and MixUp between latents."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, CheckpointError, ShapeError
from tgt_fast.long_tail import ClassifierRetraining, LatentMixUp, LearnableWeightScaling, tau_normalize


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_tau_normalisation(tau: float) -> None:
    head = nn.Linear(6, 3)
    made = tau_normalize(head, tau)
    weight = head.weight.detach().double()
    expected = torch.stack([row / row.square().sum().sqrt() ** tau for row in weight])
    torch.testing.assert_close(made.weight.double(), expected, rtol=1e-6, atol=1e-7)
    assert made.bias is None
    assert made.weight.requires_grad
    if tau == 1:
        torch.testing.assert_close(made.weight.norm(dim=1), torch.ones(3))
    if tau == 0:
        assert torch.equal(made.weight, head.weight)


def test_tau_normalisation_by_hand_and_of_nothing() -> None:
    head = nn.Linear(2, 2).bfloat16()
    head.weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).bfloat16()
    made = tau_normalize(head)
    assert made.weight.dtype == torch.bfloat16
    torch.testing.assert_close(made.weight.float(), torch.tensor([[0.6, 0.8], [0.0, 0.0]]), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("kind", [ClassifierRetraining, LearnableWeightScaling])
def test_the_classifier_alone_learns(kind: Any) -> None:
    student, x = model(), torch.randn(8, 4)
    stage: Any = kind(student.train(), "3")
    before = {name: value.clone() for name, value in stage.state_dict().items()}
    optimizer = torch.optim.SGD(list(stage.trainable()), lr=0.1)
    stage.train()
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(stage(x), torch.arange(8) % 3))
        optimizer.step()
    changed = {name for name, value in stage.state_dict().items() if not torch.equal(value, before[name])}
    own = {ClassifierRetraining: {"model.3.weight", "model.3.bias"}, LearnableWeightScaling: {"model.3.scale"}}
    assert changed == own[kind]
    assert stage.training
    assert stage.head.training
    assert not stage.model[1].training
    assert all(parameter.requires_grad for parameter in student.parameters())  # the model itself is as it was


def test_retraining_begins_anew_and_scaling_where_it_was() -> None:
    student, x = model().eval(), torch.randn(8, 4)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    stages: list[Any] = [ClassifierRetraining(student, "3", seed=seed) for seed in (0, 0, 1)]
    first, second, other = stages
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert not torch.equal(first.head.weight, student.get_parameter("3.weight"))
    scaled: Any = LearnableWeightScaling(student, "3")
    assert torch.equal(scaled(x), student(x))
    with torch.no_grad():
        scaled.head.scale.copy_(torch.tensor([1.0, 2.0, -1.0]))
    torch.testing.assert_close(scaled(x), student(x) * torch.tensor([1.0, 2.0, -1.0]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tau_normalize(cast(Any, nn.Conv2d(1, 1, 1))), "nn.Linear"),
        (lambda: tau_normalize(nn.Linear(1, 1), -1.0), "tau"),
        (lambda: ClassifierRetraining(model(), "head"), "classifier must name"),
        (lambda: ClassifierRetraining(model(), "2"), "begin anew"),
        (lambda: ClassifierRetraining(cast(Any, len), "2"), "torch.nn.Module"),
        (lambda: LearnableWeightScaling(model(), "1"), "must be an nn.Linear"),
        (lambda: LatentMixUp(teacher(), alpha=0.0), "alpha"),
        (lambda: LatentMixUp(cast(Any, model())), "tgt_fast.Teacher"),
    ],
)
def test_refusals(call: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        call()


def teacher() -> tgt.Teacher:
    torch.manual_seed(0)
    return tgt.Teacher(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 3))


def test_mixup_lies_between_two_latents() -> None:
    frozen, x = teacher(), torch.randn(6, 8)
    mix = LatentMixUp(frozen, alpha=0.4, seed=3)
    made: Any = mix(x, sample_ids=torch.arange(10, 16), step=7)
    partner, share = mix.drawn(6, 7)
    z = frozen.encoder(x)
    for row in range(6):
        between = share[row] * z[row] + (1 - share[row]) * z[partner[row]]
        torch.testing.assert_close(made.latents.z[row], between.float())
    assert torch.equal(made.x, frozen.decode(made.latents))
    assert torch.equal(made.teacher_logits, frozen.label(made.x))
    assert made.anchor_ids.tolist() == list(range(10, 16))
    assert sorted(partner.tolist()) == list(range(6))
    assert 0 <= share.min() <= share.max() <= 1
    assert torch.equal(made.x, mix(x, step=7, latents=z).x)


def test_mixup_trains_and_goes_on(tmp_path: Any) -> None:
    frozen = teacher()
    mix = LatentMixUp(frozen)
    data = [(torch.arange(4), torch.randn(4, 8), torch.tensor([0, 1, 2, -1]))]
    student = nn.Linear(8, 3)
    objective: Any = tgt.TGTObjective(frozen, mix)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    tgt.fit(student, objective, data, optimizer=optimizer, steps=3, checkpoint_dir=tmp_path, progress=False)
    x = torch.randn(4, 8)
    first, state = mix(x).x, mix.state_dict()
    again = LatentMixUp(frozen, seed=9)
    again.load_state_dict(state)
    assert not torch.equal(first, mix(x).x)
    mix.load_state_dict(state)
    assert torch.equal(mix(x).x, again(x).x)
    with pytest.raises(CheckpointError):
        again.load_state_dict({"version": 1})


def test_mixup_refuses_latents_of_unequal_length() -> None:
    latents = tgt.Latents(torch.zeros(2, 3, 2), torch.ones(2, 3))
    with pytest.raises(ShapeError, match="mask"):
        LatentMixUp(teacher())(torch.zeros(2, 8), latents=latents)
