"""TeacherEnsemble: what several teachers say together, by weight, class and sample; gradients, objectives, caches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn
from torch.nn import functional as F

import tgt_fast as tgt
from tgt_fast.cache import EnsembleCache
from tgt_fast.errors import ArgumentError, ShapeError, StaleCacheError
from tgt_fast.train import evaluate

X = toys.normal(6, toys.FEATURES)
Y = torch.arange(6) % toys.CLASSES


def teacher(seed: int, classes: int = toys.CLASSES, **options: Any) -> tgt.Teacher:
    made = [toys.seeded(lambda a=a, b=b: nn.Linear(a, b), seed + at) for at, (a, b) in enumerate([(8, 4), (4, 8)])]
    judge = toys.seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, classes)), seed + 2)
    return tgt.Teacher(*made, judge, **options)


A, B = teacher(10), teacher(20)


def test_labels_are_the_mixture_or_the_mean() -> None:
    a, b = A.label(X), B.label(X)
    equal = tgt.TeacherEnsemble({"a": A, "b": B})
    torch.testing.assert_close(equal.label(X), (0.5 * a.softmax(-1) + 0.5 * b.softmax(-1)).log())
    weighed = tgt.TeacherEnsemble({"a": A, "b": B}, weights={"a": 3.0, "b": 1.0})
    assert weighed.weights == {"a": 0.75, "b": 0.25}
    torch.testing.assert_close(weighed.label(X), (0.75 * a.softmax(-1) + 0.25 * b.softmax(-1)).log())
    mean = tgt.TeacherEnsemble({"a": A, "b": B}, weights={"a": 3.0, "b": 1.0}, combine="logits")
    torch.testing.assert_close(mean.label(X), 0.75 * a + 0.25 * b)
    alone = tgt.TeacherEnsemble({"a": A, "b": B}, weights={"a": 2.0, "b": 0.0})
    torch.testing.assert_close(alone.label(X), a.log_softmax(-1))


def test_one_of_them_generates() -> None:
    for generator, whose in ((None, A), ("b", B)):
        both = tgt.TeacherEnsemble({"a": A, "b": B}, generator=generator)
        z = both.encode(X).z
        assert torch.equal(z, whose.encode(X).z)
        assert torch.equal(both.decode(z), whose.decode(z))


@pytest.mark.parametrize("combine", ["probabilities", "logits", "per_teacher"])
def test_gradients_go_through_all_of_them(combine: str) -> None:
    both = tgt.TeacherEnsemble({"a": A, "b": B}, combine=combine)
    x = X.double().requires_grad_()
    for one in (A, B):
        one.double()
    try:
        assert torch.autograd.gradcheck(lambda x: both.label(x), (x,))
    finally:
        for one in (A, B):
            one.float()


def test_a_term_a_teacher() -> None:
    """The soft and synthetic terms, and the disagreement that is climbed, are the weighted sums of each one's."""
    both = tgt.TeacherEnsemble({"a": A, "b": B}, weights={"a": 3.0, "b": 1.0}, combine="per_teacher")
    student, weight = toys.student().eval(), torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 3.0])
    y = Y.clone()
    y[1], y[4] = -100, -1
    loss = tgt.DistillationLoss("jsd", temperature=2.0, hard_weight=0.5)
    sampler = tgt.LatentSampler(both, sigma=0.5, units="absolute")
    out = tgt.TGTObjective(both, sampler, loss=loss)(student, X, y, sample_weight=weight, step=0)
    one_by_one = []
    for one in (A, B):
        same = tgt.Teacher(A.encoder, A.decoder, one.labeler)
        objective = tgt.TGTObjective(same, tgt.LatentSampler(same, sigma=0.5, units="absolute"), loss=loss)
        one_by_one.append(objective(student, X, y, sample_weight=weight, step=0))
    for name in ("soft", "synthetic"):
        expected = 0.75 * one_by_one[0]["parts"][name] + 0.25 * one_by_one[1]["parts"][name]  # type: ignore[literal-required]
        torch.testing.assert_close(out["parts"][name], expected)  # type: ignore[literal-required]
    torch.testing.assert_close(out["parts"]["hard"], one_by_one[0]["parts"]["hard"])
    torch.testing.assert_close(sum(out["parts"].values()), out["loss"].detach())
    grads = [torch.autograd.grad(o["loss"], list(student.parameters())) for o in (out, *one_by_one)]
    for mixed, a, b in zip(*grads, strict=True):
        torch.testing.assert_close(mixed, 0.75 * a + 0.25 * b)


