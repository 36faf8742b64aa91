"""The first mistakes of a user in training: one line that says what to do, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_kit import CLASSES, FEATURES, make_data, make_student, make_teacher

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, DTypeError
from tgt_fast.train import evaluate


def trained(student: Any, objective: Any, *, batches: Any = None, **options: Any) -> Any:
    parameters = list(student.parameters()) if isinstance(student, nn.Module) else [nn.Parameter(torch.ones(()))]
    given: dict[str, Any] = {"steps": 1, "progress": False, "optimizer": torch.optim.SGD(parameters, 0.1), **options}
    return tgt.fit(student, objective, [make_data()] if batches is None else batches, **given)


# ---- the objective ----


@pytest.mark.parametrize("teacher", [nn.Linear(FEATURES, CLASSES), None, "teacher"])
def test_an_objective_of_a_module_that_is_no_teacher(teacher: Any) -> None:
    with pytest.raises(ArgumentError, match=r"teacher must be a tgt_fast\.Teacher, got .*tgt_fast\.Teacher\(nn\.Ident"):
        tgt.TGTObjective(teacher)
    objective = tgt.TGTObjective(make_teacher())
    objective.teacher = teacher
    with pytest.raises(ArgumentError, match=r"teacher must be a tgt_fast\.Teacher"):
        objective(make_student(), *make_data())


def test_the_advice_for_a_labeler_alone() -> None:
    labeler = nn.Linear(FEATURES, CLASSES)
    student, (x, y) = nn.Linear(FEATURES, CLASSES), make_data()
    objective = tgt.TGTObjective(tgt.Teacher(nn.Identity(), nn.Identity(), labeler))
    wanted = tgt.distillation_loss(student(x), labeler(x), y, temperature=2.0, hard_weight=1.0)
    torch.testing.assert_close(objective(student, x, y)["loss"], wanted)


NOT_OBJECTIVES = [
    tgt.DistillationLoss(), tgt.LinearDistillationLoss(), nn.CrossEntropyLoss(), F.cross_entropy,
    lambda student, x, y: {"loss": student(x).sum()},
]  # fmt: skip


@pytest.mark.parametrize("objective", NOT_OBJECTIVES)
def test_a_loss_instead_of_an_objective(objective: Any) -> None:
    with pytest.raises(ArgumentError, match=r"is no objective.*sample_ids= and step=.*tgt_fast\.TGTObjective\(teacher"):
        trained(make_student(), objective)


def test_something_that_cannot_be_called() -> None:
    with pytest.raises(ArgumentError, match="objective must be callable, got Tensor"):
        trained(make_student(), torch.ones(()))
    with pytest.raises(ArgumentError, match=r"student must be a torch\.nn\.Module, got function"):
        trained(lambda x: x, tgt.TGTObjective(make_teacher()))


@pytest.mark.parametrize(
    ("gives", "match"),
    [
        (lambda loss: loss, r"must return \{'loss': a 0-d tensor\}.*got Tensor"),
        (lambda loss: (loss, {}), "got tuple"),
        (lambda loss: None, "got NoneType"),
        (lambda loss: {"total": loss}, r"got a dict of \['total'\]"),
        (lambda loss: {"loss": loss.item()}, "must be a 0-d tensor, got float"),
        (lambda loss: {"loss": loss.expand(3)}, r"must be a 0-d tensor, got shape \(3,\)"),
        (lambda loss: {"loss": loss.detach()}, "no gradient reaches the student"),
        (lambda loss: {"loss": loss, "parts": {"soft": 1.0}}, "parts must be a dict of 0-d tensors"),
    ],
)
def test_what_an_objective_returns(gives: Any, match: str) -> None:
    def objective(student: Any, x: Tensor, y: Tensor, *, sample_ids: Any, step: int) -> Any:
        return gives(student(x).square().mean())

    with pytest.raises(ArgumentError, match=match):
        trained(make_student(), objective)


# ---- the student ----


class Returning(nn.Module):
    """A student that gives its logits in some other form."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.inner, self.form = make_student(), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.inner(x))


FORMS = [
    (lambda z: (z.argmax(-1), z.sum()), "got tuple of 2; say by logits_of="),
    (lambda z: {"classes": z.argmax(-1)}, r"got dict of \['classes'\]; say by"),
    (lambda z: None, "got NoneType"),
]


