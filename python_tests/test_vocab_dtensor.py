"""The soft-label loss on DTensors, whatever they are sharded on: that of whole tensors, gradients as inputs lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from process_kit import all_made, in_processes, needs_processes
from test_vocab_linear import CALLS
from test_vocab_linear import evaluated as evaluated_heads
from test_vocab_linear import inputs as heads
from torch import Tensor
from vocab_kit import Case, evaluated

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError

CASES = (
    Case("forward_kl", "smoothed", (2.0, 2.0), "masked", (torch.float32, torch.float32), "mean", True),
    Case("jsd", "hard", (1.0, 1.0), "peaked", (torch.float32, torch.float32), "mean", False),
    Case("reverse_kl", "soft", (1.0, 2.0), "plain", (torch.float32, torch.float32), "none", True),
    Case("mse", "hard", (1.0, 1.0), "plain", (torch.bfloat16, torch.float32), "sum", False),
)


def layouts(world: int) -> list[tuple[tuple[int, ...], str, str, str]]:
    """Meshes, and placements of student, teacher and target along their dimensions: C(lasses), R(ows), W(hole)."""
    if world == 2:
        made = [((2,), *one.split()) for one in ("C C W", "C W W", "W C W", "R R R", "R W W", "W R W", "W W R")]
    else:
        made = [((2, 2), *one.split()) for one in ("RC RC RW", "CR WR WR", "CC CC WW", "WC RC WW", "RR RW WW")]
    return made  # type: ignore[return-value]


@needs_processes
@pytest.mark.parametrize("world", [2, 4])
def test_layouts(world: int, tmp_path: Path) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    whole = [evaluated(case, *case.inputs()) for case in CASES]

    def work(rank: int) -> Any:
        kinds = {"C": Shard(1), "R": Shard(0), "W": Replicate()}
        for sizes, *words in layouts(world):
            mesh = init_device_mesh("cpu", sizes)
            placed = [[kinds[letter] for letter in word] for word in words]
            for case, (loss, d_student, d_teacher, stats) in list(zip(CASES, whole, strict=True))[: 6 - world]:
                student, teacher, target, weight = case.inputs()
                leaves = [distribute_tensor(x, mesh, p).requires_grad_() for x, p in zip((student, teacher), placed)]  # noqa: B905
                out, own = tgt.distillation_loss(
                    *leaves, distribute_tensor(target, mesh, placed[2]), sample_weight=weight, return_stats=True,
                    **case.options,
                )  # fmt: skip
                assert isinstance(out, DTensor)
                if case.reduction != "none":
                    assert all(p == Replicate() for p in out.placements)
                    out.backward()
                else:
                    out.sum().backward()
                close(out, loss)
                for leaf, grad in zip(leaves, (d_student, d_teacher), strict=True):
                    assert isinstance(leaf.grad, DTensor)
                    assert leaf.grad.placements == leaf.placements
                    close(leaf.grad, grad)
                for mine, theirs in zip(own, stats, strict=True):
                    close(mine, theirs)
            records(mesh, placed[0])
        edges(mesh_of_one_dimension(world))
        return refusals(mesh_of_one_dimension(world))

    for messages in all_made(in_processes(world, tmp_path, work)):
        assert "classes would have to be gathered" in messages[0]
        assert "must be Shard or Replicate along each dimension of the mesh, got P" in messages[1]
        assert "vocab_group is for plain tensors" in messages[2]
        assert "beside a DTensor a plain tensor is whole in each process" in messages[3]
        assert "inplace=True needs student_logits that lie as the loss takes them" in messages[4]


def records(mesh: Any, placements: list[Any]) -> None:
    """A record, whole in each process, beside logits that lie somehow, and beside hidden states and a head."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    student, teacher, target, weight = CASES[0].inputs()
    record = tgt.topk_teacher(teacher.nan_to_num(0.0, posinf=0.0), 5, 2.0, tail="uniform")
    options = {"temperature": 2.0, "hard_weight": 1.0, "divergence": "reverse_kl"}
    leaf, whole = distribute_tensor(student, mesh, placements).requires_grad_(), student.clone().requires_grad_()
    loss = tgt.distillation_loss(whole, record, target, sample_weight=weight, **options)
    (expected,) = torch.autograd.grad(loss, whole)
    out = tgt.distillation_loss(leaf, record, target, sample_weight=weight, **options)
    out.backward()
    close(out, loss.detach())
    assert leaf.grad.placements == leaf.placements
    close(leaf.grad, expected)

    generator = torch.Generator().manual_seed(5)
    hidden, head = (torch.randn(*shape, generator=generator) for shape in ((len(student), 6), (student.shape[1], 6)))
    rows = [p if p == Shard(0) else Replicate() for p in placements]
    classes = [Shard(0) if p == Shard(1) else Replicate() for p in placements]
    placed = [distribute_tensor(x, mesh, p).requires_grad_() for x, p in ((hidden, rows), (head, classes))]
    leaves = [x.clone().requires_grad_() for x in (hidden, head)]
    loss = tgt.linear_distillation_loss(*leaves, teacher_logits=record, target=target, **options)
    loss.backward()
    out = tgt.linear_distillation_loss(*placed, teacher_logits=record, target=target, **options)
    out.backward()
    close(out, loss.detach())
    for mine, theirs in zip(placed, leaves, strict=True):
        close(mine.grad, theirs.grad)

    calls = [
        lambda logits, _: tgt.distillation_loss(logits, record, target, return_stats=True, **options),
        lambda _, sides: tgt.linear_distillation_loss(
            *sides, teacher_logits=record, target=target, return_stats=True, **options
        ),
    ]
    for call in calls:
        if any(p == Shard(1) for p in placements):
            with pytest.raises(ArgumentError, match="return_stats=True needs the teacher's logits with classes in sev"):
                call(leaf, placed)
        else:
            (_, mine), (_, theirs) = call(leaf, placed), call(whole, leaves)
            assert isinstance(mine, tgt.RecordStats)
            for value, its in zip(mine, theirs, strict=True):
                close(value, its)

    # Shares of the classes as targets lie as logits do.
    shares = torch.rand(student.shape, generator=generator)
    of_logits = [distribute_tensor(x, mesh, placements) for x in (teacher.nan_to_num(0.0, posinf=0.0), shares)]
    for given in (shares, of_logits[1]):
        out = tgt.linear_distillation_loss(*placed, teacher_logits=of_logits[0], target=given, hard_weight=0.5)
        close(out, tgt.linear_distillation_loss(
            *leaves, teacher_logits=of_logits[0].full_tensor(), target=shares, hard_weight=0.5
        ).detach())  # fmt: skip
        out = tgt.distillation_loss(leaf, of_logits[0], given, hard_weight=0.5)
        close(out, tgt.distillation_loss(whole, of_logits[0].full_tensor(), shares, hard_weight=0.5).detach())


