"""Classes in another dimension than the last: maps of segmentation, [B, C, H, W]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.train import evaluate

CLASSES = 5
SHAPE = (2, CLASSES, 3, 4)


def maps(seed: int) -> Tensor:
    return toys.normal(*SHAPE, seed=seed)


Y = torch.arange(24).reshape(2, 3, 4) % CLASSES


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_loss_is_that_of_the_classes_last(backend: str, layout: torch.memory_format, reduction: str) -> None:
    s, t, y = maps(0).to(memory_format=layout).requires_grad_(), maps(1).to(memory_format=layout), Y.clone()
    y[0, 0] = -100
    options: dict[str, Any] = {"temperature": 2.0, "hard_weight": 0.5, "reduction": reduction, "backend": backend}
    loss = tgt.distillation_loss(s, t, y, class_dim=1, **options)
    expected = tgt.distillation_loss(s.movedim(1, -1), t.movedim(1, -1), y, **options)
    assert loss.shape == (() if reduction == "mean" else y.shape)
    assert torch.equal(loss, expected)
    grads = [torch.autograd.grad(one.sum(), s)[0] for one in (loss, expected)]
    assert grads[0].shape == SHAPE
    assert torch.equal(*grads)


def test_shares_records_and_statistics_go_along() -> None:
    s, t = maps(0), maps(1)
    shares = maps(2).softmax(1)
    loss, stats = tgt.distillation_loss(s, t, shares, hard_weight=1.0, class_dim=1, return_stats=True)
    expected, same = tgt.distillation_loss(*(x.movedim(1, -1) for x in (s, t, shares)), hard_weight=1.0,
                                           return_stats=True)  # fmt: skip
    assert torch.equal(loss, expected)
    assert stats.kl.shape == Y.shape
    assert torch.equal(stats.kl, same.kl)
    record = tgt.topk_teacher(t.movedim(1, -1), 3)
    assert torch.equal(tgt.distillation_loss(s, record, class_dim=1), tgt.distillation_loss(s.movedim(1, -1), record))


class Copies(TorchDispatchMode):
    """The sizes of what was copied."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if "copy" in func.__name__ or "clone" in func.__name__ or "contiguous" in func.__name__:
            self.sizes.append(made.numel())
        return made


@contextmanager
def watched() -> Iterator[list[int]]:
    with Copies() as mode:
        yield mode.sizes


def test_maps_of_channels_last_are_not_copied() -> None:
    for layout, copied in ((torch.channels_last, False), (torch.contiguous_format, True)):
        with watched() as sizes:  # of the views that the kernels are given
            for seed in (0, 1):
                rows = maps(seed).to(memory_format=layout)
                sizes.clear()
                last = rows.movedim(1, -1)
                last.reshape(-1, CLASSES)
        assert bool(sizes) is copied
    s = maps(0).to(memory_format=torch.channels_last)
    leaf = (s * 1.0).detach()
    before = leaf.data_ptr()
    twin = leaf.clone(memory_format=torch.preserve_format).requires_grad_()
    loss = tgt.distillation_loss(twin * 1.0, maps(1), class_dim=1, inplace=True)  # which a copy would refuse
    loss.backward()
    assert leaf.data_ptr() == before
    with pytest.raises(ArgumentError, match="inplace"):
        tgt.distillation_loss(maps(0) * 1.0, maps(1), class_dim=1, inplace=True)


def test_what_is_refused(none_chosen: str) -> None:
    for wrong, match in ((4, "4 dimensions"), (-5, "4 dimensions"), (1.0, "class_dim"), (True, "class_dim")):
        with pytest.raises(ArgumentError, match=match):
            tgt.distillation_loss(maps(0), maps(1), class_dim=wrong, backend=none_chosen)  # type: ignore[call-overload]
    with pytest.raises(ShapeError, match="differ"):
        tgt.distillation_loss(maps(0), maps(1)[0], class_dim=1, backend=none_chosen)
    for wrong in (0, None, True):
        with pytest.raises(ArgumentError, match="class_dim must be a dimension behind the batch"):
            tgt.Teacher(nn.Identity(), nn.Identity(), nn.Identity(), class_dim=wrong)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="class_dim is 3"):
        tgt.Teacher(nn.Identity(), nn.Identity(), nn.Identity(), class_dim=3).label(torch.zeros(2, 3))


def parts() -> tuple[tgt.Teacher, nn.Module, Tensor]:
    encoder = toys.seeded(lambda: nn.Conv2d(1, 2, 2, stride=2), 0)
    decoder = toys.seeded(lambda: nn.ConvTranspose2d(2, 1, 2, stride=2), 1)
    judge, student = (toys.seeded(lambda: nn.Conv2d(1, CLASSES, 1), seed) for seed in (2, 3))
    return tgt.Teacher(encoder, decoder, judge, class_dim=1), student, toys.normal(2, 1, 4, 4)


class Last(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x).movedim(1, -1)
        return made


@pytest.mark.parametrize("of_loss", [-1, 1])
def test_teacher_student_sampler_objective_and_evaluation(of_loss: int) -> None:
    """All of them as with the same models behind a wrapper that moves the classes."""
    teacher, student, x = parts()
    assert teacher.label(x).shape == (2, 4, 4, CLASSES)
    labeler: Any = teacher.labeler
    wrapped = tgt.Teacher(teacher.encoder, teacher.decoder, Last(labeler))
    y = torch.arange(32).reshape(2, 4, 4) % CLASSES
    loss = tgt.DistillationLoss(temperature=2.0, hard_weight=1.0, class_dim=of_loss)
    found = []
    plain = tgt.DistillationLoss(temperature=2.0, hard_weight=1.0)
    for one, model, l_d in ((teacher, student, loss), (wrapped, Last(student), plain)):
        sampler = tgt.LatentSampler(one, "gradient", sigma=0.3, units="absolute")
        out = tgt.TGTObjective(one, sampler, loss=l_d)(model, x, y, step=0, sample_ids=torch.arange(2))
        shares = one.label(x).softmax(-1)
        mixed = tgt.TGTObjective(one, loss=l_d)(model, x, shares if model is not student else shares.movedim(-1, 1))
        grads = torch.autograd.grad(out["loss"] + mixed["loss"], list(student.parameters()))
        scores = evaluate(model, one, [(x, y)])
        found.append([out["loss"], mixed["loss"], *out["parts"].values(), *grads, torch.tensor(list(scores.values()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert repr(loss).count("class_dim=1") == (of_loss == 1)
    assert tgt.teacher_fingerprint(teacher) != tgt.teacher_fingerprint(
        tgt.Teacher(teacher.encoder, teacher.decoder, labeler)
    )
