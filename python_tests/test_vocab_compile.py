"""Losses whose classes are spread over processes, as a compiler sees them: the same bits, collectives in sight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


@needs_processes
def test_a_compiled_call_is_the_same(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        case = Case("jsd", "smoothed", (2.0, 2.0), "peaked", (torch.float32, torch.float32), "mean", True)
        student, teacher, target, weight = case.inputs()
        sides = part_of(student, rank, WORLD), part_of(teacher, rank, WORLD)
        group, seen = torch.distributed.group.WORLD, []

        def loss_of(s: Tensor, t: Tensor, temperature: Any) -> tuple[Tensor, Tensor]:
            options = {**case.options, "temperature": temperature}
            loss, stats = tgt.distillation_loss(
                s * 1.0, t, target, sample_weight=weight, vocab_group=group, return_stats=True, **options
            )
            return loss, stats.kl

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            from torch._dynamo.backends.common import aot_autograd

            def looked_at(made: torch.fx.GraphModule, _: Any) -> Any:
                seen.append([str(node.target) for node in made.graph.nodes if "c10d" in str(node.target)])
                return made.forward

            return aot_autograd(fw_compiler=looked_at, bw_compiler=lambda made, _: made.forward)(graph, inputs)

        compiled = torch.compile(loss_of, backend=backend, fullgraph=True)
        made = []
        for run in (loss_of, compiled):
            leaves = [side.clone().requires_grad_() for side in sides]
            with torch.autocast("cpu", torch.bfloat16):
                loss, kl = run(*leaves, torch.tensor(3.0))  # which is read when the program runs
            loss.backward()
            made.append((loss.detach(), kl, *(leaf.grad for leaf in leaves)))
        for eager, traced in zip(*made, strict=True):
            assert torch.equal(eager, traced)
        return seen

    for seen in all_made(in_processes(WORLD, tmp_path, work)):
        assert len(seen) == 1
        for names in seen:
            assert sum("all_reduce" in name for name in names) == 6  # maxima, sums, jsd's; and those of statistics
            assert sum("wait_tensor" in name for name in names) == 6


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
