"""The adjustments of a loss where it is taken from hidden states, by a module, and in the objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from test_adjustments import ALL, BIAS, CLASSES, HARD, MARGIN, OTHER_BIAS, ROWS, T_ROWS, TARGET, TT_ROWS, WEIGHT, pair

import tgt_fast as tgt

LINEAR: list[dict[str, Any]] = [
    {**HARD, "label_margin": MARGIN, "standardize": True, "decoupled": (1.0, 2.0), "temperature": T_ROWS},
    {"skew": 0.2, "teacher_temperature": TT_ROWS, "reduction": "none"},
    {"correct_teacher": 0.3, "reduction": "sum"},
]


@pytest.mark.parametrize("number", range(len(LINEAR)))
def test_from_hidden_states(backend: str, number: int) -> None:
    """Two chunks and more give what the logits give, and so do the modules."""
    if backend == "reference" and number:
        return
    options = LINEAR[number]
    hidden, weight = toys.normal(ROWS, 5, seed=10).requires_grad_(), toys.normal(CLASSES, 5, seed=11).requires_grad_()
    theirs, head = toys.normal(ROWS, 6, seed=12).requires_grad_(), toys.normal(CLASSES, 6, seed=13)
    inputs = (hidden, weight, theirs)
    logits = (hidden @ weight.T, theirs @ head.T, TARGET)
    plain: Any = tgt.distillation_loss(*logits, sample_weight=WEIGHT, backend="reference", **options)
    made: Any = tgt.linear_distillation_loss(
        hidden, weight, theirs, head, TARGET, sample_weight=WEIGHT, memory_budget=900, backend=backend, **options
    )
    up = torch.linspace(0.5, 2.0, plain.numel()).reshape(plain.shape)
    torch.testing.assert_close(made, plain, rtol=1e-5, atol=1e-5)
    for found, expected in zip(
        torch.autograd.grad(made, inputs, up), torch.autograd.grad(plain, inputs, up), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    module = tgt.LinearDistillationLoss(backend=backend, **options)
    torch.testing.assert_close(module(hidden, weight, theirs, head, TARGET, sample_weight=WEIGHT), made)
    assert torch.isfinite(module.soft(hidden, weight, theirs, head)).all()
    assert "label_margin" not in module.state_dict()


@pytest.mark.once("torch.compile")
@pytest.mark.parametrize("number", range(len(LINEAR)))
def test_from_hidden_states_when_compiled(native: str, number: int) -> None:
    options: dict[str, Any] = {**LINEAR[number], "memory_budget": 900, "backend": native}
    hidden, weight = toys.normal(ROWS, 5, seed=10).requires_grad_(), toys.normal(CLASSES, 5, seed=11).requires_grad_()
    theirs, head = toys.normal(ROWS, 6, seed=12).requires_grad_(), toys.normal(CLASSES, 6, seed=13)

    def step() -> Any:
        return tgt.linear_distillation_loss(hidden, weight, theirs, head, TARGET, sample_weight=WEIGHT, **options)

    eager, loss = step(), torch.compile(step, backend="aot_eager", fullgraph=True)()
    up = torch.linspace(0.5, 2.0, eager.numel()).reshape(eager.shape)
    for found, expected in zip(
        (loss, *torch.autograd.grad(loss, (hidden, weight, theirs), up)),
        (eager, *torch.autograd.grad(eager, (hidden, weight, theirs), up)), strict=True,
    ):  # fmt: skip
        assert torch.equal(found, expected)


def test_the_module_and_its_soft_term() -> None:
    s, t = pair()
    module = tgt.DistillationLoss(**ALL, teacher_bias=OTHER_BIAS)
    made = tgt.distillation_loss(s, t, TARGET, teacher_bias=OTHER_BIAS, **ALL)
    torch.testing.assert_close(module(s, t, TARGET), made)
    soft = tgt.distillation_loss(s, t, soft_weight=0.4, student_bias=BIAS, teacher_bias=OTHER_BIAS, standardize=True)
    torch.testing.assert_close(module.soft(s, t), soft)
    assert {name for name, _ in module.named_buffers()} == {"student_bias", "teacher_bias", "label_margin"}
    assert not module.state_dict()
    assert repr(module) == (
        "DistillationLoss(divergence='forward_kl', soft_weight=0.4, hard_weight=0.7, student_bias=..., "
        "teacher_bias=..., label_margin=..., standardize=True, decoupled=(1.0, 2.0))"
    )
    assert module.double().student_bias.dtype == torch.float64
    assert "temperature=..." in repr(tgt.DistillationLoss(temperature=T_ROWS))


def test_the_objective_takes_them() -> None:
    """The hard part that it reports is that of the adjusted logits."""
    model, labeler = torch.nn.Linear(4, CLASSES), torch.nn.Linear(4, CLASSES)
    teacher = tgt.Teacher(torch.nn.Identity(), torch.nn.Identity(), labeler)
    x, y = toys.normal(6, 4, seed=20), torch.arange(6)
    loss = tgt.DistillationLoss(hard_weight=1.0, student_bias=BIAS, label_margin=MARGIN, decoupled=(1.0, 2.0))
    made = tgt.TGTObjective(teacher, loss=loss)(model, x, y)
    alone = tgt.distillation_loss(
        model(x), labeler(x).detach(), y, soft_weight=0.0, hard_weight=1.0, student_bias=BIAS, label_margin=MARGIN
    )
    torch.testing.assert_close(made["parts"]["hard"], alone.detach())
    whole = loss(model(x), labeler(x).detach(), y)
    torch.testing.assert_close(made["loss"], whole)
