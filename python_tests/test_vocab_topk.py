"""``vocab_group`` against a top-k record, which is whole in each process: the loss and the gradient of all classes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import assert_close
from process_kit import all_made, in_processes, needs_processes
from torch import Tensor
from vocab_kit import CLASSES, ROWS, TERMS, Case, part_of

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels.options import TAILS, TOPK_DIVERGENCES

CASES = [
    (divergence, tail, terms, kind)
    for at, (divergence, tail, kind) in enumerate(
        itertools.product(TOPK_DIVERGENCES, TAILS, ("plain", "peaked", "masked"))
    )
    for terms in (list(TERMS)[at % len(TERMS)],)
]


# From hidden states: the record's tail, options, and how many of the student's classes the record knows.
HEADS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("bucket", {"divergence": "jsd", "hard_weight": 1.0, "label_smoothing": 0.1, "memory_budget": 700}, CLASSES),
    ("uniform", {"divergence": "reverse_kl", "memory_budget": 700, "student_softcap": 4.0}, CLASSES),
    ("renormalize", {"vocab_mask": torch.arange(CLASSES) % 5 != 3, "reduction": "none"}, CLASSES),
    ("renormalize", {"vocab_size": 30, "divergence": "jsd", "hard_weight": 0.5}, CLASSES),
    ("bucket", {"vocab_map": torch.arange(CLASSES - 4).flip(0) + 2}, CLASSES - 4),
)


def from_hidden(at: int, rank: int = 0, world: int = 1, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one of those, on all of the head or on a process's part."""
    tail, options, classes = HEADS[at]
    generator = torch.Generator().manual_seed(at)
    hidden, head, bias, logits = (
        torch.randn(*shape, generator=generator) for shape in ((ROWS, 6), (CLASSES, 6), (CLASSES,), (ROWS, classes))
    )
    record = tgt.topk_teacher(logits * 2, 5, 2.0, tail=tail)
    target = torch.arange(ROWS) * 5 % 30
    target[0], target[1] = -100, -1
    if world > 1:
        head, bias = part_of(head.t(), rank, world).t(), part_of(bias, rank, world)
    leaves = {"student_hidden": hidden, "student_weight": head, "student_bias": bias}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    loss = tgt.linear_distillation_loss(
        **leaves, teacher_logits=record, target=target if "hard_weight" in options else None, temperature=2.0,
        **options, **more,
    )  # fmt: skip
    (loss * torch.arange(1, ROWS + 1) if loss.dim() else loss).sum().backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def inputs(tail: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, tgt.TeacherTopK, Tensor]:
    made = "plain" if kind == "masked" else kind
    student, teacher, target, _ = Case("jsd", "soft", (2.0, 2.0), made, (dtype, torch.float32), "mean", False).inputs()
    record = tgt.topk_teacher(teacher, 5, 2.0, tail=tail)
    if kind == "masked":
        log_probs = record.log_probs.clone()
        log_probs[2, 3:] = -math.inf  # padding
        record = dataclasses.replace(record, log_probs=log_probs)
        student[3, record.ids[3, 0]] = -math.inf  # a listed class that the student cannot give
        student[4, 19:] = -math.inf  # a process has none that it can
        student[5] = torch.full((CLASSES,), -math.inf, dtype=dtype).scatter(0, record.ids[5], 1.0)  # no tail
        student[6, 30] = math.nan
        student[7] = -math.inf
    return student, record, target


def evaluated(
    student: Tensor, record: tgt.TeacherTopK, target: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = tgt.distillation_loss(leaf, record, target, temperature=2.0, beta=0.3, **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


@needs_processes
@pytest.mark.parametrize("world", [2, 4])
def test_records(world: int, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        made = []
        for divergence, tail, terms, kind in CASES:
            student, record, target = inputs(tail, kind)
            options = {"divergence": divergence, "reduction": "none", **TERMS[terms], "vocab_group": "world"}
            made.append(evaluated(part_of(student, rank, world), record, target, options))
        student, record, target = inputs("bucket", "plain", torch.float16)
        made.append(evaluated(part_of(student, rank, world), record, target, {"vocab_group": "world"}))
        with pytest.raises(ArgumentError, match="needs the teacher's logits"):
            evaluated(part_of(student, rank, world), record, target, {"vocab_group": "world", "return_stats": True})
        with pytest.raises(ShapeError, match=r"of all processes, has .* classes, the record 37"):
            tgt.linear_distillation_loss(
                torch.zeros(ROWS, 2), torch.zeros(19, 2), teacher_logits=record, temperature=2.0, vocab_group="world",
                vocab_offsets=[19 * at for at in range(world + 1)],
            )  # fmt: skip
        return made, [from_hidden(at, rank, world, vocab_group="world") for at in range(len(HEADS))]

    both = all_made(in_processes(world, tmp_path, work))
    found, of_heads = [logits for logits, _ in both], [heads for _, heads in both]
    for (divergence, tail, terms, kind), *parts in zip(CASES, *(one[:-1] for one in found), strict=True):
        options = {"divergence": divergence, "reduction": "none", **TERMS[terms]}
        loss, grad = evaluated(*inputs(tail, kind), options)
        assert all(torch.equal(own.nan_to_num(7), parts[0][0].nan_to_num(7)) for own, _ in parts)
        name = f"{divergence} {tail} {terms} {kind}"
        assert_close(f"loss, {name}", parts[0][0], loss, bar=1e-5, floor=1e-2 * ROWS**0.5)
        joined = torch.cat([own for _, own in parts], dim=-1)
        assert_close(f"gradient, {name}", joined, grad, bar=2e-5, floor=1e-2 * ROWS**0.5)
    loss, grad = evaluated(*inputs("bucket", "plain", torch.float16), {})
    torch.testing.assert_close(found[0][-1][0], loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([one[-1][1] for one in found], dim=-1), grad, rtol=2e-3, atol=1e-6)
    for at, (_, options, _) in enumerate(HEADS):
        loss, grads = from_hidden(at)
        parts = [one[at] for one in of_heads]
        assert all(torch.equal(own, parts[0][0]) for own, _ in parts)
        torch.testing.assert_close(parts[0][0], loss, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(own["student_hidden"], parts[0][1]["student_hidden"]) for _, own in parts)
        for name, grad in grads.items():
            whole = parts[0][1][name] if name == "student_hidden" else torch.cat([own[name] for _, own in parts])
            assert_close(f"{name}, {options}", whole, grad, bar=2e-5, floor=1e-2)
