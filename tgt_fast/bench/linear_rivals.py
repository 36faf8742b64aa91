"""The distillation loss from hidden states as others compute it: soft term * T^2 + cross-entropy, mean over rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tgt_fast.bench import distill_rivals, rivals
from tgt_fast.bench.case import UnfitError

CHUNKED: Final = "chunked"
LINEAR_CE: Final = "linear_cross_entropy"  # PyTorch's own
ALL: Final = (rivals.EAGER, rivals.COMPILE, CHUNKED, LINEAR_CE, "liger", "orda", "cce")
_ROWS: Final = 256  # of a chunk

Loss = Callable[..., Tensor]  # hidden, weight, what there is of the teacher, target -> 0-d


def loss_of(name: str, divergence: str, temperature: float, scale: float = 1.0) -> Loss:
    """A rival's loss of hidden [N, Hs], weight [C, Hs], teacher [N, Ht], teacher_weight [C, Ht], target [N].

    Logits are ``scale * hidden @ weight.T`` on both sides.

    Raises:
        UnfitError: the rival has nothing that computes it.
    """
    if name == LINEAR_CE:
        if scale != 1.0:
            raise UnfitError("takes no factor of the logits")
        return _linear_cross_entropy(divergence, temperature)
    if name not in (rivals.EAGER, rivals.COMPILE, CHUNKED):
        raise UnfitError("has no such divergence of two heads together with the hard term")
    on_logits = distill_rivals.loss_of(rivals.EAGER, divergence, temperature)

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, target: Tensor) -> Tensor:
        student, other = hidden @ weight.T, teacher @ teacher_weight.T
        if scale != 1.0:
            student, other = student * scale, other * scale
        return on_logits(student, other, target)

    return _chunked(loss, whole=(1, 3)) if name == CHUNKED else loss


def loss_of_record(name: str, divergence: str, temperature: float) -> Loss:
    """The same of hidden, weight, a record's ids [N, k], log_probs [N, k] and tail [N], target: its bucket form.

    Raises:
        UnfitError: the rival has nothing that computes it.
    """
    if name not in (rivals.EAGER, rivals.COMPILE, CHUNKED):
        raise UnfitError("takes no top-k record of a teacher")
    if divergence != "forward_kl":
        raise UnfitError("is measured on forward_kl alone")

    def loss(hidden: Tensor, weight: Tensor, ids: Tensor, log_probs: Tensor, tail: Tensor, target: Tensor) -> Tensor:
        logits = hidden @ weight.T
        log_q = (logits / temperature).log_softmax(-1)
        others = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        log_q, log_p = torch.cat([log_q.gather(-1, ids), others], -1), torch.cat([log_probs, tail[:, None]], -1)
        soft = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        return soft * temperature**2 + F.cross_entropy(logits, target)

    return _chunked(loss, whole=(1,)) if name == CHUNKED else loss


def _chunked(loss: Loss, whole: tuple[int, ...]) -> Loss:
    """As a user saves memory with PyTorch alone: a chunk's logits are made again in backward.

    ``whole``: the arguments that have no rows.
    """

    def chunked(*arguments: Tensor) -> Tensor:
        rows = arguments[0].shape[0]
        total = torch.zeros((), dtype=torch.float32, device=arguments[0].device)
        for start in range(0, rows, _ROWS):
            at = slice(start, start + _ROWS)
            own = (x if i in whole else x[at] for i, x in enumerate(arguments))
            part: Any = checkpoint(loss, *own, use_reentrant=False)
            total = total + part.float() * (min(_ROWS, rows - start) / rows)
        return total

    return chunked


def _linear_cross_entropy(divergence: str, temperature: float) -> Loss:
    """Both terms by PyTorch's cross-entropy of a head.

    That of soft labels is the divergence plus their entropy, and their gradients are the same. It has chunks for class
    indices alone: the logits of the soft term, and the teacher's, are in memory whole.
    """
    if divergence != "forward_kl":
        raise UnfitError("gives the gradients of forward_kl alone")
    cross_entropy: Any = getattr(F, "linear_cross_entropy", None)
    if cross_entropy is None:
        raise UnfitError(f"torch {torch.__version__} does not have it")
    chunks: Any = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            p = (teacher @ teacher_weight.T).div_(temperature).softmax(-1)
            entropy = torch.special.entr(p).sum(dtype=torch.float32) / p.shape[0]
        soft = cross_entropy(hidden / temperature, weight, p) - entropy
        both: Tensor = soft * temperature**2 + cross_entropy(hidden, weight, target, options=chunks)
        return both

    return loss
