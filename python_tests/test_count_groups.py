"""``count_group``: the mean of the processes' losses, and of their gradients, is that of all rows in one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from process_kit import Collectives, all_made, in_processes, needs_processes, part
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training_kit import CLASSES, FEATURES, LATENT, make_data, make_teacher

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError

worlds = pytest.mark.parametrize("world", [1, 2, 4])
MODES = (None, "prior", "random", "gradient", "persistent")
ROWS, BATCHES = 17, 4


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, x, y: the first process has no valid row, and the numbers of rows do not divide."""
    x, y = make_data(ROWS)
    y = y.clamp(max=2)  # the last class is masked in one loss
    y[: ROWS // 3] = -100
    y[-3:-1] = -1
    return torch.arange(100, 100 + ROWS), x, y


# ---- the losses by themselves ----


def calls(rows: Any, group: Any) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Each loss of these rows, and its gradients: to a row by itself, and to a head that all share."""
    student, teacher, target, weight = rows
    head, record = normal(CLASSES, CLASSES, seed=5), tgt.topk_teacher(teacher, 2)
    options: dict[str, Any] = {"hard_weight": 1.0, "count_group": group}
    made = {}

    def add(name: str, loss_of: Any, *leaves: Tensor) -> None:
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        loss = loss_of(*own)
        made[name] = loss.detach(), list(torch.autograd.grad(loss, own))

    for backend in ("auto", "reference"):
        plain = {**options, "backend": backend}
        add(f"distill {backend}", lambda s, o=plain: tgt.distillation_loss(s, teacher, target, **o), student)
    add("weights", lambda s: tgt.distillation_loss(s, teacher, target, sample_weight=weight, **options), student)
    add("mask", lambda s: tgt.distillation_loss(s, teacher, target, count_group=group), student)
    add("record", lambda s: tgt.distillation_loss(s, record, target, **options), student)
    module = tgt.LinearDistillationLoss(vocab_mask=torch.tensor([True, True, True, False]), **options)
    add("linear", lambda h, w: module(h, w, teacher_logits=teacher, target=target), student, head)
    tower = normal(CLASSES, CLASSES, seed=6)
    contrast = tgt.ContrastiveDistillationLoss(temperature=0.5, count_group=group)
    positives = torch.where(target < 0, target, 0)
    add("contrast", lambda q, d: contrast(q, d, teacher, tower, positives=positives), student, head)
    given = tgt.DistillationLoss(**options)
    add("normalizer", lambda s: given(s, teacher, target, normalizer=3.0), student)
    return made


@needs_processes
@worlds
def test_losses(world: int, tmp_path: Path) -> None:
    _, _, target = data()
    rows = normal(ROWS, CLASSES, seed=1), normal(ROWS, CLASSES, seed=2) * 2, target, normal(ROWS, seed=3).abs()

    def work(rank: int) -> Any:
        with Collectives() as seen:
            made = calls(part(rows, rank, world), "world")
        assert seen.called == [("all_reduce", 1)] * (0 if world == 1 else len(made) - 1)  # none beside a normalizer
        own_group = calls(part(rows, rank, world), torch.distributed.group.WORLD)
        for name, (loss, _) in made.items():
            assert torch.equal(loss, own_group[name][0])
        return made

    found = all_made(in_processes(world, tmp_path, work))
    expected = calls(rows, None)
    for name, (loss, (to_rows, *to_head)) in expected.items():
        factor = world if name == "normalizer" else 1
        losses = torch.stack([made[name][0] for made in found])
        torch.testing.assert_close(losses.mean() * factor, loss, rtol=1e-6, atol=1e-7)
        scattered = torch.cat([made[name][1][0] for made in found]) / world * factor
        torch.testing.assert_close(scattered, to_rows, rtol=1e-6, atol=1e-7)
        for whole in to_head:
            averaged = torch.stack([made[name][1][1] for made in found]).mean(0)
            torch.testing.assert_close(averaged, whole, rtol=1e-6, atol=1e-7)
    if world > 1:  # what a mean a process would be
        apart = torch.stack([calls(part(rows, rank, world), None)["distill auto"][0] for rank in range(world)])
        assert not torch.isclose(apart.mean(), expected["distill auto"][0], rtol=1e-3)


def test_what_is_no_group_is_refused() -> None:
    logits = torch.zeros(2, 3)
    for make in (
        lambda group: tgt.distillation_loss(logits, logits, count_group=group),
        lambda group: tgt.DistillationLoss(count_group=group),
        lambda group: tgt.LinearDistillationLoss(count_group=group),
        lambda group: tgt.ContrastiveDistillationLoss(1.0, count_group=group),
        lambda group: tgt.TGTObjective(make_teacher(), count_group=group),
    ):
        with pytest.raises(ArgumentError, match="count_group must be None, 'world' or a process group, got 'all'"):
            make("all")
        make("world")  # a run of one process
    with pytest.raises(ArgumentError, match="count_group counts the divisor of 'mean', but reduction is 'sum'"):
        tgt.distillation_loss(logits, logits, reduction="sum", count_group="world")
    assert "count_group='world'" in repr(tgt.DistillationLoss(count_group="world"))


# ---- the objective ----


class RowWise(nn.Module):
    """A linear layer whose rows have the same bits in a batch of any size, as those of a matrix product have not."""

    def __init__(self, inputs: int, outputs: int, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(outputs, inputs, seed=seed) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        columns = [torch.stack([column * w for column, w in zip(x.unbind(1), row, strict=True)]) for row in self.weight]
        return torch.stack([functools.reduce(torch.add, one) for one in columns], 1)


def network(seed: int) -> nn.Module:
    return nn.Sequential(RowWise(FEATURES, 5, seed), nn.ReLU(), RowWise(5, CLASSES, seed + 1))


def objective_of(mode: str | None, group: Any, **options: Any) -> tgt.TGTObjective:
    teacher = tgt.Teacher(RowWise(FEATURES, LATENT, 10), RowWise(LATENT, FEATURES, 11), network(12), prior="normal")
    sampler = None
    if mode is not None:
        sampler = tgt.LatentSampler(teacher, mode, sigma=0.5, units="absolute", seed=7, **options)
    loss = tgt.DistillationLoss(temperature=2.0, hard_weight=0.7)
    return tgt.TGTObjective(teacher, sampler, loss=loss, synthetic_weight=0.8, count_group=group)


def steps(objective: tgt.TGTObjective, student: nn.Module, rows: Any, accumulate: int) -> dict[str, Any]:
    """Two steps: the loss of each, the last gradient, and the synthetic examples. In ``accumulate`` parts."""
    made: dict[str, Any] = {"losses": [], "parts": [], "synthetic": []}
    label, labeled = objective.teacher.label, []

    def seen(x: Any) -> Tensor:
        labeled.append(x.detach())
        return label(x)

    objective.teacher.label = seen  # type: ignore[method-assign]
    for step in range(2):
        student.zero_grad()
        batches = [part(rows, place, accumulate) for place in range(accumulate)]
        more: dict[str, Any] = {}
        if accumulate > 1:
            more = dict(zip(("normalizer", "synthetic_normalizer"), objective.normalizers(batches), strict=True))
        outputs = []
        for place, (ids, x, y) in enumerate(batches):
            waits = isinstance(student, DistributedDataParallel) and place + 1 < accumulate
            if isinstance(student, DistributedDataParallel):
                student.require_backward_grad_sync = not waits
            outputs.append(objective(student, x, y, sample_ids=ids, step=step, **more))
            outputs[-1]["loss"].backward()
        made["losses"].append(torch.stack([output["loss"].detach() for output in outputs]).sum())
        made["parts"].append(
            {
                name: torch.stack([output["parts"][name] for output in outputs]).sum()  # type: ignore[literal-required]
                for name in outputs[0]["parts"]
            }
        )
        made["synthetic"].append(labeled[-1])  # of a step, the last that the teacher labels
    made["grads"] = [p.grad for p in student.parameters()]
    return made


@needs_processes
@worlds
def test_objective(world: int, tmp_path: Path) -> None:
    variants = [(mode, accumulate) for mode in MODES for accumulate in (1, BATCHES) if accumulate == 1 or mode]

    def work(rank: int) -> Any:
        made = []
        for mode, accumulate in variants:
            with Collectives() as seen:
                wrapped = DistributedDataParallel(network(1))
                seen.called.clear()
                made.append(steps(objective_of(mode, "world"), wrapped, part(data(), rank, world), accumulate))
            each = ("all_reduce", 1 if mode is None and accumulate == 1 else 2)
            assert seen.called == ([] if world == 1 else [each] * 2), (mode, seen.called)
        return made

    found = all_made(in_processes(world, tmp_path, work))
    for place, (mode, accumulate) in enumerate(variants):
        expected = steps(objective_of(mode, None), network(1), data(), 1)
        of_ranks = [made[place] for made in found]
        for step in range(2):
            mean = torch.stack([made["losses"][step] for made in of_ranks]).mean()
            torch.testing.assert_close(mean, expected["losses"][step], rtol=1e-6, atol=1e-7)
            for name, value in expected["parts"][step].items():
                mean = torch.stack([made["parts"][step][name] for made in of_ranks]).mean()
                torch.testing.assert_close(mean, value, rtol=1e-6, atol=1e-7)
            if accumulate == 1:
                synthetic = torch.cat([made["synthetic"][step] for made in of_ranks])
                assert torch.equal(synthetic, expected["synthetic"][step]), mode
        for made in of_ranks:  # DistributedDataParallel has averaged them
            torch.testing.assert_close(made["grads"], expected["grads"], rtol=1e-6, atol=1e-6)


def test_normalizers_take_batches_as_a_loader_gives_them() -> None:
    ids, x, y = data()
    objective = objective_of("random", None, replicas=2)
    valid = float((y != -100).sum())
    for batches in ([(ids, x, y)], [(x, y)], [(x[:4], y[:4]), (x[4:], y[4:])]):
        assert objective.normalizers(batches) == (valid, 2.0 * ROWS)
    assert objective.normalizers([x]) == (ROWS, 2 * ROWS)
    named = [{"inputs": x, "label": y}]
    assert objective.normalizers(named, columns=(None, "inputs", "label")) == (valid, 2.0 * ROWS)
