"""The listwise loss in plain PyTorch and float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tgt_fast.kernels.listwise_calls import ListwiseCall, Outputs, no_distribution, ranked

_FAR = 1e4  # below the smallest logit: its exponential is 0 beside it


def value(call: ListwiseCall) -> Tensor:
    """A row's loss times its factor, differentiable in the student.  -> [N]"""
    return _measured(call)[0]


def forward(call: ListwiseCall, out: Outputs) -> None:
    """The same without a graph, and the gradient written out: inside a registered op there is no autograd to ask."""
    with torch.no_grad():
        loss, order, weights, x, suffix = _measured(call)
        out.loss.copy_(loss)
        if out.d_student is None:
            return
        before = (weights.log() - suffix).logcumsumexp(-1) if weights.shape[1] else weights
        slope = call.factor[:, None] * ((x + before).exp() - weights)
        slope = torch.where((call.factor == 0)[:, None] | (loss == math.inf)[:, None] | (order < 0), 0.0, slope)
        slope = torch.where((no_distribution(call) & (call.factor != 0))[:, None], math.nan, slope)
        full = torch.zeros(call.student.shape, dtype=torch.float64, device=call.student.device)
        # Those left out share a place with a class that is not, and add 0 to it.
        out.d_student.copy_(full.scatter_add_(1, order.clamp(min=0), slope))


def _measured(call: ListwiseCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, the order, and along it weights, logits and suffix log-sum-exps."""
    student = call.student.to(torch.float64)
    counted = call.factor != 0
    bad = no_distribution(call)
    fine = counted & ~bad
    clean = call._replace(teacher=torch.where(fine[:, None], call.teacher.detach(), 0.0))
    order, weights = ranked(clean, torch.float64)
    x = torch.where(fine[:, None], student, 0.0).gather(1, order.clamp(min=0))
    gone = (order < 0) | (x.detach() == -math.inf)
    missing = (gone & (weights > 0)).any(-1)
    lowest = torch.where(gone, math.inf, x.detach()).amin(-1, keepdim=True)
    lowest = torch.where(lowest == math.inf, 0.0, lowest)
    x = torch.where(gone, lowest - _FAR, x)
    suffix = x.flip(-1).logcumsumexp(-1).flip(-1)
    row = (weights * (suffix - x)).sum(-1)
    row = call.factor * torch.where(missing, math.inf, row)
    row = torch.where(bad, math.nan, row)
    return torch.where(counted, row, 0.0), order, weights, x, suffix
