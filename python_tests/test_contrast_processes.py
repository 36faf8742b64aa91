"""The contrastive loss across processes equals that of one process which holds all passages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from process_kit import all_made, in_processes, needs_processes
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.errors import ShapeError

WORLD, QUERIES, PASSAGES = 2, 3, 5
COUNTS = "the processes bring [5, 4] rows of student_d"


def _towers() -> list[Tensor]:
    """All processes' rows: queries and passages of the student, then of the teacher."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(WORLD * rows, width) for width in (4, 6) for rows in (QUERIES, PASSAGES)]
    return [torch.randn(*shape, generator=generator) for shape in shapes]


# Each process's passages are its queries' own, then extra ones; 2 is a copy of the other process's 0.
IDS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 8, 4])
POSITIVES = torch.tensor([[0, 1, 2], [2, -1, 0]])  # within a process's own passages


def _mine(rows: Tensor, rank: int) -> Tensor:
    count = rows.shape[0] // WORLD
    return rows[rank * count : (rank + 1) * count]


def _work(rank: int) -> dict[str, Any]:
    t = [_mine(x, rank).clone().requires_grad_() for x in _towers()]
    loss = tgt.contrastive_distillation_loss(
        *t, temperature=0.5, hard_weight=1.0, positives=POSITIVES[rank], passage_ids=_mine(IDS, rank), gather=True
    )
    loss.backward()
    made: dict[str, Any] = {"loss": loss.detach(), "grads": [x.grad for x in t], "error": ""}
    halves = [x.detach().bfloat16().requires_grad_() for x in t]
    tgt.contrastive_distillation_loss(*halves, temperature=0.5, gather=True).backward()
    made["halves"] = [x.grad for x in halves]
    fewer = [x if x.shape[0] == QUERIES else x[: PASSAGES - rank] for x in t]
    try:
        tgt.contrastive_distillation_loss(*fewer, temperature=0.5, gather=True)
    except ShapeError as error:
        made["error"] = str(error)
    return made


@needs_processes
def test_two_processes_equal_one(native: str, tmp_path: Path) -> None:
    found = all_made(in_processes(WORLD, tmp_path, _work))
    t = [x.requires_grad_() for x in _towers()]
    positives = torch.where(POSITIVES >= 0, POSITIVES + PASSAGES * torch.arange(WORLD)[:, None], POSITIVES).flatten()
    losses = tgt.contrastive_distillation_loss(
        *t, temperature=0.5, hard_weight=1.0, positives=positives, passage_ids=IDS, reduction="none"
    )
    for rank, losses_of_rank in enumerate(losses.chunk(WORLD)):
        torch.testing.assert_close(found[rank]["loss"], losses_of_rank.mean().detach())
    losses.mean().backward()
    for place, x in enumerate(t):
        # Averaged over processes, as DistributedDataParallel does, they are those of the mean over all queries.
        grads = torch.cat([of_rank["grads"][place] for of_rank in found]) / WORLD
        assert x.grad is not None
        assert x.grad.abs().max() > 1e-3
        torch.testing.assert_close(grads, x.grad)
    halves = [x.detach().bfloat16().requires_grad_() for x in t]
    tgt.contrastive_distillation_loss(*halves, temperature=0.5).backward()
    for place, x in enumerate(halves):
        grads = torch.cat([of_rank["halves"][place] for of_rank in found])
        assert grads.dtype == torch.bfloat16
        assert x.grad is not None
        torch.testing.assert_close(grads.float() / WORLD, x.grad.float(), rtol=2e-2, atol=1e-3)
    assert all(COUNTS in of_rank["error"] for of_rank in found)
