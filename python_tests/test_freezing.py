"""Freezing reaches every module that a teacher computes with, however it is held, and nothing beside it."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError
from tgt_fast.teacher.parts import modules_of


class Output(nn.Module):
    """A model as Hugging Face writes them: keywords in, an object with logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = toys.labeler()

    def forward(self, features: Tensor) -> Any:
        return types.SimpleNamespace(logits=self.body(features))


IN_A_GLOBAL = toys.labeler()


def by_a_global(x: Tensor) -> Tensor:
    return IN_A_GLOBAL(x)


class Program:
    """An object whose one method labels, and which also holds what is being trained."""

    def __init__(self) -> None:
        self.big, self.small = toys.labeler(), toys.student()
        self.heads: dict[str, Any] = {"used": self.big, "other": self.small}

    def judge(self, x: Tensor) -> Tensor:
        return self._inner(x)

    def _inner(self, x: Tensor) -> Tensor:
        return self.big(x)

    def by_key(self, x: Tensor) -> Tensor:
        return self.heads["used"](x)

    def __call__(self, x: Tensor) -> Tensor:
        return self.judge(x)


@dataclasses.dataclass
class Ensemble:
    members: list[Callable[[Tensor], Tensor]]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


class Hidden(nn.Module):
    """A module that keeps another one out of sight."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.kept = [inner]

    def forward(self, x: Tensor) -> Tensor:
        return self.kept[0](x)


class Elsewhere(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return by_a_global(x)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords)

    return wrapped


def _lambda() -> tuple[Any, list[nn.Module]]:
    hf = Output()
    return (lambda x: hf(features=x).logits), [hf]


def _ensemble() -> tuple[Any, list[nn.Module]]:
    members = [toys.labeler(seed) for seed in (1, 2, 3)]
    return (lambda x: sum(m(x) for m in members) / 3), list(members)


def _default() -> tuple[Any, list[nn.Module]]:
    net = toys.labeler()

    def labeler(x: Tensor, inner: nn.Module = net) -> Tensor:
        return inner(x)

    return labeler, [net]


def _partial() -> tuple[Any, list[nn.Module]]:
    net = toys.labeler()
    return functools.partial(lambda model, x: model(x), net), [net]


def _keyword() -> tuple[Any, list[nn.Module]]:
    net = toys.labeler()
    return functools.partial(lambda x, model: model(x), model=net), [net]


def _method() -> tuple[Any, list[nn.Module]]:
    program = Program()
    return program.judge, [program.big]


def _object() -> tuple[Any, list[nn.Module]]:
    program = Program()
    return program, [program.big]


def _key() -> tuple[Any, list[nn.Module]]:
    program = Program()
    return program.by_key, [program.big]


def _object_in_a_closure() -> tuple[Any, list[nn.Module]]:
    program = Program()
    return (lambda x: program.judge(x)), [program.big]


def _attribute_in_a_closure() -> tuple[Any, list[nn.Module]]:
    program = Program()
    return (lambda x: program.big(x)), [program.big]


def _dataclass() -> tuple[Any, list[nn.Module]]:
    first, second = toys.labeler(1), toys.labeler(2)
    return Ensemble([first, lambda x: second(x)]), [first, second]


def _containers() -> tuple[Any, list[nn.Module]]:
    nets = [toys.labeler(seed) for seed in (1, 2)]
    held = {"one": (lambda x: nets[0](x), [nets[1].forward])}
    return (lambda x: held["one"][0](x) + held["one"][1][0](x)), list(nets)


def _nested() -> tuple[Any, list[nn.Module]]:
    net = toys.labeler()

    def inner(x: Tensor) -> Tensor:
        return net(x)

    return decorated(lambda x: inner(x)), [net]


def _hidden() -> tuple[Any, list[nn.Module]]:
    net = toys.labeler()
    module = Hidden(net)
    return module, [module, net]


def _global() -> tuple[Any, list[nn.Module]]:
    return by_a_global, [IN_A_GLOBAL]


def _elsewhere() -> tuple[Any, list[nn.Module]]:
    module = Elsewhere()
    return module, [module, IN_A_GLOBAL]


WAYS = [
    _lambda, _ensemble, _default, _partial, _keyword, _method, _object, _key, _object_in_a_closure,
    _attribute_in_a_closure, _dataclass, _containers, _nested, _hidden, _global, _elsewhere,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_a_part_computes_with_is_frozen_and_in_eval_mode_and_nothing_else(way: Callable[[], Any]) -> None:
    part, inside = way()
    for module in inside:
        module.train()
        module.requires_grad_(True)
    assert {id(module) for module in modules_of(part)} == {id(module) for module in inside}
    teacher = tgt.Teacher(nn.Identity(), nn.Identity(), part)
    for module in inside:
        assert not any(child.training for child in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
    x = toys.normal(5, toys.FEATURES)
    assert torch.equal(teacher.label(x), teacher.label(x))  # no dropout
    if part is not by_a_global and not isinstance(part, Elsewhere):  # those belong to all tests
        assert teacher.double().label(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["encoder", "decoder", "labeler_transform", "student_transform", "prior"])
def test_every_part_is_searched(name: str) -> None:
    net = nn.Linear(4, 4)
    parts: dict[str, Any] = {"encoder": nn.Identity(), "decoder": nn.Identity(), "labeler": nn.Identity()}
    tgt.Teacher(**{**parts, name: lambda x: net(x)})
    assert not net.training
    assert not net.weight.requires_grad


def test_a_method_leaves_alone_what_its_object_holds_beside() -> None:
    program = Program()
    tgt.Teacher(nn.Identity(), nn.Identity(), program.judge)
    assert program.small.training
    assert all(parameter.requires_grad for parameter in program.small.parameters())


def test_a_callable_may_say_itself_what_is_the_teachers() -> None:
    ours, trained = toys.labeler(), toys.student()

    def labeler(x: Tensor) -> Tensor:
        return ours(x) + trained(x).detach()

    labeler.teacher_modules = (ours,)  # type: ignore[attr-defined]
    tgt.Teacher(nn.Identity(), nn.Identity(), labeler)
    assert not ours.training
    assert trained.training
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_a_cache_asks_functions_in_eval_mode_and_leaves_modes_as_they_were(tmp_path: Path) -> None:
    net = toys.labeler()
    net[1].eval()
    x, ids = toys.normal(6, toys.FEATURES), torch.arange(6)
    with tgt.TeacherCache(tmp_path, lambda x: net(x), k=None, version="1") as cache:
        found = cache.label(x, ids)
    assert [child.training for child in net] == [True, False, True, True, True]
    with torch.no_grad():
        assert torch.equal(found, net.eval()(x))


def test_exploration_runs_a_function_of_a_student_in_eval_mode() -> None:
    inner = toys.student()
    teacher = toys.vector_teacher()
    sampler = tgt.LatentSampler(teacher, mode="gradient", sigma=0.5, units="absolute", steps=2)
    x, ids = toys.normal(6, toys.FEATURES), torch.arange(6)
    found = []
    for student in (inner, lambda x: inner(x)):
        before = toys.snapshot(inner)
        found.append(sampler(x, student=student, sample_ids=ids, step=0).x)
        assert toys.same(before, toys.snapshot(inner))
    assert torch.equal(*found)


class Adapted(nn.Module):
    """A layer with a low-rank adapter beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


