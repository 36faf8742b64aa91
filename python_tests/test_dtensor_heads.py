"""A head that is sharded over processes: what the refusal advises gives the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing

import tgt_fast as tgt
from tgt_fast.errors import DTypeError

WORLD, ROWS = 2, 4


def _data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((WORLD * ROWS, 4), (6, 4), (WORLD * ROWS, 6)))  # type: ignore[return-value]


def _worker(rank: int, folder: str) -> None:
    from torch.distributed.tensor import Partial, Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        hidden, weight, teacher = _data()
        mine = slice(rank * ROWS, (rank + 1) * ROWS)
        head = distribute_tensor(weight, init_device_mesh("cpu", (WORLD,)), [Shard(0)]).requires_grad_()
        with pytest.raises(DTypeError, match=r"student_weight is a DTensor.*grad_placements=\[Partial\('avg'\)\]"):
            tgt.linear_distillation_loss(hidden[mine], head, teacher_logits=teacher[mine])
        whole = head.full_tensor(grad_placements=[Partial("avg")])
        tgt.linear_distillation_loss(hidden[mine], whole, teacher_logits=teacher[mine]).backward()
        gradient = head.grad.full_tensor()
        if rank == 0:
            torch.save(gradient, f"{folder}/gradient.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_the_advice_gives_the_gradient_of_the_mean_over_all_processes(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.tensor")
    multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=WORLD)
    hidden, weight, teacher = _data()
    weight.requires_grad_()
    tgt.linear_distillation_loss(hidden, weight, teacher_logits=teacher).backward()
    torch.testing.assert_close(torch.load(tmp_path / "gradient.pt"), weight.grad)
