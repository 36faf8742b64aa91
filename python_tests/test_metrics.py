"""Accuracy, head/middle/tail, agreement and KL: hand values, and a model that is left as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from training_kit import CLASSES, FEATURES, make_data, make_student, make_teacher

from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.teacher.modes import eval_mode
from tgt_fast.train import accuracy, agreement, class_accuracy, class_thirds, evaluate, mean_kl

LOGITS = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
TARGET = torch.tensor([0, 2, 0, 1, -100])  # right, right, wrong, wrong, not counted


def test_accuracy_by_hand() -> None:
    assert accuracy(LOGITS, TARGET) == 2 / 4
    assert accuracy(LOGITS, TARGET, classes=torch.tensor([0, 1])) == 1 / 3
    assert accuracy(LOGITS.reshape(5, 1, 3), TARGET.reshape(5, 1)) == 2 / 4
    assert math.isnan(accuracy(LOGITS, torch.full_like(TARGET, -1)))
    assert class_accuracy(LOGITS, TARGET) == [1 / 2, 0.0, 1.0]
    assert math.isnan(class_accuracy(LOGITS, torch.zeros_like(TARGET))[2])


def test_agreement_and_kl_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0], [2.0, 1.0]])
    teacher = torch.tensor([[math.log(3.0), 0.0], [2.0, 1.0]])
    assert agreement(student, teacher) == 1.0  # of equal logits the first is taken
    assert agreement(-student, teacher) == 0.5
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert mean_kl(student, teacher) == pytest.approx(by_hand / 2)
    assert mean_kl(teacher, teacher) == 0.0
    assert math.isnan(mean_kl(student[:0], teacher[:0]))
    assert math.isnan(agreement(student[:0], teacher[:0]))


def test_kl_and_excluded_classes() -> None:
    free, masked = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, -math.inf]])
    # The masked teacher is the free one, renormalised: their KL is -log of the mass that it kept.
    kept = (math.exp(1) + math.exp(2)) / (math.exp(1) + math.exp(2) + math.exp(3))
    assert mean_kl(free, masked) == pytest.approx(-math.log(kept))
    assert mean_kl(masked, free) == math.inf
    assert mean_kl(masked, masked) == 0.0


def test_thirds() -> None:
    head, middle, tail = class_thirds([5, 50, 5, 20, 1, 5, 30, 2, 5, 40])
    assert head.tolist() == [1, 9, 6, 3]
    assert middle.tolist() == [0, 2, 5]
    assert tail.tolist() == [8, 7, 4]
    assert [third.tolist() for third in class_thirds(torch.tensor([1, 2, 3]))] == [[2], [1], [0]]
    for bad in ([1, 2], [1, -2, 3], [[1, 2, 3]]):
        with pytest.raises(ArgumentError, match="class_counts"):
            class_thirds(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("with_ids", [False, True])
def test_evaluate_equals_the_functions(with_ids: bool) -> None:
    teacher = make_teacher(batch_norm=True, student_transform=lambda x: 2 * x)
    student = make_student()
    x, y = make_data(23)
    y[3] = -1
    batches = [(part_x, part_y) for part_x, part_y in zip(x.split(7), y.split(7), strict=True)]
    loader = [(torch.arange(len(b)), a, b) for a, b in batches] if with_ids else batches
    counts = [40, 1, 20, 30]
    found = evaluate(student, teacher, loader, class_counts=counts)

    with eval_mode(student), torch.no_grad():
        logits, labels = student(2 * x), teacher.label(x)
    head, middle, tail = class_thirds(counts)
    assert found == {
        "accuracy": accuracy(logits, y),
        "head": accuracy(logits, y, classes=head),
        "middle": accuracy(logits, y, classes=middle),
        "tail": accuracy(logits, y, classes=tail),
        "agreement": agreement(logits, labels),
        "mean_kl": pytest.approx(mean_kl(logits, labels)),
    }
    assert all(type(value) is float for value in found.values())
    assert 0 < found["agreement"] < 1
    assert found["mean_kl"] > 0


def test_evaluate_leaves_no_trace() -> None:
    student = make_student()
    student[1].eval()  # a BatchNorm that its user froze
    x, y = make_data(23)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    flags = [module.training for module in student.modules()]
    state = torch.get_rng_state()
    evaluate(student, make_teacher(batch_norm=True), [(x, y)])
    assert [module.training for module in student.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken")

    broken = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(broken, None, [(x, y)])
    assert broken.training


def test_evaluate_without_teacher_or_labels() -> None:
    x, y = make_data(23)
    assert set(evaluate(make_student(), None, [(x, y)])) == {"accuracy"}
    found = evaluate(make_student(), make_teacher(), [x])
    assert math.isnan(found["accuracy"])
    assert found["mean_kl"] > 0


def test_errors() -> None:
    x, y = make_data(23)
    student, teacher = make_student(), make_teacher()
    with pytest.raises(ShapeError, match=r"\(5, 3\)"):
        accuracy(LOGITS, TARGET[:4])
    with pytest.raises(ShapeError, match="differ"):
        mean_kl(LOGITS, LOGITS[:, :2])
    with pytest.raises(ShapeError, match="differ"):
        agreement(LOGITS, LOGITS[:, :2])
    with pytest.raises(ArgumentError, match="class 9"):
        evaluate(student, teacher, [(x, y + 9 - y.max())])
    with pytest.raises(ArgumentError, match="no batch"):
        evaluate(student, teacher, [])
    with pytest.raises(ArgumentError, match=f"5 class_counts for a student of {CLASSES}"):
        evaluate(student, teacher, [(x, y)], class_counts=[1] * 5)
    with pytest.raises(ShapeError, match="differ"):
        evaluate(nn.Linear(FEATURES, 7), teacher, [(x, y)])
    with pytest.raises(ArgumentError, match="4"):
        evaluate(student, teacher, [(x, y, y, y)])


def test_logits_of_maps_and_labels_with_a_number_a_class() -> None:
    maps = torch.zeros(2, 3, 4, 4)
    for name, call in (("accuracy", accuracy), ("class_accuracy", class_accuracy)):
        with pytest.raises(ShapeError, match=rf"{name}: .*logits\.movedim\(1, -1\)"):
            call(maps, torch.zeros(2, 4, 4, dtype=torch.int64))
        with pytest.raises(ShapeError, match=rf"{name}: .*target\.argmax\(-1\)"):
            call(maps, maps.long())
    assert accuracy(maps.movedim(1, -1), torch.zeros(2, 4, 4, dtype=torch.int64)) == 1.0
