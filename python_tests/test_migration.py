"""The losses of other libraries, written out, beside the call of ours that docs/coming-from gives for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tgt_fast as tgt

ROWS, CLASSES, T, IGNORED = 24, 17, 3.0, -100


class Case:
    """Logits, labels of which some are ignored, hidden states and heads, in float64."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return 2 * torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.s, self.t = normal(ROWS, CLASSES).requires_grad_(), normal(ROWS, CLASSES)
        self.y = torch.randint(0, CLASSES, (ROWS,), generator=draw)
        self.masked = self.y.clone()
        self.masked[::3] = IGNORED
        self.h, self.w = normal(ROWS, 5).requires_grad_(), normal(CLASSES, 5).requires_grad_()
        self.th, self.tw = normal(ROWS, 7), normal(CLASSES, 7)

    def logs(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        return (self.s / temperature).log_softmax(-1), (self.t / temperature).log_softmax(-1)

    @property
    def counted(self) -> Tensor:
        return self.masked != IGNORED


def kl(log_q: Tensor, log_p: Tensor, reduction: str = "batchmean") -> Tensor:
    """KL(p || q), as PyTorch has it."""
    return F.kl_div(log_q, log_p, reduction=reduction, log_target=True)


def jsd(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """Elements of what Liger and TRL call the generalised JSD: beta on the teacher's side, its ends the two KLs."""
    if beta == 0:
        return kl(log_s, log_t, "none")
    if beta == 1:
        return kl(log_t, log_s, "none")
    log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
    return beta * kl(log_m, log_t, "none") + (1 - beta) * kl(log_m, log_s, "none")


def liger_jsd(case: Case, beta: float) -> Tensor:
    return jsd(*case.logs(), beta)[case.counted].sum() / case.counted.sum()


def liger_chunked(case: Case) -> Tensor:
    """LigerFusedLinearJSDLoss: both terms over all rows, the soft one of ignored rows, too."""
    student, teacher = case.h @ case.w.T, case.th @ case.tw.T
    hard = F.cross_entropy(student, case.masked, ignore_index=IGNORED, reduction="sum") / ROWS
    soft = jsd((student / T).log_softmax(-1), (teacher / T).log_softmax(-1), 0.5).sum() / ROWS
    return 0.5 * hard + 0.5 * soft


def our_chunked(case: Case) -> Tensor:
    heads = (case.h, case.w, case.th, case.tw)
    soft = tgt.linear_distillation_loss(*heads, divergence="jsd", temperature=T, soft_weight=0.5 / T**2)
    hard = tgt.linear_distillation_loss(*heads, case.masked, soft_weight=0.0, hard_weight=0.5, normalizer=ROWS)
    return soft + hard


def liger_linear(case: Case) -> Tensor:
    student, teacher = case.h @ case.w.T / T, case.th @ case.tw.T / T
    elements = jsd(student.log_softmax(-1), teacher.log_softmax(-1), 0.5)
    return elements[case.counted].sum() / case.counted.sum()


def trl(case: Case, beta: float) -> Tensor:
    return jsd(*case.logs(T), beta)[case.counted].sum() / case.counted.sum()


def torchtune(case: Case, kind: str) -> Tensor:
    log_s, log_t = case.logs()
    forward = -(log_t.exp() * log_s).sum(-1)  # a cross-entropy by the name of a forward KL
    reverse = -(log_s.exp() * log_t).sum(-1) + (log_s.exp() * log_s).sum(-1)
    rows = {"forward": forward, "reverse": reverse, "symmetric": 0.3 * forward + 0.7 * reverse}[kind]
    mask = case.counted.to(rows)
    return (rows * mask).sum() / mask.sum()


def torchdistill(case: Case, alpha: float) -> Tensor:
    log_s, log_t = case.logs(T)
    soft = nn_kl(log_s, log_t)
    return soft if alpha == 0 else alpha * F.cross_entropy(case.s, case.y) + (1 - alpha) * T**2 * soft


def nn_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    return torch.nn.KLDivLoss(reduction="batchmean")(log_s, log_t.exp())


def dense_maps(case: Case) -> tuple[Tensor, Tensor]:
    return tuple(each.reshape(2, 3, 4, CLASSES).movedim(-1, 1) for each in (case.s, case.t))  # type: ignore[return-value]


def torchdistill_dense(case: Case) -> Tensor:
    student, teacher = dense_maps(case)
    return nn_kl((student / T).log_softmax(1), (teacher / T).log_softmax(1))


def our_dense(case: Case) -> Tensor:
    student, teacher = (maps.movedim(1, -1) for maps in dense_maps(case))
    return tgt.distillation_loss(student, teacher, temperature=T, soft_weight=3 * 4 / T**2)


def distillkit(case: Case, missing: str) -> Tensor:
    """sparse_kl_div of records made at the loss's temperature."""
    values, ids = (case.t / T).log_softmax(-1).topk(6)
    student = (case.s / T).log_softmax(-1).gather(-1, ids)
    if missing == "zero":
        values = values - values.logsumexp(-1, keepdim=True)
    rows = (values.exp() * (values - student)).sum(-1)
    if missing == "uniform":
        rest, own = ((1 - each.exp().sum(-1)).log() for each in (values, student))
        rows = rows + rest.exp() * (rest - own)
    return rows[case.counted].sum() * T**2 / case.counted.sum()


def our_record(case: Case) -> Tensor:
    values, ids = (case.t / T).log_softmax(-1).topk(6)
    rest = torch.log(-torch.expm1(values.logsumexp(-1)))
    record = tgt.TeacherTopK(ids, values, rest, temperature=T, num_classes=CLASSES, tail="bucket")
    return tgt.distillation_loss(case.s, record, case.masked, temperature=T)


def our_scaled(case: Case) -> Tensor:
    values, ids = (case.t / T).log_softmax(-1).topk(6)
    scaled = torch.full_like(case.t, -torch.inf).scatter(-1, ids, values)
    return tgt.distillation_loss(case.s, scaled, case.masked, temperature=T, teacher_temperature=1.0)


def modelopt_mft(case: Case, threshold: float = 0.2) -> Tensor:
    p = (case.t / T).softmax(-1)
    top, own = p.amax(-1), p.gather(-1, case.y[:, None])[:, 0]
    wrong = p.argmax(-1) != case.y
    ahead = torch.where(own > 1 - threshold, torch.ones_like(own), own + threshold)
    mix = torch.where(wrong, (top - own + threshold) / (1 + top - own), (ahead - top) / (1 - top))[:, None]
    wanted = (p * (1 - mix)).scatter_add(-1, case.y[:, None], mix)
    return F.kl_div(case.logs(T)[0], wanted, reduction="batchmean") * T**2


def our_mft(case: Case, threshold: float = 0.2) -> Tensor:
    p = (case.t / T).softmax(-1)
    top, own = p.amax(-1), p.gather(-1, case.y[..., None])[..., 0]
    wrong = p.argmax(-1) != case.y
    mix = torch.where(
        wrong, (top - own + threshold) / (1 + top - own), ((own + threshold).clamp(max=1) - top) / (1 - top)
    )[..., None]
    wanted = (p * (1 - mix)).scatter_add(-1, case.y[..., None], mix).log()
    return tgt.distillation_loss(case.s, wanted, temperature=T, teacher_temperature=1.0)


def margins(case: Case) -> tuple[Tensor, Tensor]:
    return case.s[:, :1] - case.s[:, 1:], case.t[:, :1] - case.t[:, 1:]


def our_margins(case: Case) -> Tensor:
    ours, theirs = margins(case)
    return tgt.distillation_loss(ours, theirs, divergence="mse") / ours.shape[1]


def towers(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = F.normalize(case.h, dim=-1)
    d = F.normalize(case.h.detach().roll(1, 1) + 0.3, dim=-1)
    return q, d, case.th, case.th.roll(1, 1)


def multiple_negatives(case: Case) -> Tensor:
    q, d, *_ = towers(case)
    return F.cross_entropy(20 * q @ d.T, torch.arange(ROWS))


def our_negatives(case: Case) -> Tensor:
    return tgt.contrastive_distillation_loss(*towers(case), temperature=1 / 20, soft_weight=0.0, hard_weight=1.0)


def timm(case: Case) -> Tensor:
    """LogitDistillationTask with LabelSmoothingCrossEntropy(0.1) and task_loss_weight 0.3."""
    log_s = case.s.log_softmax(-1)
    task = (-0.9 * log_s.gather(-1, case.y[:, None])[:, 0] - 0.1 * log_s.mean(-1)).mean()
    return 0.3 * task + 0.7 * kl(*case.logs(T)) * T**2


def masked(divergence: str, **options: float) -> Callable[[Case], Tensor]:
    return lambda case: tgt.distillation_loss(case.s, case.t, case.masked, divergence=divergence, **options)  # type: ignore[arg-type]


NO_SQUARE = {"temperature": T, "soft_weight": 1 / T**2}
PAIRS: dict[str, tuple[Callable[[Case], Tensor], Callable[[Case], Tensor]]] = {
    "LigerJSD": (lambda case: liger_jsd(case, 0.3), masked("jsd", beta=0.3)),
    "LigerJSD beta 0": (lambda case: liger_jsd(case, 0.0), masked("forward_kl")),
    "LigerJSD beta 1": (lambda case: liger_jsd(case, 1.0), masked("reverse_kl")),
    "LigerKLDIVLoss batchmean": (lambda case: kl(*case.logs()), lambda case: tgt.distillation_loss(case.s, case.t)),
    "LigerKLDIVLoss mean": (
        lambda case: kl(*case.logs(), "none").mean(),
        lambda case: tgt.distillation_loss(case.s, case.t) / CLASSES,
    ),
    "LigerTVDLoss": (
        lambda case: 0.5 * (case.s.softmax(-1) - case.t.softmax(-1)).abs().sum() / ROWS,
        lambda case: tgt.distillation_loss(case.s, case.t, divergence="tvd"),
    ),
    "log-probabilities for logits": (
        lambda case: kl(*case.logs()),
        lambda case: tgt.distillation_loss(*case.logs()),
    ),
    "LigerFusedLinearJSD": (
        liger_linear,
        lambda case: tgt.linear_distillation_loss(
            case.h, case.w, case.th, case.tw, case.masked, divergence="jsd", temperature=T, soft_weight=1 / T**2
        ),
    ),
    "LigerFusedLinearJSDLoss": (liger_chunked, our_chunked),
    "TRL GKD": (lambda case: trl(case, 0.5), masked("jsd", beta=0.5, **NO_SQUARE)),
    "TRL GKD beta 0": (lambda case: trl(case, 0.0), masked("forward_kl", **NO_SQUARE)),
    "TRL GKD beta 1": (lambda case: trl(case, 1.0), masked("reverse_kl", **NO_SQUARE)),
    "torchtune ForwardKLLoss": (lambda case: torchtune(case, "forward"), masked("cross_entropy")),
    "torchtune ReverseKLLoss": (lambda case: torchtune(case, "reverse"), masked("reverse_kl")),
    "torchtune SymmetricKLLoss": (
        lambda case: torchtune(case, "symmetric"),
        lambda case: 0.3 * masked("cross_entropy")(case) + 0.7 * masked("reverse_kl")(case),
    ),
    "torchdistill KDLoss": (
        lambda case: torchdistill(case, 0.1),
        lambda case: tgt.distillation_loss(case.s, case.t, case.y, temperature=T, hard_weight=0.1, soft_weight=0.9),
    ),
    "torchdistill KDLoss alpha 0": (
        lambda case: torchdistill(case, 0.0),
        lambda case: tgt.distillation_loss(case.s, case.t, **NO_SQUARE),
    ),
    "torchdistill KDLoss of maps": (torchdistill_dense, our_dense),
    "DistillKit dense": (
        lambda case: kl(*case.logs(T), "none")[case.counted].sum() * T**2 / case.counted.sum(),
        masked("forward_kl", temperature=T),
    ),
    "DistillKit symmetric_uniform": (lambda case: distillkit(case, "uniform"), our_record),
    "DistillKit zero": (lambda case: distillkit(case, "zero"), our_scaled),
    "ModelOpt LogitsDistillationLoss": (
        lambda case: kl(*case.logs(T)) * T**2,
        lambda case: tgt.distillation_loss(case.s, case.t, temperature=T),
    ),
    "ModelOpt LogitsDistillationLoss none": (
        lambda case: (kl(*case.logs(T), "none") * T**2).sum(-1),
        lambda case: tgt.distillation_loss(case.s, case.t, temperature=T, reduction="none"),
    ),
    "ModelOpt MFTLoss": (modelopt_mft, our_mft),
    "sentence-transformers DistillKLDivLoss": (
        lambda case: nn_kl(*case.logs(T)) * T**2,
        lambda case: tgt.distillation_loss(case.s, case.t, temperature=T),
    ),
    "sentence-transformers MarginMSELoss": (lambda case: F.mse_loss(*margins(case)), our_margins),
    "sentence-transformers MSELoss": (
        lambda case: F.mse_loss(case.s, case.t),
        lambda case: tgt.distillation_loss(case.s, case.t, divergence="mse") / CLASSES,
    ),
    "sentence-transformers MultipleNegativesRankingLoss": (multiple_negatives, our_negatives),
    "timm LogitDistillationTask": (
        timm,
        lambda case: tgt.distillation_loss(
            case.s, case.t, case.y, temperature=T, hard_weight=0.3, soft_weight=0.7, label_smoothing=0.1
        ),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_value_and_gradient_are_theirs(name: str) -> None:
    theirs, ours = PAIRS[name]
    found, wanted = [], []
    for results, loss in ((wanted, theirs), (found, ours)):
        case = Case()
        value = loss(case)
        value.sum().backward()
        results += [value.detach(), *(each.grad for each in (case.s, case.h, case.w) if each.grad is not None)]
    assert len(found) == len(wanted) >= 2
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
        assert (mine - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("name", PAIRS)
def test_the_pairs_would_not_be_equal_anyway(name: str) -> None:
    theirs, ours = PAIRS[name]
    wanted = theirs(Case())
    case = Case()
    case.s.data[1, 0] += 1.0
    case.h.data[1, 0] += 1.0
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours(case), wanted, rtol=1e-6, atol=1e-6)
