"""Settings that are changed after construction: they take effect, or the assignment is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from training_kit import make_data, make_student, make_teacher

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError

X, Y = make_data(8)
Call = Callable[[Any], Tensor]


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TARGET = torch.tensor([0, 1, 2, 1, 0, 3])


def dense(loss: Any) -> Tensor:
    made: Tensor = loss(logits(1, 6, 5), logits(2, 6, 5), TARGET if loss.hard_weight else None)
    return made


def linear(loss: Any) -> Tensor:
    hidden, heads = (logits(3, 6, 4), logits(4, 6, 3)), (logits(5, 5, 4), logits(6, 5, 3))
    made: Tensor = loss(hidden[0], heads[0], hidden[1], heads[1], TARGET if loss.hard_weight else None)
    return made


def contrast(loss: Any) -> Tensor:
    made: Tensor = loss(logits(7, 6, 4), logits(8, 7, 4), logits(9, 6, 3), logits(10, 7, 3))
    return made


START: dict[str, Any] = {"temperature": 2.0, "hard_weight": 0.5}
CHANGES: dict[str, Any] = {
    "divergence": "reverse_kl",
    "temperature": 1.0,
    "teacher_temperature": 3.0,
    "soft_weight": 0.25,
    "hard_weight": 2.0,
    "label_smoothing": 0.1,
    "reduction": "none",
}
ADJUSTED: dict[str, Any] = {"standardize": True, "decoupled": (1.0, 2.0), "skew": 0.2, "correct_teacher": 0.3}
INDICES: dict[str, Any] = {"ignore_index": 3, "unlabeled_index": 1}
HEADS: dict[str, Any] = {
    "student_scale": 2.0,
    "student_softcap": 1.0,
    "teacher_scale": 0.5,
    "teacher_softcap": 2.0,
    "vocab_size": 4,
}
LOSSES: list[tuple[Any, Call, dict[str, Any]]] = [
    (tgt.DistillationLoss, dense, {**CHANGES, **ADJUSTED, **INDICES}),
    (tgt.LinearDistillationLoss, linear, {**CHANGES, **ADJUSTED, **INDICES, **HEADS}),
    (tgt.ContrastiveDistillationLoss, contrast, CHANGES),
]
CASES = [(kind, call, name, changes[name]) for kind, call, changes in LOSSES for name in changes]


def assert_follows(changed: Any, fresh: Any, name: str, value: Any, call: Call) -> None:
    """Once a setting is changed, ``call`` gives what it gives of one that was made with it, and not what it gave."""
    before = call(changed)
    setattr(changed, name, value)
    assert getattr(changed, name) == value
    assert torch.equal(call(changed), call(fresh))
    assert not torch.equal(call(changed), before)
    assert repr(changed) == repr(fresh)


@pytest.mark.parametrize(("kind", "call", "name", "value"), CASES, ids=[f"{c[0].__name__} {c[2]}" for c in CASES])
def test_a_loss_follows_its_settings(kind: Any, call: Call, name: str, value: Any) -> None:
    changed, fresh = kind(**START), kind(**{**START, name: value})
    assert_follows(changed, fresh, name, value, call)


@pytest.mark.parametrize(("kind", "call", "changes"), LOSSES, ids=[c[0].__name__ for c in LOSSES])
def test_every_argument_of_a_loss_is_an_attribute(kind: Any, call: Call, changes: Any) -> None:
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.default is not parameter.empty:
            assert getattr(kind(temperature=1.0), name) == (1.0 if name == "temperature" else parameter.default), name


@pytest.mark.parametrize(("kind", "call", "changes"), LOSSES, ids=[c[0].__name__ for c in LOSSES])
def test_a_refused_setting_changes_nothing(kind: Any, call: Call, changes: Any) -> None:
    loss = kind(**START)
    before = call(loss)
    for name, value in (("temperature", 0.0), ("hard_weight", float("nan")), ("divergence", "kl"), ("beta", 2.0)):
        with pytest.raises(ArgumentError, match=name):
            setattr(loss, name, value)
    assert torch.equal(call(loss), before)
    with pytest.raises((AttributeError, TypeError)):
        loss.options = None


def test_the_teachers_temperature_follows_unless_it_was_given() -> None:
    loss = tgt.DistillationLoss(temperature=2.0)
    loss.temperature = 1.0
    assert loss.options.teacher_temperature == 1.0
    assert torch.equal(dense(loss), dense(tgt.DistillationLoss()))
    given = tgt.DistillationLoss(temperature=2.0, teacher_temperature=3.0)
    given.temperature = 1.0
    assert given.options.teacher_temperature == 3.0


def test_the_soft_term_follows_too() -> None:
    loss = tgt.DistillationLoss(**START)
    loss.temperature = 1.0
    expected = tgt.DistillationLoss().soft(X, X.flip(0))
    assert torch.equal(loss.soft(X, X.flip(0)), expected)


# ---- the objective ----


def parts_add_up(objective: tgt.TGTObjective, student: Any) -> dict[str, float]:
    output = objective(student, X, Y)
    parts = {name: float(value) for name, value in output["parts"].items()}
    assert sum(parts.values()) == pytest.approx(output["loss"].item())
    return parts


def test_parts_follow_a_replaced_loss() -> None:
    teacher, student = make_teacher(), make_student(batch_norm=False, dropout=0.0)
    replaced = tgt.TGTObjective(teacher)
    for options in ({"hard_weight": 3.0}, {}, {"soft_weight": 0.0, "hard_weight": 1.0, "label_smoothing": 0.1}, START):
        replaced.loss = tgt.DistillationLoss(**options)
        fresh = tgt.TGTObjective(teacher, loss=tgt.DistillationLoss(**options))
        assert parts_add_up(replaced, student) == parts_add_up(fresh, student)


def test_parts_follow_a_changed_loss() -> None:
    teacher, student = make_teacher(), make_student(batch_norm=False, dropout=0.0)
    objective = tgt.TGTObjective(teacher)
    first = parts_add_up(objective, student)
    objective.loss.hard_weight = 2.0
    assert parts_add_up(objective, student)["hard"] == pytest.approx(2 * first["hard"])
    objective.loss.soft_weight = 0.0
    found = parts_add_up(objective, student)
    assert (found["hard"], found["soft"]) == (pytest.approx(2 * first["hard"]), 0)
    objective.loss.soft_weight, objective.loss.hard_weight = 1.0, 0.0
    found = parts_add_up(objective, student)
    assert (found["hard"], found["soft"]) == (0, pytest.approx(first["soft"]))


def test_an_objective_refuses_settings_that_it_cannot_serve() -> None:
    teacher, student = make_teacher(), make_student()
    objective = tgt.TGTObjective(teacher, tgt.LatentSampler(teacher, units="absolute"))
    for name, value, match in (
        ("reduction", "sum", "reduction='mean'"),
        ("return_stats", True, "return_stats=False"),
        ("soft_weight", 0.0, "ignores synthetic"),
    ):
        usual = getattr(objective.loss, name)
        setattr(objective.loss, name, value)
        with pytest.raises(ArgumentError, match=match):
            objective(student, X, Y)
        setattr(objective.loss, name, usual)
    objective.synthetic_weight = -1.0
    with pytest.raises(ArgumentError, match="synthetic_weight must be finite"):
        objective(student, X, Y)
    objective.synthetic_weight = 0.0
    assert objective(student, X, Y)["parts"]["synthetic"] == 0


# ---- the sampler ----


def sampled(sampler: tgt.LatentSampler) -> Tensor:
    made: Tensor = sampler(X, student=make_student(batch_norm=False), sample_ids=torch.arange(8) // 2, step=3).x
    return made.detach()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sigma", 0.0),
        ("step_size", 3.0),
        ("steps", 3),
        ("radius", 0.1),
        ("norm", "linf"),
        ("step_noise", 1.0),
        ("units", "std"),
        ("replicas", 2),
        ("divergence", "reverse_kl"),
        ("temperature", 5.0),
        ("truncation", 0.1),
        ("seed", 9),
        ("repeats", "same"),
    ],
)
def test_a_sampler_follows_its_settings(name: str, value: Any) -> None:
    teacher = make_teacher()
    options: dict[str, Any] = {"mode": "gradient", "sigma": 0.5, "units": "absolute", "divergence": "forward_kl"}
    changed, fresh = (tgt.LatentSampler(teacher, **{**options, **more}) for more in ({}, {name: value}))
    for sampler in (changed, fresh):
        sampler.calibrate([X])
    assert_follows(changed, fresh, name, value, sampled)


def test_every_argument_of_a_sampler_is_an_attribute() -> None:
    sampler = tgt.LatentSampler(make_teacher())
    for name, parameter in inspect.signature(tgt.LatentSampler).parameters.items():
        if name != "teacher":
            usual = {"rank": 0, "world_size": 1}.get(name, parameter.default)
            assert getattr(sampler, name) == usual, name


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("sigma", -1.0, "sigma must be finite and in"),
        ("steps", 0, "steps must be an integer"),
        ("anchors", "none", "anchors must be one of"),
        ("seed", 0.5, "seed must be an integer"),
        ("mode", "prior", "mode is fixed at construction"),
        ("bank_size", 3, "bank_size is fixed"),
        ("rank", 1, "rank is fixed"),
        ("world_size", 2, "world_size is fixed"),
        ("compile", True, "compile is fixed"),
    ],
)
def test_what_a_sampler_refuses_changes_nothing(name: str, value: Any, match: str) -> None:
    sampler = tgt.LatentSampler(make_teacher(), sigma=0.5, units="absolute")
    before = sampled(sampler)
    with pytest.raises(ArgumentError, match=match):
        setattr(sampler, name, value)
    assert torch.equal(sampled(sampler), before)
