"""A default device of the user's, such as that of ``torch.set_default_device("meta")``, is not where data lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import toys
from public_calls import public_calls
from torch import Tensor
from torch.utils import _pytree as pytree

import tgt_fast as tgt
from tgt_fast.train import evaluate

CALLS = public_calls()


@pytest.fixture
def meta() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def leaves(result: Any) -> list[Tensor]:
    if isinstance(result, tgt.TeacherTopK):
        return [result.ids, result.log_probs, *([] if result.tail_log_prob is None else [result.tail_log_prob])]
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def with_gradients(call: str, **options: Any) -> list[Tensor]:
    """The results of a public op, and the gradient of its first tensor where it has one."""
    function, given = CALLS[call]
    name = next(iter(given))
    differentiable = call.startswith(("distill", "linear", "contrast", "soft", "perturb"))
    first = given[name].clone().requires_grad_(differentiable)
    found = leaves(function(**{**given, name: first}, **options))
    return [*found, *(torch.autograd.grad(found[0].sum(), first) if differentiable else ())]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("call", CALLS)
def test_ops(call: str, backend: str) -> None:
    options = {} if call in ("topk_teacher", "align_logits") else {"backend": backend}
    wanted = with_gradients(call, **options)
    with torch.device("meta"):
        made = with_gradients(call, **options)
    for ours, theirs in zip(made, wanted, strict=True):
        assert ours.is_cpu
        assert torch.equal(ours, theirs)


SAMPLERS: list[dict[str, Any]] = [
    {"mode": "random"},
    {"mode": "random", "anchors": "balanced", "replicas": 2},
    {"mode": "prior"},
    {"mode": "gradient", "radius": 1.0, "step_noise": 0.1, "truncation": 2.0},
    {"mode": "persistent", "restart_probability": 0.5, "bank_size": 5, "replicas": 2},
]


def explored(teacher: tgt.Teacher, student: Any, x: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """The samples of two calls, the second one of a sampler that took over the first one's state."""
    found = []
    sampler = tgt.LatentSampler(teacher, **options, sigma=0.5, seed=3)
    sampler.calibrate([x, x[:2] + 1])
    ids = torch.arange(2, device="cpu") if options["mode"] == "persistent" else None
    for _ in range(2):
        made = sampler(x[:2], student=student if options["mode"] == "gradient" else None, sample_ids=ids)
        if options["mode"] == "persistent":
            student(made.x).sum().backward()
        found += [made.x.detach(), made.teacher_logits.detach(), made.ids]
        state = sampler.state_dict()
        sampler = tgt.LatentSampler(teacher, **options, sigma=0.5)
        sampler.load_state_dict(state)
    return found


@pytest.mark.parametrize("options", SAMPLERS, ids=lambda options: "-".join(map(str, options.values())))
def test_samplers(options: dict[str, Any], request: pytest.FixtureRequest) -> None:
    teacher, student, x = toys.vector_teacher(prior="normal"), toys.student().eval(), toys.normal(4, toys.FEATURES)
    wanted = explored(teacher, student, x, options)
    request.getfixturevalue("meta")
    made = explored(teacher, student, x, options)
    for ours, theirs in zip(made, wanted, strict=True):
        assert ours.is_cpu
        assert torch.equal(ours, theirs)


def test_training(request: pytest.FixtureRequest) -> None:
    teacher, x, y = toys.vector_teacher(), toys.normal(4, toys.FEATURES), torch.tensor([0, 1, -1, 2])
    students = [toys.student(), toys.student()]
    for student in students:
        if student is students[1]:
            request.getfixturevalue("meta")
        objective = tgt.TGTObjective(teacher, tgt.LatentSampler(teacher, sigma=0.5, units="absolute"))
        tgt.fit(
            student, objective, [(x, y)], steps=2, optimizer=torch.optim.SGD(student.parameters(), 0.1), seed=0,
            progress=False, evaluate=lambda s: evaluate(s, teacher, [(x, y)], class_counts=[3, 2, 1]),
        )  # fmt: skip
    assert toys.same(*(dict(student.state_dict()) for student in students))
