"""The distillation loss as others compute it: soft term * T^2 + hard cross-entropy, mean over the rows, from logits.

Each is written as its users would, with its public functions. What a rival cannot compute is said, not replaced.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tgt_fast.bench import rivals
from tgt_fast.bench.case import UnfitError

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student [N, C], teacher [N, C], target [N] -> 0-d


def loss_of(name: str, divergence: str, temperature: float) -> Loss:
    """A rival's loss.

    Raises:
        UnfitError: the rival has nothing that computes it.
    """
    if name in (rivals.EAGER, rivals.COMPILE):
        return _plain(divergence, temperature)
    if name == "liger":
        return _liger(divergence, temperature)
    if name == "quack":
        return _quack(divergence)
    raise UnfitError("starts from hidden states and a head: it has no loss on logits")


def _plain(divergence: str, temperature: float) -> Loss:
    """As a PyTorch user writes it, in the dtype of the logits."""
    if divergence == "none":
        return lambda student, _, target: F.cross_entropy(student, target)
    soft = _PLAIN[divergence]

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        log_q = F.log_softmax(student / temperature, dim=-1)
        log_p = F.log_softmax(teacher / temperature, dim=-1)
        return soft(log_p, log_q) * temperature**2 + F.cross_entropy(student, target)

    return loss


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b), mean over the rows."""
    return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def _tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() - log_q.exp()).abs().sum(dim=-1).mean() / 2


_PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": _kl,
    "reverse_kl": lambda log_p, log_q: _kl(log_q, log_p),
    "jsd": _jsd,
    "tvd": _tvd,
}


def _liger(divergence: str, temperature: float) -> Loss:
    """Its losses take log-probabilities (tvd: probabilities), and sum over the classes with these reductions."""
    functional: Any = importlib.import_module("liger_kernel.transformers.functional")

    def hard(student: Tensor, target: Tensor) -> Tensor:
        # Its cross-entropy writes the gradient over its input, which a training step can spare and a benchmark cannot.
        made: Tensor = functional.liger_cross_entropy(student.clone(), target)
        return made

    def soft(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = student / temperature, teacher / temperature
        made: Tensor
        if divergence == "tvd":
            made = functional.liger_tvd(student.softmax(dim=-1), teacher.softmax(dim=-1), reduction="batchmean")
            return made
        log_q, log_p = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
        if divergence == "forward_kl":
            made = functional.liger_kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        else:  # its beta weighs the teacher, and 1 stands for the reverse KL
            made = functional.liger_jsd(log_q, log_p, beta={"jsd": 0.5, "reverse_kl": 1.0}[divergence])
        return made

    if divergence == "none":
        return lambda student, _, target: hard(student, target)
    return lambda student, teacher, target: soft(student, teacher) * temperature**2 + hard(student, target)


def _quack(divergence: str) -> Loss:
    if divergence != "none":
        raise UnfitError("has no divergence of two rows of logits; see the case 'CE alone'")
    quack: Any = importlib.import_module("quack")

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        made: Tensor = quack.cross_entropy(student, target, reduction="mean")
        return made

    return loss