@pytest.mark.parametrize("combine", ["probabilities", "logits", "per_teacher"])
def test_gradient_mode_and_training(combine: str) -> None:
    both = tgt.TeacherEnsemble({"a": A, "b": B}, combine=combine)
    student = toys.student()
    sampler = tgt.LatentSampler(both, "gradient", sigma=0.1, units="absolute", record_disagreement=True, steps=3,
                                step_size=0.5)  # fmt: skip
    synth = sampler(X, student=student)
    assert sampler.last_disagreement[-1] > sampler.last_disagreement[0]
    torch.testing.assert_close(synth.teacher_logits, both.label(synth.x))
    result = tgt.fit(
        student, tgt.TGTObjective(both, sampler), [(torch.arange(6), X, Y)], steps=2, progress=False,
        optimizer=torch.optim.SGD(student.parameters(), 0.1),
        evaluate=lambda s: evaluate(s, both, [(X, Y)]),
    )  # fmt: skip
    assert result.best_score is not None


def test_classes_that_a_teacher_knows() -> None:
    """Of a teacher with fewer outputs, and of one whose other outputs do not count."""
    expert = teacher(30, classes=2)
    a, b = A.label(X), expert.label(X)
    both = tgt.TeacherEnsemble({"a": A, "b": expert}, class_ids={"b": [2, 0]})
    wide = torch.zeros(6, 3).index_copy(1, torch.tensor([2, 0]), b.softmax(-1))
    torch.testing.assert_close(both.label(X).exp(), 0.5 * a.softmax(-1) + 0.5 * wide)
    mean = tgt.TeacherEnsemble({"a": A, "b": expert}, class_ids={"b": [2, 0]}, combine="logits").label(X)
    torch.testing.assert_close(mean[:, 1], a[:, 1])
    torch.testing.assert_close(mean[:, 2], (a[:, 2] + b[:, 0]) / 2)
    of_all = tgt.TeacherEnsemble({"b": B}, class_ids={"b": [0, 2]}, num_classes=3).label(X)
    torch.testing.assert_close(of_all[:, [0, 2]], B.label(X)[:, [0, 2]].log_softmax(-1))
    assert bool((of_all[:, 1] == -math.inf).all())

    apart = tgt.TeacherEnsemble({"a": A, "b": expert}, class_ids={"b": [2, 0]}, combine="per_teacher")
    student = toys.student().eval()
    loss = tgt.TGTObjective(apart, loss=tgt.DistillationLoss("reverse_kl"))(student, X)["loss"]
    logits = student(X)
    of_b = F.kl_div(b.log_softmax(-1), logits[:, [2, 0]].log_softmax(-1), log_target=True, reduction="batchmean")
    of_a = F.kl_div(a.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, (of_a + of_b) / 2)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, list(student.parameters())))


class Counted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.rows = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        made: Tensor = self.inner(x)
        return made


@pytest.mark.parametrize("combine", ["probabilities", "logits", "per_teacher"])
def test_a_route_chooses_by_sample(combine: str) -> None:
    place = torch.tensor([0, 1, 1, 0, 1, 1])
    counted = [Counted(t.labeler) for t in (A, B)]  # type: ignore[arg-type]
    members = {n: tgt.Teacher(A.encoder, A.decoder, c) for n, c in zip("ab", counted, strict=True)}
    expected = torch.where(place[:, None] == 0, A.label(X), B.label(X)).log_softmax(-1)
    routes: list[tuple[Any, Any]] = [
        (lambda x: place, X),
        (lambda x: place.tolist(), X),
        (lambda x: F.one_hot(place, 2).float(), X),
        ("expert", {"x": X, "expert": place}),
        (1, (X, place)),
    ]
    for route, x in routes:
        for one in counted:
            one.rows = 0
        both = tgt.TeacherEnsemble(members, combine=combine, route=route, weights={"a": 1.0, "b": 9.0})
        torch.testing.assert_close(both.label(x).log_softmax(-1), expected)
        assert [one.rows for one in counted] == [2, 4]  # each of its own samples alone
        assert torch.equal(both.student_view(x), X)
    # What a decoder makes has no column: the weights serve.
    synth = tgt.LatentSampler(both, sigma=0.5, units="absolute")((X, place))
    torch.testing.assert_close(
        synth.teacher_logits, tgt.TeacherEnsemble(members, combine=combine, weights=both.weights).label(synth.x)
    )
    student = toys.student().eval()
    loss = tgt.TGTObjective(both, loss=tgt.DistillationLoss())(student, (X, place))["loss"]
    torch.testing.assert_close(loss, tgt.distillation_loss(student(X), expected))
    (grad, *_) = torch.autograd.grad(loss, list(student.parameters()))
    assert bool(grad.isfinite().all())


def test_a_batch_that_is_all_of_one_expert() -> None:
    expert = teacher(30, classes=2)
    both = tgt.TeacherEnsemble({"a": A, "b": expert}, class_ids={"b": [1, 0]}, route=lambda x: [1] * len(x))
    made = both.label(X)
    assert made.shape == (6, 3)
    assert bool((made[:, 2] == -math.inf).all())