def adapted() -> tuple[nn.Sequential, nn.Sequential]:
    """A model, and the student that adapters make of it in place."""
    base = nn.Sequential(nn.Linear(toys.FEATURES, 16), nn.Tanh(), nn.Linear(16, toys.CLASSES))
    base[0] = Adapted(base[0])  # type: ignore[arg-type]
    base[2].requires_grad_(False)
    return base, nn.Sequential(base)


def batches() -> list[Any]:
    return [(torch.arange(4), toys.normal(4, toys.FEATURES), torch.tensor([0, 1, 2, 0]))]


@pytest.mark.parametrize("first", ["student", "teacher"])
def test_fit_refuses_an_optimizer_over_what_the_teacher_froze(first: str) -> None:
    if first == "student":
        base, student = adapted()
        teacher = tgt.Teacher(nn.Identity(), nn.Identity(), base)
    else:  # adapters added to a model that is the teacher's already
        base = nn.Sequential(nn.Linear(toys.FEATURES, toys.CLASSES))
        teacher = tgt.Teacher(nn.Identity(), nn.Identity(), base)
        base[0] = Adapted(base[0])  # type: ignore[arg-type]
        student = nn.Sequential(base)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1)
    with pytest.raises(
        ArgumentError, match=r"fit: [24] of the [46] parameters in the optimizer.*0\.0\.lora_A\.weight.*copy"
    ):
        tgt.fit(student, tgt.TGTObjective(teacher), batches(), steps=1, optimizer=optimizer, progress=False)


def test_the_objective_names_what_a_student_shares_once() -> None:
    base, student = adapted()
    teacher = tgt.Teacher(nn.Identity(), nn.Identity(), lambda x: base(x))
    student.append(nn.Linear(toys.CLASSES, toys.CLASSES))
    objective = tgt.TGTObjective(teacher)
    _, x, y = batches()[0]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            objective(student, x, y)
    (only,) = found
    assert re.search(r"2 of the student's 8 parameters are the teacher's.*lora_A.*copy", str(only.message))
    assert only.filename == __file__


def test_a_copy_and_a_part_that_was_frozen_before_are_trained_beside_in_silence() -> None:
    base = nn.Linear(toys.FEATURES, toys.CLASSES).requires_grad_(False)
    teacher = tgt.Teacher(nn.Identity(), nn.Identity(), base)
    student = nn.Sequential(base, nn.Linear(toys.CLASSES, toys.CLASSES))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tgt.fit(student, tgt.TGTObjective(teacher), batches(), steps=1, optimizer=optimizer, progress=False)
    moved = [not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True)]
    assert moved == [False, False, True, True]
