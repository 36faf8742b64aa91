"""Heads that are sharded over processes: gathered for a call, with the gradients of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from process_kit import Collectives, all_made, in_processes, needs_processes, part
from torch import Tensor, nn

import tgt_fast as tgt

ROWS, WIDTH, CLASSES = 10, 4, 7


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data() -> tuple[Tensor, Tensor, Tensor]:
    target = torch.arange(ROWS) % CLASSES
    target[:4] = -100  # of the first process nearly all
    return torch.arange(ROWS) % CLASSES, normal(ROWS, CLASSES, seed=2), target


class Model(nn.Module):
    """Tokens -> hidden states, or their loss; the head may be the embedding."""

    def __init__(self, tied: bool, inside: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight
        self.inside = inside
        with torch.no_grad():
            for place, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=10 + place))

    def forward(self, ids: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        return self.loss(hidden, teacher, target) if self.inside else hidden

    def loss(self, hidden: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        made = tgt.linear_distillation_loss(
            hidden, self.head.weight, teacher_logits=teacher, target=target, hard_weight=1.0, count_group="world",
            student_bias=self.head.bias,
        )  # fmt: skip
        assert isinstance(made, Tensor)
        return made


def gradients(model: Model, rows: Any) -> tuple[Tensor, dict[str, Tensor]]:
    made = model(*rows)
    loss = made if model.inside else model.loss(made, *rows[1:])
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def shard(model: Model, how: str) -> Model:
    from torch.distributed.fsdp import fully_shard

    if how == "groups":  # the head and the embedding are groups of their own, and shards outside a forward
        tied = model.head.weight is model.embedding.weight
        for group in [[model.embedding, model.head]] if tied else [[model.embedding], [model.head]]:
            fully_shard(group)  # type: ignore[arg-type]
    return fully_shard(model)  # type: ignore[no-any-return]


CASES = [(tied, inside, how) for tied in (False, True) for inside in (False, True) for how in ("groups", "root")]


@needs_processes
@pytest.mark.parametrize("world", [1, 2, 4])
def test_heads_of_fully_shard(world: int, tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.fsdp", reason="no FSDP2")

    def work(rank: int) -> Any:
        return [gradients(shard(Model(tied, inside), how), part(data(), rank, world)) for tied, inside, how in CASES]

    found = all_made(in_processes(world, tmp_path, work))
    for place, (tied, inside, how) in enumerate(CASES):
        loss, grads = gradients(Model(tied, inside), data())
        mean = torch.stack([made[place][0] for made in found]).mean()
        torch.testing.assert_close(mean, loss, rtol=1e-6, atol=1e-7)
        for made in found:
            assert made[place][1].keys() == grads.keys()
            for name, grad in grads.items():
                said = f"{name} {tied, inside, how}: {{}}".format
                torch.testing.assert_close(made[place][1][name], grad, rtol=1e-5, atol=1e-6, msg=said)


@needs_processes
def test_gathered_once_in_the_dtype_of_the_hidden_states(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

        mesh = init_device_mesh("cpu", (2,))
        weight = distribute_tensor(normal(CLASSES, WIDTH, seed=1), mesh, [Shard(0)]).requires_grad_()
        teacher_head = distribute_tensor(normal(CLASSES, WIDTH, seed=3), mesh, [Shard(0)])
        hidden = part(normal(ROWS, WIDTH, seed=4), rank, 2).bfloat16()
        gathers: list[torch.dtype] = []
        full_tensor = DTensor.full_tensor

        def counted(self: Any, **options: Any) -> Any:
            gathers.append(self.dtype)
            return full_tensor(self, **options)

        DTensor.full_tensor = counted  # type: ignore[method-assign]
        with Collectives() as seen:
            tgt.linear_distillation_loss(hidden, weight, hidden, teacher_head, memory_budget=1).backward()
        assert seen.called == []
        assert gathers == [torch.bfloat16] * 2  # chunks of a row, and one gather of each head
        assert isinstance(weight.grad, DTensor)
        assert weight.grad.placements == (Shard(0),)
        assert weight.grad.dtype == torch.float32
        return True

    all_made(in_processes(2, tmp_path, work))


class Partitioned:
    """The attributes of a parameter of ZeRO-3, as far as a call needs them."""

    def __init__(self, parameter: nn.Parameter, log: list[str]) -> None:
        whole = parameter.data.clone()

        def all_gather(param_list: Any = None, **_: Any) -> None:
            log.append(f"all_gather {len(param_list)}")
            for one in param_list:
                one.data = one.ds_whole

        def partition(param_list: Any = None, has_been_updated: bool = False, **_: Any) -> None:
            log.append("partition")
            for one in param_list:
                one.data = torch.empty(0)

        parts = {"ds_id": 0, "ds_numel": whole.numel(), "ds_whole": whole}
        for name, value in {**parts, "all_gather": all_gather, "partition": partition}.items():
            setattr(parameter, name, value)
        parameter.data = torch.empty(0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_heads_of_zero_3(reduction: str) -> None:
    """By its protocol, which a stand-in follows."""
    hidden, teacher = normal(ROWS, WIDTH, seed=4), normal(ROWS, CLASSES, seed=2)

    def loss_of(weight: Tensor, bias: Tensor) -> Tensor:
        options: dict[str, Any] = {"teacher_logits": teacher, "student_bias": bias, "reduction": reduction}
        return tgt.linear_distillation_loss(hidden, weight, **options).sum()  # type: ignore[union-attr]

    plain = [nn.Parameter(normal(*shape, seed=5)) for shape in ((CLASSES, WIDTH), (CLASSES,))]
    expected = torch.autograd.grad(loss_of(*plain), plain)
    log: list[str] = []
    spread = [nn.Parameter(value.detach().clone()) for value in plain]
    for parameter in spread:
        Partitioned(parameter, log)
    loss = loss_of(*spread)
    assert log == ["all_gather 2", "partition"]
    assert not any(parameter.numel() for parameter in spread)
    torch.testing.assert_close(torch.autograd.grad(loss, spread), expected)
    spread[0].all_gather(param_list=spread)  # type: ignore[attr-defined]
    log.clear()
    torch.testing.assert_close(loss_of(*spread), loss_of(*plain))  # inside a forward pass they are there
    assert log == []