def edges(mesh: Any) -> None:
    """Processes without a class or a row; dimensions counted from the end; classes elsewhere; in place."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    generator = torch.Generator().manual_seed(6)
    for (*shape, classes), placement, options in (
        ((6, 5), Shard(-1), {}), ((1, 5), Shard(0), {"reduction": "none"}), ((6, 5), Shard(1), {"inplace": True}),
        ((2, 5, 3), Shard(1), {"class_dim": 1}),
    ):  # fmt: skip
        rest: dict[str, Any] = dict(options)
        student, teacher = (torch.randn(*shape, classes, generator=generator) for _ in range(2))

        def loss_of(leaf: Any, given: Any, rest: dict[str, Any] = rest) -> Any:
            return tgt.distillation_loss(leaf * 1.0, given, temperature=2.0, **rest)

        whole = student.clone().requires_grad_()
        expected = loss_of(whole, teacher)
        expected.sum().backward()
        leaf = distribute_tensor(student, mesh, [placement]).requires_grad_()
        for given in (distribute_tensor(teacher, mesh, [placement]), distribute_tensor(teacher, mesh, [Replicate()])):
            leaf.grad = None
            loss = loss_of(leaf, given)
            loss.sum().backward()
            close(loss, expected.detach())
            close(leaf.grad, whole.grad)  # type: ignore[arg-type]


def mesh_of_one_dimension(world: int) -> Any:
    from torch.distributed.tensor import init_device_mesh

    return init_device_mesh("cpu", (world,))


def close(made: Any, expected: Tensor) -> None:
    whole = made.full_tensor()
    whole, expected = whole.double(), expected.double()
    torch.testing.assert_close(whole, expected, rtol=2e-5, atol=2e-6, equal_nan=True)


def refusals(mesh: Any) -> list[str]:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    logits = torch.zeros(8, 12)
    rows, classes, whole = (distribute_tensor(logits, mesh, [p]) for p in (Shard(0), Shard(1), Replicate()))
    partial = DTensor.from_local(logits, mesh, [Partial()], run_check=False)
    messages = []
    for call in (
        lambda: tgt.distillation_loss(rows, classes),
        lambda: tgt.distillation_loss(partial, classes),
        lambda: tgt.distillation_loss(classes, classes, vocab_group="world"),
        lambda: tgt.distillation_loss(classes, logits[:, :3]),
        lambda: tgt.distillation_loss(whole, classes, inplace=True),
    ):
        with pytest.raises((ValueError, RuntimeError)) as raised:
            call()
        messages.append(str(raised.value))
    return messages


# ---- from hidden states ----

# Along each dimension of the mesh: hidden states (both sides), the student's head, the teacher's head or logits.
LINEAR = {2: ("W C C", "R W W", "W C W", "W W W"), 4: ("WR CW CW", "RR WW WW", "WW CC CC")}


@needs_processes
@pytest.mark.parametrize("world", [2, 4])
def test_layouts_of_heads(world: int, tmp_path: Path) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    calls = [CALLS[0], CALLS[3], CALLS[4]]
    whole = [evaluated_heads(heads(dtype, options), options) for dtype, options in calls]

    def work(rank: int) -> Any:
        mesh = init_device_mesh("cpu", (2,) if world == 2 else (2, 2))
        for line in LINEAR[world]:
            hidden, of_student, of_teacher = line.split()
            for (dtype, options), (loss, grads, stats) in zip(calls, whole, strict=True):
                placed = {}
                for name, tensor in heads(dtype, options).items():
                    word = hidden if name.endswith("hidden") else of_student if "student" in name else of_teacher
                    dim = 1 if name == "teacher_logits" else 0
                    kinds = {"C": Shard(dim), "R": Shard(0), "W": Replicate()}
                    if name == "teacher_logits":
                        word = "".join(h if h == "R" else c for h, c in zip(hidden, word, strict=True))
                    placed[name] = distribute_tensor(tensor, mesh, [kinds[letter] for letter in word])
                own_loss, own, own_stats = evaluated_heads(placed, options)
                close(own_loss, loss)
                assert own.keys() == grads.keys()
                for name, grad in own.items():
                    assert isinstance(grad, DTensor)
                    assert grad.placements == placed[name].placements, (line, name)
                    close(grad, grads[name])
                for mine, theirs in zip(own_stats, stats, strict=True):
                    close(mine, theirs)
        rows, classes = (distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)] * mesh.ndim) for _ in range(2))
        with pytest.raises(ValueError, match="are cut differently: classes would have to be gathered") as raised:
            tgt.linear_distillation_loss(rows, classes, rows, classes)
        return str(raised.value)

    assert all_made(in_processes(world, tmp_path, work))
