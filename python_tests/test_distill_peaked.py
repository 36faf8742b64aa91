"""Rows that peak at one class, where what is left of a gradient is a difference of numbers near 1."""

import math

import pytest
import torch
import torch.nn.functional as F
from numerics import distillation_loss
from torch import Tensor

ROWS, CLASSES, FLOOR = 24, 1000, 1e-2
LIFTS = (4, 7, 10, 13, 16, 20, 25)
PLACES = {"both": ((7,), (7,)), "teacher": ((), (7,)), "student": ((7,), ()), "apart": ((7,), (9,))}
DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric", "jsd", "tvd", "cross_entropy", "mse")


def plain(divergence: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence of each row as users write it.  -> [N]"""
    if divergence == "mse":
        return (student - teacher).square().sum(-1)
    log_p, log_q = F.log_softmax(teacher, -1), F.log_softmax(student, -1)

    def kl(of: Tensor, to: Tensor) -> Tensor:
        return F.kl_div(to, of, reduction="none", log_target=True).sum(-1)

    if divergence == "forward_kl":
        return kl(log_p, log_q)
    if divergence == "reverse_kl":
        return kl(log_q, log_p)
    if divergence == "symmetric":
        return kl(log_p, log_q) + kl(log_q, log_p)
    if divergence == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    if divergence == "tvd":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    return -(log_p.exp() * log_q).sum(-1)


def gradients(loss, student: Tensor, teacher: Tensor) -> list[Tensor]:
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    return list(torch.autograd.grad(loss(student, teacher).sum(), (student, teacher)))


def peaked_rows(place: str, lift: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(lift)
    sides = torch.randn(2, ROWS, CLASSES, generator=generator)
    for side, classes in zip(sides, PLACES[place], strict=True):
        side[:, list(classes)] += lift
    return sides[0], sides[1]


def errors(out: Tensor, expected: Tensor) -> Tensor:
    """Of each row, relative to its gradient.  -> [N]"""
    return (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(FLOOR)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_of_peaked_rows_are_no_worse_than_eager_ones(divergence: str, place: str, backend: str) -> None:
    ours: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    eager: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for lift in LIFTS:
        student, teacher = peaked_rows(place, lift)
        expected = gradients(lambda s, t: plain(divergence, s, t), student.double(), teacher.double())
        made = gradients(
            lambda s, t: distillation_loss(s, t, divergence=divergence, reduction="none", backend=backend),
            student, teacher,
        )  # fmt: skip
        usual = gradients(lambda s, t: plain(divergence, s, t), student, teacher)
        for side, out, other, truth in zip(ours, made, usual, expected, strict=True):
            ours[side].append(errors(out, truth))
            eager[side].append(errors(other, truth))
    for side in ours:
        mine, theirs = torch.cat(ours[side]), torch.cat(eager[side])
        worse, better = int((mine > 2 * theirs).sum()), int((theirs > 2 * mine).sum())
        assert worse <= better, f"{side}: {worse} of {len(mine)} rows twice as wrong as eager, {better} half as wrong"
        # tvd jumps where two probabilities change places, and x of cross_entropy is as large as the peak
        inexact = int((mine > 1e-5).sum())
        allowed = {"tvd": 0.02, "cross_entropy": 0.05}.get(divergence, 0.0)
        assert inexact <= allowed * len(mine), f"{side}: {inexact} of {len(mine)} rows err by more than 1e-5"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_label_at_the_peak_leaves_a_small_gradient_exact(place: str, smoothing: float, backend: str) -> None:
    for lift in (10, 16):
        student, teacher = peaked_rows(place, lift)
        target = torch.full((ROWS,), 7)

        def loss(s: Tensor, t: Tensor, target: Tensor = target) -> Tensor:
            hard = F.cross_entropy(s, target, reduction="none", label_smoothing=smoothing)
            return plain("reverse_kl", s, t) / 2 + hard / 2

        expected = gradients(loss, student.double(), teacher.double())
        made = gradients(
            lambda s, t, target=target: distillation_loss(
                s, t, target, divergence="reverse_kl", soft_weight=0.5, hard_weight=0.5, label_smoothing=smoothing,
                reduction="none", backend=backend,
            ),
            student, teacher,
        )  # fmt: skip
        for out, truth in zip(made, expected, strict=True):
            assert float(errors(out, truth).max()) < 1e-5


def test_two_classes(backend: str) -> None:
    student = torch.tensor([[-5.3484, 23.0495], [-3.8951, 1.9514]])
    teacher = torch.tensor([[-3.1615, 6.0309], [-1.9193, -9.4623]])
    for divergence in DIVERGENCES:
        expected = gradients(lambda s, t, d=divergence: plain(d, s, t), student.double(), teacher.double())
        made = gradients(
            lambda s, t, d=divergence: distillation_loss(s, t, divergence=d, reduction="none", backend=backend),
            student, teacher,
        )  # fmt: skip
        for out, truth in zip(made, expected, strict=True):
            assert float(errors(out, truth).max()) < 5e-6


# A warp or a tile a row, a block, clusters and several tiles, rows that are read twice
@pytest.mark.parametrize("classes", [50, 1003, 9001, 17003])
@pytest.mark.parametrize("divergence", ["symmetric", "jsd"])
def test_gradients_made_anew_from_states_are_as_exact(divergence: str, classes: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(classes)
    student, teacher = torch.randn(2, 3, classes, generator=generator)
    for row, (of_student, of_teacher) in enumerate([(7, classes - 1), (classes // 2, classes // 2), (0, 3)]):
        student[row, of_student] += 18
        teacher[row, of_teacher] += 18
    expected = gradients(lambda s, t: plain(divergence, s, t) * 2, student.double(), teacher.double())
    student.requires_grad_()
    teacher.requires_grad_()
    loss = distillation_loss(student, teacher, divergence=divergence, reduction="sum", backend=backend)
    for _ in range(2):  # made in forward, then made anew
        made = torch.autograd.grad(loss, (student, teacher), torch.tensor(2.0), retain_graph=True)
        for out, truth in zip(made, expected, strict=True):
            assert float(errors(out, truth).max()) < 1e-5


def test_peaks_in_place_and_in_half_precision(backend: str) -> None:
    student, teacher = (x[:2].half() for x in peaked_rows("both", 10))
    expected = gradients(lambda s, t: plain("reverse_kl", s, t) * 512, student.double(), teacher.double())
    for inplace in (False, True):
        leaves = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        loss = distillation_loss(
            leaves[0] * 1, leaves[1], divergence="reverse_kl", reduction="sum", inplace=inplace, backend=backend
        )
        for out, truth in zip(torch.autograd.grad(loss * 512, leaves), expected, strict=True):
            assert float(errors(out, truth).max()) < 1e-3