@pytest.mark.parametrize(("form", "match"), FORMS)
def test_a_student_that_returns_no_logits(form: Any, match: str) -> None:
    student, teacher, (x, y) = Returning(form), make_teacher(), make_data()
    with pytest.raises(DTypeError, match=f"TGTObjective: the student must return a tensor of logits.*{match}"):
        trained(student, tgt.TGTObjective(teacher))
    for given in (teacher, None):
        with pytest.raises(DTypeError, match=f"evaluate: the student must return a tensor of logits.*{match}"):
            evaluate(student, given, [(x, y)])
    sampler = tgt.LatentSampler(teacher, mode="gradient", units="absolute")
    with pytest.raises(DTypeError, match=f"LatentSampler: the student must return a tensor of logits.*{match}"):
        sampler(x, student=student)


def test_a_student_that_is_the_labeler() -> None:
    for trainable in (True, False):
        teacher = make_teacher()
        labeler: Any = teacher.labeler
        labeler.requires_grad_(trainable)
        with pytest.raises(ArgumentError, match=r"fit: the student is the teacher's labeler.*copy\.deepcopy"):
            trained(labeler, tgt.TGTObjective(teacher))
        with pytest.raises(ArgumentError, match="TGTObjective: the student is the teacher's labeler"):
            tgt.TGTObjective(teacher)(torch.compile(labeler, backend="eager"), *make_data())


@pytest.fixture
def classifier() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(
        vocab_size=20, dim=8, n_heads=1, n_layers=1, hidden_dim=8, num_labels=CLASSES
    )
    made: nn.Module = transformers.DistilBertForSequenceClassification(config)
    return made


def test_a_model_of_transformers_as_the_student(classifier: nn.Module) -> None:
    x = {"input_ids": torch.ones(4, 5, dtype=torch.int64), "attention_mask": torch.ones(4, 5, dtype=torch.int64)}
    y = torch.tensor([0, 1, 2, -1])
    labeler = lambda x: F.one_hot(x["input_ids"][:, :1].expand(-1, 2).sum(1), CLASSES).float()  # noqa: E731
    teacher = tgt.Teacher(nn.Identity(), nn.Identity(), labeler)
    wrapped = tgt.teacher.TextClassifier(classifier)
    scores = [evaluate(student, teacher, [(x, y)]) for student in (classifier, wrapped)]
    assert scores[0] == scores[1]
    for student in (classifier, torch.compile(classifier, backend="eager"), wrapped):
        assert trained(student, tgt.TGTObjective(teacher), batches=[(x, y)]).steps == 1


# ---- names of weights ----


class Nested(nn.Module):
    """A part of it is compiled."""

    def __init__(self, *, compiled: bool) -> None:
        super().__init__()
        body = make_student(seed=4)
        self.body = torch.compile(body, backend="eager") if compiled else body

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


def whole(*, compiled: bool) -> nn.Module:
    student = make_student(seed=4)
    return torch.compile(student, backend="eager") if compiled else student  # type: ignore[return-value]


@pytest.mark.parametrize("make", [whole, Nested])
def test_best_weights_of_a_compiled_student(make: Any, tmp_path: Path) -> None:
    """They and its checkpoints fit the model itself, and the compiled one."""
    teacher, compiled, plain = make_teacher(), make(compiled=True), make(compiled=False)
    options = {"steps": 2, "evaluate": lambda s: evaluate(s, None, [make_data()]), "checkpoint_dir": tmp_path}
    result = trained(compiled, tgt.TGTObjective(teacher), seed=0, **options)
    assert list(result.best) == list(plain.state_dict())
    for weights in (result.best, safetensors.torch.load_file(tmp_path / "best.safetensors")):
        plain.load_state_dict(weights)
        compiled.load_state_dict(weights)
        compiled.load_state_dict(compiled.state_dict())
        for ours, theirs in zip(plain.state_dict().values(), compiled.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(RuntimeError, match="Missing key"):
        compiled.load_state_dict({})
    for kind in (False, True):
        fresh = make(compiled=kind)
        again = trained(fresh, tgt.TGTObjective(teacher), seed=0, resume=True, **options)
        assert (again.steps, list(again.best)) == (2, list(plain.state_dict()))
        for ours, theirs in zip(fresh.state_dict().values(), result.best.values(), strict=True):
            assert torch.equal(ours, theirs)
