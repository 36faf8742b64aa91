"""Losses whose classes are spread over processes, as a compiler sees them: the same bits, collectives in sight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from process_kit import all_made, in_processes, needs_processes
from torch import Tensor
from vocab_kit import CLASSES, Case, part_of

import tgt_fast as tgt
from tgt_fast.kernels.calls import DistillCall
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.ops._distill_op import packed_call
from tgt_fast.ops.vocab_parallel import library
from tgt_fast.ops.vocab_parallel.opening import STATE

WORLD = 2


def through_autograd(seen: list[list[str]]) -> Any:
    """A backend of the compiler that notes each forward's collectives and runs its graph as it is."""

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def looked_at(made: torch.fx.GraphModule, _: Any) -> Any:
            seen.append([str(node.target) for node in made.graph.nodes if "c10d" in str(node.target)])
            return made.forward

        return aot_autograd(fw_compiler=looked_at, bw_compiler=lambda made, _: made.forward)(graph, inputs)

    return backend


def of_logits(rank: int) -> tuple[Any, list[Tensor]]:
    case = Case("jsd", "smoothed", (2.0, 2.0), "peaked", (torch.float32, torch.float32), "mean", True)
    student, teacher, target, weight = case.inputs()

    def loss_of(late: Any, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        options = {**case.options, "temperature": late}
        loss, stats = tgt.distillation_loss(
            s * 1.0, t, target, sample_weight=weight, vocab_group=torch.distributed.group.WORLD, return_stats=True,
            **options,
        )  # fmt: skip
        return loss, stats.kl

    return loss_of, [part_of(student, rank, WORLD), part_of(teacher, rank, WORLD)]


def of_a_record(rank: int) -> tuple[Any, list[Tensor]]:
    case = Case("jsd", "smoothed", (2.0, 2.0), "peaked", (torch.float32, torch.float32), "mean", True)
    student, teacher, target, weight = case.inputs()
    record = tgt.topk_teacher(teacher, 5, 2.0)

    def loss_of(late: Any, s: Tensor) -> tuple[Tensor, ...]:
        made = tgt.TeacherTopK(record.ids, record.log_probs, record.tail_log_prob, 2.0, CLASSES)
        loss = tgt.distillation_loss(
            s * 1.0, made, target, sample_weight=weight, vocab_group=torch.distributed.group.WORLD,
            **{**case.options, "hard_weight": late},
        )  # fmt: skip
        return (loss,)

    return loss_of, [part_of(student, rank, WORLD)]


def of_heads(rank: int) -> tuple[Any, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    hidden, head, bias, teacher_hidden, teacher_head = (
        torch.randn(*shape, generator=generator) for shape in ((8, 4), (CLASSES, 4), (CLASSES,), (8, 5), (CLASSES, 5))
    )
    head, bias, teacher_head = (part_of(x.t(), rank, WORLD).t() for x in (head, bias, teacher_head))
    target = torch.arange(8) * 4

    def loss_of(late: Any, h: Tensor, w: Tensor, b: Tensor, th: Tensor) -> tuple[Tensor, ...]:
        loss = tgt.linear_distillation_loss(
            h, w, th, teacher_head, target, student_bias=b, student_scale=late, memory_budget=1000, hard_weight=0.5,
            vocab_group=torch.distributed.group.WORLD,
        )  # fmt: skip
        return (loss,)

    return loss_of, [hidden, head, bias, teacher_hidden]


def of_heads_and_a_record(rank: int) -> tuple[Any, list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    hidden, head, logits = (torch.randn(*shape, generator=generator) for shape in ((8, 4), (CLASSES, 4), (8, CLASSES)))
    record = tgt.topk_teacher(logits, 5, 2.0, tail="uniform")

    def loss_of(late: Any, h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        made = tgt.TeacherTopK(record.ids, record.log_probs, record.tail_log_prob, 2.0, CLASSES, "uniform")
        loss = tgt.linear_distillation_loss(
            h, w, teacher_logits=made, soft_weight=late, temperature=2.0,
            vocab_group=torch.distributed.group.WORLD,
        )  # fmt: skip
        return (loss,)

    return loss_of, [hidden, part_of(head.t(), rank, WORLD).t()]


# What a program's forward has of collectives: for maxima, for sums, for the sums of jsd or of a record's entries, and
# for statistics; from hidden states in each of two chunks, with one for their gradients; before them one for the number
# of classes that share a uniform tail.
CALLS: dict[str, tuple[Any, int]] = {
    "logits": (of_logits, 6), "record": (of_a_record, 3), "heads": (of_heads, 2 * 3),
    "heads and a record": (of_heads_and_a_record, 4),
}  # fmt: skip


@pytest.mark.once("torch.compile")
@needs_processes
def test_compiled_calls_are_the_same(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        counted = {}
        for name, (make, _) in CALLS.items():
            loss_of, tensors = make(rank)
            seen: list[list[str]] = []
            compiled = torch.compile(loss_of, backend=through_autograd(seen), fullgraph=True)
            made = []
            for run in (loss_of, compiled):
                leaves = [side.clone().requires_grad_() for side in tensors]
                with torch.autocast("cpu", torch.bfloat16):
                    loss, *rest = run(torch.tensor(3.0), *leaves)  # which is read when the program runs
                loss.sum().backward()
                made.append([loss.detach(), *rest, *(x.grad for x in leaves if x.grad is not None)])
            for eager, traced in zip(*made, strict=True):
                if name == "heads":  # a scale that is not known yet multiplies hidden states before
                    torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(eager, traced), name
            assert len(seen) == 1
            counted[name] = [sum(word in target for target in seen[0]) for word in ("all_reduce", "wait_tensor")]
        return counted

    for counted in all_made(in_processes(WORLD, tmp_path, work)):
        assert counted == {name: [count, count] for name, (_, count) in CALLS.items()}


@pytest.mark.once("torch.compile")
def test_opcheck() -> None:
    """Of a group of no others, which needs no processes."""
    student, teacher = torch.randn(5, CLASSES), torch.randn(5, CLASSES)
    call = DistillCall(DistillOptions("jsd", hard_weight=1.0), student, teacher, torch.tensor([0, 3, -1, -100, 7]))
    alone = ([], 0, CLASSES, CLASSES, CLASSES)
    leaf = packed_call(call._replace(student=student.clone().requires_grad_()))
    checks = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    torch.library.opcheck(library.vocab_distillation_loss, (*leaf, True, "auto", *alone), **checks)
    plain = packed_call(call)
    torch.library.opcheck(library.vocab_rows, (*plain, "auto", "opened", []), **checks)
    state = torch.rand(5, STATE, dtype=torch.float64)
    torch.library.opcheck(library.vocab_gradients, (*plain, state, torch.ones(()), "auto", True, True), **checks)
