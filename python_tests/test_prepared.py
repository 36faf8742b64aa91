"""The teacher of a compiled exploration: folded and laid out for speed, the same function, and a copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast.explore import prepared
from tgt_fast.explore.prepared import Prepared
from tgt_fast.teacher import Latents

X = toys.normal(4, 1, 8, 8)


def convolutional(labeler: nn.Module | None = None) -> tgt.Teacher:
    def parts() -> nn.Module:
        decoder = nn.Sequential(nn.ConvTranspose2d(2, 1, 2, stride=2), nn.BatchNorm2d(1))
        judge = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(384, 3)
        )
        return nn.ModuleList([nn.Conv2d(1, 2, 2, stride=2), decoder, judge])

    made = list(toys.seeded(parts, 0))
    with torch.no_grad():
        for module in made[1].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.fill_(0.3)  # type: ignore[union-attr, operator]
    return tgt.Teacher(made[0], made[1], made[2] if labeler is None else labeler, prior="normal")


@pytest.fixture(autouse=True)
def _last_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which each form takes less time than the one before, so that what is chosen is no question of load."""
    ticks = iter(range(1, 10_000))
    monkeypatch.setattr(prepared, "_seconds", lambda form, given: 1.0 / next(ticks))


def test_batch_norms_are_folded_and_convolutions_lie_channels_last() -> None:
    teacher = convolutional()
    before = {name: tensor.clone() for name, tensor in enumerate(teacher.frozen_tensors())}
    ready = Prepared()
    made = ready(teacher, teacher.encode(X))
    assert made is not teacher
    z = teacher.encode(X).z
    assert torch.allclose(made.decode(z), teacher.decode(z), atol=1e-5)
    assert torch.allclose(made.label(X), teacher.label(X), atol=1e-5)
    for name in ("decoder", "labeler"):
        old, new = getattr(teacher, name), getattr(made, name)
        assert any(isinstance(module, nn.BatchNorm2d) for module in old.modules())
        assert not any(isinstance(module, nn.BatchNorm2d) for module in new.modules())
        assert any(f"{name}: 1 BatchNorms folded, channels last" in line for line in ready.report)
    convolution = next(module for module in made.labeler.modules() if isinstance(module, nn.Conv2d))  # type: ignore[attr-defined]
    assert not convolution.weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in enumerate(teacher.frozen_tensors()))
    assert ready(teacher, teacher.encode(X)) is made
    with torch.no_grad():
        next(teacher.frozen_tensors()).add_(1)
        teacher.labeler[0].weight.mul_(2)  # type: ignore[index]
    assert torch.allclose(ready(teacher, teacher.encode(X)).label(X), teacher.label(X), atol=1e-5)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return x[:, :3] if x.sum() > 0 else x[:, 3:6]


def test_what_cannot_be_prepared_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    labeler = nn.Sequential(nn.BatchNorm2d(1), Branching())
    teacher, ready = convolutional(labeler), Prepared()
    assert ready(teacher, teacher.encode(X)).labeler is labeler
    assert any(line.startswith("labeler: BatchNorms stay, fx cannot follow it: Trace") for line in ready.report)
    both = tgt.TeacherEnsemble({"a": teacher})
    assert ready(both, teacher.encode(X)) is both
    assert "TeacherEnsemble" in ready.report[0]
    function = convolutional()
    plain = tgt.Teacher(function.encoder, function.decoder, lambda x: function.labeler(x))
    assert ready(plain, teacher.encode(X)).labeler is plain.labeler
    monkeypatch.setattr(prepared, "_folded", lambda part: (nn.Sequential(part, nn.Flatten(), nn.ReLU()), 1))
    wrong = convolutional()
    assert ready(wrong, wrong.encode(X)).decoder is wrong.decoder  # a form that computes something else
    masked = Latents(toys.normal(4, 3, 2), torch.ones(4, 3, dtype=torch.bool))
    sequences = tgt.Teacher(toys.SequenceEncoder(), toys.SequenceDecoder(), toys.SequenceClassifier())
    assert ready(sequences, masked).decoder is sequences.decoder


@pytest.mark.parametrize("mode", ["random", "prior", "gradient"])
def test_a_compiled_sampler_says_what_it_did(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    options: dict[str, Any] = {"mode": mode, "sigma": 0.5, "units": "absolute"}
    teacher, student = convolutional(), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    fast = tgt.LatentSampler(teacher, compile=True, **options)
    assert fast.explain() == []
    expected, made = (sampler(X, student=student) for sampler in (tgt.LatentSampler(teacher, **options), fast))
    assert torch.allclose(made.x, expected.x, atol=1e-4)
    assert torch.allclose(made.teacher_logits, expected.teacher_logits, atol=1e-4)
    told = "\n".join(fast.explain())
    assert "labeler: 1 BatchNorms folded" in told
    assert "examples: one compiled graph" in told
    assert ("steps: one compiled graph" in told) == (mode == "gradient")
