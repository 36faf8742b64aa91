"""Temperatures and weights that change from call to call: one compiled program serves them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import toys
from torch import Tensor
from torch._dynamo.utils import counters

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.ops._distill_arguments import packed

VALUES = [1.0 + 0.37 * i for i in range(12)]  # more than the programs that torch.compile makes of a function
ROWS, CLASSES, WIDTH = 6, 9, 5

S, T = toys.normal(ROWS, CLASSES, seed=1).requires_grad_(), toys.normal(ROWS, CLASSES, seed=2)
Y = torch.tensor([0, 3, 8, -1, -100, 2])
H, W = toys.normal(ROWS, WIDTH, seed=3).requires_grad_(), toys.normal(CLASSES, WIDTH, seed=4).requires_grad_()
TH, TW = toys.normal(ROWS, 4, seed=5), toys.normal(CLASSES, 4, seed=6)
Q, D = toys.normal(4, WIDTH, seed=7).requires_grad_(), toys.normal(ROWS, WIDTH, seed=8).requires_grad_()
TQ, TD = toys.normal(4, 3, seed=9), toys.normal(ROWS, 3, seed=10)
TABLE = toys.normal(CLASSES, 3, seed=11).requires_grad_()
LEAVES = [S, H, W, Q, D, TABLE]
RECORD = tgt.topk_teacher(T, 3, 2.0)

Call = Callable[[Any], Tensor]
CALLS: dict[str, Call] = {
    "dense": lambda a: tgt.distillation_loss(
        S, T, Y, temperature=a, teacher_temperature=a + 1, hard_weight=a, soft_weight=2 * a, label_smoothing=a / 20
    ),
    "temperature": lambda a: tgt.distillation_loss(S, T, temperature=a),
    "jsd": lambda a: tgt.distillation_loss(S, T, divergence="jsd", beta=a / 10),
    "reference": lambda a: tgt.distillation_loss(
        S, T, Y, divergence="jsd", beta=a / 10, temperature=a, hard_weight=a, backend="reference"
    ),
    "normalizer": lambda a: tgt.distillation_loss(S, T, normalizer=a),
    "record": lambda a: tgt.distillation_loss(S, RECORD, Y, temperature=2.0, hard_weight=a, soft_weight=a),
    "linear": lambda a: tgt.linear_distillation_loss(
        H, W, TH, TW, Y, temperature=a, hard_weight=a, student_scale=a, teacher_scale=2 * a, normalizer=a
    ),
    "linear record": lambda a: tgt.linear_distillation_loss(
        H, W, teacher_logits=RECORD, target=Y, temperature=2.0, hard_weight=a
    ),
    "contrast": lambda a: tgt.contrastive_distillation_loss(Q, D, TQ, TD, temperature=a, hard_weight=a / 3),
    "soft embedding": lambda a: tgt.soft_embedding(S, TABLE, tau=a, gumbel=True).sum(),
    "tokens": lambda a: tgt.sample_tokens(T, temperature=a, top_p=a / 8, min_p=a / 100, seed=3).double().mean(),
}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def programs() -> int:
    return int(counters["stats"]["unique_graphs"])


def gradients(loss: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, LEAVES, allow_unused=True)) if loss.requires_grad else []


def check(compiled: Call, plain: Call, values: list[Any]) -> None:
    for value in values:
        got, expected = compiled(value), plain(value)
        torch.testing.assert_close(got, expected)
        for one, two in zip(gradients(got), gradients(expected), strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                torch.testing.assert_close(one, two)


# Numbers are told from tensors in one place, whatever the call: once a function.
@pytest.mark.once("torch.compile")
@pytest.mark.parametrize("name", ["dense", "linear", "contrast", "soft embedding", "tokens"])
def test_a_schedule_of_numbers_is_compiled_once_when_it_is_seen_to_change(name: str) -> None:
    call = CALLS[name]
    check(torch.compile(call, fullgraph=True, backend="aot_eager"), call, VALUES)
    assert programs() == 2  # the first number might have been a constant


@pytest.mark.once("torch.compile")
@pytest.mark.parametrize("name", [name for name in CALLS if name != "temperature"])
def test_a_schedule_of_tensors_is_compiled_once(name: str) -> None:
    call = CALLS[name]
    values = [torch.tensor(value, dtype=torch.float64) for value in VALUES]
    check(torch.compile(call, fullgraph=True, backend="aot_eager"), call, values)
    assert programs() == 1


@pytest.mark.once("torch.compile")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("temperature", float),
        ("teacher_temperature", torch.tensor),
        ("hard_weight", float),
        ("soft_weight", torch.tensor),
    ],
)
def test_settings_of_a_module_are_schedules_too(name: str, kind: Callable[[float], Any]) -> None:
    loss = tgt.DistillationLoss(hard_weight=1.0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for value in VALUES:
        setattr(loss, name, kind(value))
        torch.testing.assert_close(compiled(S, T, Y), loss(S, T, Y))
    assert programs() <= 2


@pytest.mark.once("torch.compile")
def test_a_training_step_with_a_schedule_is_compiled_once() -> None:
    """By the default backend, and through the objective."""
    teacher, student = toys.vector_teacher(), toys.student().eval()
    sampler = tgt.LatentSampler(teacher, sigma=0.5, units="absolute")
    objective = tgt.TGTObjective(teacher, sampler)
    x, y, ids = toys.normal(6, toys.FEATURES), torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6)

    def step() -> Any:
        return objective(student, x, y, sample_ids=ids, step=0)

    compiled = torch.compile(step, fullgraph=True)
    for value in VALUES:
        objective.loss.temperature = value
        objective.loss.hard_weight = value / 2
        objective.synthetic_weight = value / 3
        got, expected = compiled(), step()
        torch.testing.assert_close(got["loss"], expected["loss"])
        for part, term in expected["parts"].items():
            torch.testing.assert_close(got["parts"][part], term)
    assert programs() <= 2


@pytest.mark.once("torch.compile")
def test_a_weight_that_reaches_0_masks_by_the_target() -> None:
    def call(weight: Any) -> Tensor:
        return tgt.distillation_loss(S, T, Y, hard_weight=weight)

    weights = [torch.tensor(value) for value in (1.0, 0.5, 0.0)]
    check(torch.compile(call, fullgraph=True, backend="aot_eager"), call, weights)
    assert programs() == 1


def test_tensors_are_numbers_without_a_compiler_and_are_read_at_each_call() -> None:
    temperature = torch.tensor(2.0)
    loss = tgt.DistillationLoss(temperature=temperature)
    for value in (2.0, 1.0, 3.0):
        temperature.fill_(value)
        assert torch.equal(loss(S, T), tgt.distillation_loss(S, T, temperature=value))
        assert torch.equal(
            tgt.distillation_loss(S, T, temperature=temperature), tgt.distillation_loss(S, T, temperature=value)
        )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([2.0]), r"temperature must be a number, or one a row, \(6,\), got shape \(1,\)"),
        (torch.tensor(2.0, requires_grad=True), "temperature requires grad.*detach it"),
        (torch.tensor(-1.0), "temperature must be finite and in .*got -1.0"),
        (torch.tensor(True), "temperature must be a number"),
    ],
)
def test_tensors_that_are_no_temperature_are_refused(value: Tensor, message: str) -> None:
    with pytest.raises((ArgumentError, ShapeError), match=message):
        tgt.distillation_loss(S, T, temperature=value)  # type: ignore[arg-type]


def test_late_numbers_are_checked_where_they_are_read() -> None:
    compiled = torch.compile(CALLS["temperature"], fullgraph=True, backend="aot_eager")
    compiled(torch.tensor(2.0))
    with pytest.raises(ArgumentError, match="temperature must be finite and in"):
        compiled(torch.tensor(-2.0))


def test_numbers_that_stay_are_part_of_the_program() -> None:
    assert packed(DistillOptions(temperature=3.0))[-1] is None
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(node for node in graph.graph.nodes if "zeros" in str(node.target) or "stack" in str(node.target))
        return graph.forward

    torch.compile(lambda: tgt.distillation_loss(S, T, temperature=3.0), fullgraph=True, backend=backend)()
    assert not seen