def test_caches_of_each_teacher(tmp_path: Path) -> None:
    counted = [Counted(t.labeler) for t in (A, B)]  # type: ignore[arg-type]
    members = {n: tgt.Teacher(A.encoder, A.decoder, c) for n, c in zip("ab", counted, strict=True)}
    ids = torch.tensor([5, 3, 9, 1, 0, 2])
    both = tgt.TeacherEnsemble(members)
    with EnsembleCache(tmp_path, both, version="1") as cache:
        assert cache.fill([(ids, X)], progress=False) == 12
        assert torch.equal(cache.label(X, ids), both.label(X))
    for one in counted:
        one.rows = 0
    other = tgt.TeacherEnsemble(members, weights={"a": 3.0, "b": 1.0}, combine="logits", route=lambda x: [0, 1] * 3)
    expected = other.label(X)
    for one in counted:
        one.rows = 0
    with EnsembleCache(tmp_path, other, version="1") as cache:
        torch.testing.assert_close(cache.label(X, ids), expected)
        assert set(cache.each(X, ids)) == {"a", "b"}
    assert [one.rows for one in counted] == [0, 0]
    with EnsembleCache(tmp_path / "records", both, k=2) as cache, pytest.raises(ArgumentError, match="k=None"):
        cache.label(X, ids)
    with pytest.raises(ArgumentError, match="cannot be that of a folder"):
        EnsembleCache(tmp_path, tgt.TeacherEnsemble({"a/b": A}))
    with tgt.TeacherCache(tmp_path / "whole", tgt.TeacherEnsemble({"a": A, "b": B}), k=None) as whole:
        whole.label(X, ids)
    with pytest.raises(StaleCacheError):  # what the ensemble says depends on its weights and members
        tgt.TeacherCache(tmp_path / "whole", tgt.TeacherEnsemble({"a": A, "b": B}, weights={"a": 2, "b": 1}), k=None)


def test_it_stays_frozen_and_moves() -> None:
    members = {"a": teacher(10), "b": teacher(20)}
    both = tgt.TeacherEnsemble(members)
    student = members["b"].labeler
    with pytest.raises(ArgumentError, match="student is the teacher's labeler"):
        tgt.TGTObjective(both)(student, X)
    parent = nn.ModuleDict({"teacher": both}).train()
    assert list(parent.parameters()) == []
    assert not any(m.training for m in both._frozen)
    assert len(both.frozen_by_it(student.parameters())) == 4  # type: ignore[attr-defined]
    parent.double()
    assert both.label(X.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": {"a": 1.0}}, "weights lack"),
        ({"weights": {"a": 1.0, "b": -1.0}}, "finite number >= 0"),
        ({"weights": {"a": 0.0, "b": 0.0}}, "all 0"),
        ({"weights": {"a": 1.0, "b": 1.0, "c": 1.0}}, "weights names 'c'"),
        ({"weights": [1.0, 2.0]}, "weights must be a dict"),
        ({"combine": "mean"}, "combine must be one of"),
        ({"generator": "c"}, "generator names 'c'"),
        ({"class_ids": {"c": [0]}}, "class_ids names 'c'"),
        ({"class_ids": {"b": [0, 0]}}, "twice"),
        ({"class_ids": {"b": [-1]}}, "must be classes"),
        ({"class_ids": {"b": [3]}, "num_classes": 3}, "must be classes"),
        ({"route": 1.5}, "route must be a column"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_what_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        tgt.TeacherEnsemble({"a": A, "b": B}, **options)


def test_what_is_refused_of_answers() -> None:
    for teachers in ({}, [A], {"a": nn.Linear(8, 3)}):
        with pytest.raises(ArgumentError):
            tgt.TeacherEnsemble(teachers)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="say by class_ids"):
        tgt.TeacherEnsemble({"a": A, "b": teacher(30, classes=2)}).label(X)
    with pytest.raises(ShapeError, match="class_ids"):
        tgt.TeacherEnsemble({"a": A, "b": teacher(30, classes=4)}, class_ids={"b": [0, 1]}).label(X)
    with pytest.raises(ArgumentError, match="places from 0 to 2, of 2 teachers"):
        tgt.TeacherEnsemble({"a": A, "b": B}, route=lambda x: [0, 1, 2, 0, 1, 0]).label(X)
    with pytest.raises(ShapeError, match="route must give integers"):
        tgt.TeacherEnsemble({"a": A, "b": B}, route=lambda x: [0, 1]).label(X)
    with pytest.raises(ArgumentError, match=r"no answers of \['b'\]"):
        tgt.TeacherEnsemble({"a": A, "b": B}).combined({"a": A.label(X)})
