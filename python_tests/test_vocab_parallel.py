"""``vocab_group``: logits whose classes are spread over processes have the loss and the gradients of all classes."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated_gpu import tensors_on_an_emulated_gpu
from numerics import assert_close, assert_matches_truth, magnitude, relative_error, truth
from process_kit import Raised, all_made, in_processes, needs_processes
from torch import Tensor
from vocab_kit import CLASSES, OFFSETS, ROWS, Case, cases, evaluated, joined, part_of
from waiting import NothingWaits

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.calls import DistillCall
from tgt_fast.kernels.options import DIVERGENCES, TAILS, DistillOptions, DistillStats
from tgt_fast.ops.topk import rows_of
from tgt_fast.ops.vocab_parallel import library, opening, shards
from tgt_fast.ops.vocab_parallel.kernel import row_kernel

worlds = pytest.mark.parametrize("world", [2, 4])
PLAIN = Case("forward_kl", "smoothed", (2.0, 2.0), "plain", (torch.float32, torch.float32), "mean", False)


def assert_they_are(case: Case, parts: list[Any]) -> None:
    """What the processes made is what one would have."""
    result = joined(parts)
    student, teacher, target, weight = case.inputs()
    options = dict(case.options)
    expected = truth(student, teacher, target, sample_weight=weight, **options)
    ts, tt = case.temperatures
    hard = case.terms != "soft"
    assert_matches_truth(
        result, expected, student, teacher, divergence=case.divergence, temperature=ts, teacher_temperature=tt,
        hard=hard,
    )  # fmt: skip
    loss, d_student, d_teacher, stats = evaluated(case, student, teacher, target, weight)
    bar = 1e-5 * max(1.0, magnitude(student / ts, teacher / tt) / 10)
    for name, out, own in zip(DistillStats._fields, result.stats or stats, stats, strict=True):
        assert_close(name, out.double(), own.double(), bar=bar, floor=1e-2 * ROWS**0.5)
    if case.dtypes == (torch.float32, torch.float32) and case.kind != "far":
        assert_close("loss", result.loss, loss, bar=bar, floor=1e-2)
        for out, own in ((result.d_student, d_student), (result.d_teacher, d_teacher)):
            assert out is not None
            usable = own.isfinite()
            out, own = torch.where(usable, out, 0.0), torch.where(usable, own, 0.0)
            assert relative_error(out, own, 1e-2) < 2e-5, case


@needs_processes
@worlds
def test_loss_and_gradients_are_those_of_all_classes(world: int, tmp_path: Path) -> None:
    every = cases()

    def work(rank: int) -> Any:
        made = []
        for case in every:
            student, teacher, target, weight = case.inputs()
            sides = part_of(student, rank, world), part_of(teacher, rank, world)
            made.append(evaluated(case, *sides, target, weight, vocab_group="world"))
        return made

    found = all_made(in_processes(world, tmp_path, work))
    for case, *parts in zip(every, *found, strict=True):
        assert_they_are(case, parts)


@needs_processes
def test_on_a_device(emulated: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states that the CUDA kernels leave, on an emulated device, and the way that waits for no device."""
    monkeypatch.setattr(opening, "on_host", lambda tensor: False)
    hard = [case for case in cases() if case.terms != "soft" and case.dtypes[1] == torch.float32]
    every = [case for kind in DIVERGENCES for case in [one for one in hard if one.divergence == kind][:2]]
    record_case = Case("jsd", "smoothed", (2.0, 2.0), "peaked", (torch.float32, torch.float32), "none", False)
    student, teacher, target, _ = record_case.inputs()
    records = [tgt.topk_teacher(teacher, 5, 2.0, tail=tail) for tail in TAILS]

    def of_record(record: tgt.TeacherTopK, logits: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        loss = tgt.distillation_loss(leaf, record, target, **record_case.options, **more)
        loss.sum().backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    def work(rank: int) -> Any:
        with tensors_on_an_emulated_gpu(emulated):
            made = []
            for case in every:
                student, teacher, target, weight = case.inputs()
                sides = part_of(student, rank, 2), part_of(teacher, rank, 2)
                made.append(evaluated(case, *sides, target, weight, vocab_group="world"))
            mine = part_of(record_case.inputs()[0], rank, 2)
            return made, [of_record(record, mine, vocab_group="world") for record in records]

    found = all_made(in_processes(2, tmp_path, work))
    for case, *parts in zip(every, *(made for made, _ in found), strict=True):
        assert_they_are(case, parts)
    for record, *halves in zip(records, *(of_records for _, of_records in found), strict=True):
        loss, grad = of_record(record, student)
        torch.testing.assert_close(halves[0][0], loss, rtol=1e-5, atol=1e-6)
        assert relative_error(torch.cat([own for _, own in halves], dim=-1), grad, 1e-2) < 2e-5


@needs_processes
@worlds
def test_a_call(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What travels; the same bits again; in place; backward twice; in float16; what is refused."""
    student, teacher, target, _ = PLAIN.inputs()
    offsets = OFFSETS[world]

    def work(rank: int) -> Any:
        sent: list[int] = []
        original = shards.reduced

        def counted(numbers: Tensor, operation: str, groups: tuple[str, ...]) -> Tensor:
            sent.append(numbers.numel() // ROWS)
            return original(numbers, operation, groups)

        monkeypatch.setattr(shards, "reduced", counted)
        exchanges: list[int] = []
        exchanged = shards.exchanged
        monkeypatch.setattr(shards, "exchanged", lambda *one: (exchanges.append(1), exchanged(*one))[1])
        s, t = part_of(student, rank, world), part_of(teacher, rank, world)

        def loss_of(leaf: Tensor, **options: Any) -> Tensor:
            given = {**PLAIN.options, "vocab_group": torch.distributed.group.WORLD, **options}
            return tgt.distillation_loss(leaf, t, target, **given)

        travels = {}
        for divergence in ("forward_kl", "jsd"):
            sent.clear()
            loss_of(s.clone().requires_grad_(), divergence=divergence).backward()
            travels[divergence] = list(sent)
        sent.clear()
        loss_of(s, return_stats=True)
        travels["statistics"] = list(sent)
        sent.clear()
        record = tgt.topk_teacher(teacher, 5, 2.0)
        tgt.distillation_loss(s, record, target, **PLAIN.options, vocab_group="world")
        travels["record"] = list(sent)

        leaf = s.clone().requires_grad_()
        first, second = loss_of(leaf), loss_of(leaf, vocab_offsets=offsets)
        (grad,) = torch.autograd.grad(first, leaf, retain_graph=True)
        (again,) = torch.autograd.grad(first, leaf)
        (other,) = torch.autograd.grad(second * 3, leaf)
        assert torch.equal(first, second)
        assert torch.equal(grad * 3, other)
        torch.testing.assert_close(grad, again)

        leaf = s.clone().requires_grad_()
        mine = leaf * 1.0
        loss_of(mine, inplace=True).backward()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, grad)

        module = tgt.DistillationLoss(vocab_group="world", vocab_offsets=offsets, **PLAIN.options)
        assert torch.equal(module(s, t, target), first)
        with torch.no_grad():
            assert torch.equal(loss_of(s), first.detach())
        messages = []
        for options in (
            {"backend": "reference"}, {"vocab_offsets": (0, 3)}, {"vocab_offsets": (1, *offsets[1:])},
            {"vocab_offsets": list(range(world + 1))}, {"count_group": "nobody"},
        ):  # fmt: skip
            with pytest.raises((ValueError, RuntimeError)) as raised:
                loss_of(s, **options)
            messages.append(f"{type(raised.value).__name__}: {raised.value}")
        assert len(exchanges) == 1  # of a group and a width
        if world == 4:
            beside_data_parallelism(rank)
        return travels, messages

    for travels, messages in all_made(in_processes(world, tmp_path, work)):
        assert travels == {
            "forward_kl": [7, 8], "jsd": [7, 8, 2], "statistics": [7, 8, 7, 2, 6], "record": [6, 6, 2],
        }  # fmt: skip
        assert messages[0].startswith("BackendError: distill: backend 'reference' has all classes of a row in one")
        assert f"must hold {world + 1} numbers for {world} processes" in messages[1]
        assert "must begin with 0 and not fall" in messages[2]
        assert "by vocab_offsets process" in messages[3]
        assert "count_group must be None" in messages[4]


def beside_data_parallelism(rank: int) -> None:
    """Four processes: two groups with half of the rows each, in which classes are spread over two processes."""
    new, half, side = torch.distributed.new_group, rank // 2, rank % 2
    of_classes, of_rows = [new([0, 1]), new([2, 3])][half], [new([0, 2]), new([1, 3])][side]
    student, teacher, target, _ = PLAIN.inputs()
    whole = student.clone().requires_grad_()
    tgt.distillation_loss(whole, teacher, target, **PLAIN.options).backward()
    assert whole.grad is not None
    rows = slice(0, 5) if half == 0 else slice(5, ROWS)
    leaf = part_of(student[rows], side, 2).requires_grad_()
    loss = tgt.distillation_loss(
        leaf, part_of(teacher[rows], side, 2), target[rows], vocab_group=of_classes, count_group=of_rows,
        **PLAIN.options,
    )  # fmt: skip
    loss.backward()
    assert leaf.grad is not None
    # DDP takes the mean of the gradients of both groups.
    assert relative_error(leaf.grad / 2, part_of(whole.grad[rows], side, 2), 1e-2) < 2e-5


@pytest.mark.parametrize("divergence", ["symmetric", "tvd"])
def test_the_host_waits_for_no_device(native: str, divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "on_host", lambda tensor: False)
    student, teacher, target, _ = PLAIN.inputs()
    options = DistillOptions(divergence, temperature=2.0, hard_weight=1.0, label_smoothing=0.1)
    wanted: dict[str, Any] = dict.fromkeys(("want_d_student", "want_d_teacher", "want_row_state", "want_stats"), True)
    call = DistillCall(options, student, teacher, target, torch.rand(ROWS), **wanted)
    record = tgt.topk_teacher(teacher, 5)
    rows = options._replace(divergence="jsd")
    of_record = DistillCall(rows, student, rows_of(record), target, want_d_student=True, want_row_state=True)
    shares = call._replace(target=teacher.softmax(-1), options=options._replace(label_smoothing=0.0))
    for one in (call, of_record, shares):
        form = "distill" if isinstance(one.teacher, Tensor) else "topk"
        kernels = [row_kernel(op, native) for op in (form, "distill")]
        made = library.sharded(one, kernels, shards.Shards((), 0, CLASSES, CLASSES, CLASSES))
        with NothingWaits():
            out = made.forward(one)
            made.backward(one, out.row_state, torch.ones(()))


def with_shares(at: int, rank: int = 0, world: int = 1, **more: Any) -> list[Tensor]:
    """Loss and gradient of calls whose target is shares of the classes, of all or of a process's."""
    made = Case("jsd", "soft", (2.0, 2.0), "plain", (torch.bfloat16 if at == 2 else torch.float32,) * 2, "sum", True)
    student, teacher, _, weight = made.inputs()
    shares = torch.rand(ROWS, CLASSES, generator=torch.Generator().manual_seed(8))
    shares *= torch.tensor([1.0, 3.0, 0.0])[torch.arange(ROWS) % 3][:, None] * (shares > 0.6)
    student[4, 3] = -math.inf
    shares[4, 3] = 0.5 if at == 1 else 0.0  # a class that the student cannot give
    student[6, 5], shares[7] = 20.0, 0.0
    shares[7, 30] = 1.0
    sides = [x if world == 1 else part_of(x, rank, world) for x in (student, teacher, shares)]
    leaf = sides[0].clone().requires_grad_()
    mine = leaf * 1.0
    options: dict[str, Any] = {"temperature": 2.0, "hard_weight": 0.7, "sample_weight": weight}
    if at == 0:
        options |= {"divergence": "reverse_kl", "inplace": True}
    elif at == 1:
        options |= {"reduction": "none", "divergence": "jsd"}
    elif at == 3:
        options |= {"soft_weight": 0.0, "sample_weight": None}
    elif at == 5:
        head = torch.randn(CLASSES, 4, generator=torch.Generator().manual_seed(9))
        head = head if world == 1 else part_of(head.t(), rank, world).t()
        leaf = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(10)).requires_grad_()
        loss = tgt.linear_distillation_loss(
            leaf, head, teacher_logits=sides[1], target=sides[2], memory_budget=600, **options, **more
        )
        loss.backward()
        return [loss.detach(), leaf.grad]  # type: ignore[list-item]
    given = tgt.topk_teacher(teacher, 5, 2.0) if at == 4 else sides[1]
    loss = tgt.distillation_loss(mine, given, sides[2], **options, **more)
    loss.sum().backward()
    return [loss.detach(), leaf.grad]  # type: ignore[list-item]


@needs_processes
def test_shares_of_the_classes(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        made = [with_shares(at, rank, 2, vocab_group="world") for at in range(6)]
        student, teacher, *_ = PLAIN.inputs()
        s, t = part_of(student, rank, 2), part_of(teacher, rank, 2)
        shares = torch.full_like(s, 0.1)
        shares[2, 0] = -1.0 if rank else 0.1
        options: dict[str, Any] = {"hard_weight": 1.0, "vocab_group": "world"}
        loss = tgt.distillation_loss(s, t, shares, reduction="none", **options)
        assert loss.isnan().nonzero().tolist() == [[2]]  # also where all shares are sound
        assert torch.equal(
            tgt.distillation_loss(s, t, shares, vocab_group="world"), tgt.distillation_loss(s, t, vocab_group="world")
        )
        with pytest.raises(ArgumentError, match="label_smoothing is of labels, but target has shares"):
            tgt.distillation_loss(s, t, shares, label_smoothing=0.1, **options)
        return made

    found = all_made(in_processes(2, tmp_path, work))
    for at in range(6):
        loss, grad = with_shares(at)
        (own_loss, own_grad), (other_loss, other_grad) = (one[at] for one in found)
        assert torch.equal(own_loss, other_loss)
        torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=1e-5)
        whole = own_grad if at == 5 else torch.cat([own_grad, other_grad], dim=-1)
        bar = 2e-5 if grad.dtype == torch.float32 else 8e-3
        assert relative_error(whole.double(), grad.double(), 1e-2) < bar, at


@needs_processes
def test_a_bad_label_is_refused_in_every_process(tmp_path: Path) -> None:
    student, teacher, target, _ = PLAIN.inputs()
    target[3] = CLASSES

    def work(rank: int) -> Any:
        return tgt.distillation_loss(
            part_of(student, rank, 2), part_of(teacher, rank, 2), target, hard_weight=1.0, vocab_group="world"
        )

    for made in in_processes(2, tmp_path, work):
        assert isinstance(made, Raised)
        assert f"target[3] = {CLASSES} is not in [0, {CLASSES})" in made.text


def test_one_process_has_all_classes() -> None:
    student, teacher, target, _ = PLAIN.inputs()
    loss = tgt.distillation_loss(student, teacher, target, **PLAIN.options)
    own = {"vocab_group": "world", "vocab_offsets": (0, CLASSES)}
    assert torch.equal(tgt.distillation_loss(student, teacher, target, **own, **PLAIN.options), loss)
    with pytest.raises(ArgumentError, match="vocab_group must be None, 'world' or a process group, got 3"):
        tgt.distillation_loss(student, teacher, vocab_group=3)
    with pytest.raises(ArgumentError, match="vocab_offsets say which classes a process of vocab_group has"):
        tgt.distillation_loss(student, teacher, vocab_offsets=(0, CLASSES))
    assert "vocab_group='world'" in repr(tgt.DistillationLoss(vocab_group="world"))
