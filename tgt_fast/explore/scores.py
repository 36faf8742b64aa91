"""Scores of synthetic examples, which exploration climbs and replay chooses by.

A score is a callable ``(student_logits, teacher_logits) -> [B]``, of logits [B, ..., C], differentiable: a number an
example, the sum over its positions where it has several. Those here are functions; ``functools.partial`` sets their
options, and any callable of yours will do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.ops.distill import distillation_loss

Score = Callable[[Tensor, Tensor], Tensor]

__all__ = ["agreeing", "disagreement", "diversity", "entropy", "hardness"]


def disagreement(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    r"""``D(p, q)``, with p the labeler's and q the student's distribution; options as in
    :func:`tgt_fast.distillation_loss`. What a sampler without ``score=`` climbs.

    Source: Zaheer et al., "Teacher Guided Training" (ICLR 2023); before it, with a generator in the place of the
    latents, Micaelli and Storkey, "Zero-shot knowledge transfer via adversarial belief matching" (NeurIPS 2019).

    >>> import torch
    >>> s = torch.tensor([[0.0, 0.0]], requires_grad=True)
    >>> disagreement(s, torch.tensor([[0.0, 0.0]])).tolist()
    [0.0]
    """
    loss = distillation_loss(
        student_logits, teacher_logits, divergence=divergence, beta=beta, temperature=temperature, reduction="none",
        backend=backend,
    )  # fmt: skip
    return _by_example(loss)


def entropy(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""``-sum_c q_c log q_c``, in nats, of the student's distribution ``q = softmax(s / temperature)``.

    Source: uncertainty sampling, Lewis and Gale, "A sequential algorithm for training text classifiers" (SIGIR 1994);
    climbed in a latent space by Zhang et al., "Expanding small-scale datasets with guided imagination" (NeurIPS 2023).

    >>> entropy(torch.zeros(1, 4), torch.zeros(1, 4)).exp().round(decimals=4).tolist()
    [4.0]
    """
    log_q = (_wide(student_logits) / _positive("entropy", temperature)).log_softmax(-1)
    return _by_example(-(log_q.exp() * _finite(log_q)).sum(-1))


def hardness(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""``-log q_y``, the student's cross-entropy to the labeler's class ``y = argmax t``.

    Source: the loss that Volpi et al., "Generalizing to unseen domains via adversarial data augmentation" (NeurIPS
    2018), climb, and that Shrivastava et al., "Training region-based object detectors with online hard example mining"
    (CVPR 2016), choose by; with the labeler in the place of the label.

    >>> hardness(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]])).exp().tolist()
    [2.0]
    """
    log_q = _wide(student_logits).log_softmax(-1)
    return _by_example(-log_q.gather(-1, teacher_logits.argmax(-1, keepdim=True)).squeeze(-1))


def agreeing(student_logits: Tensor, teacher_logits: Tensor, *, score: Score = disagreement) -> Tensor:
    r"""``score`` where the student's class is the labeler's, else 0, without a slope: pushes an example as far as to
    where the two part, and no further.

    An example of several positions counts as agreeing where they agree at all of them.

    Source: the masked adversarial term of Fang et al., "Contrastive model inversion for data-free knowledge
    distillation" (IJCAI 2021).

    >>> s, t = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> (agreeing(s, t) > 0).tolist()
    [True, False]
    """
    same = student_logits.argmax(-1) == teacher_logits.argmax(-1)
    same = same if same.ndim == 1 else same.flatten(1).all(1)
    value = score(student_logits, teacher_logits)
    return torch.where(same, value, torch.zeros_like(value))


def diversity(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""``KL(p_i || m)``, ``p_i = softmax(t_i / temperature)`` the labeler's distribution, m its mean over the batch.

    Its mean over the batch is the information that an example's place in it gives about its class. A teacher with
    ``max_batch`` is asked in pieces, each with a mean of its own.

    Source: the diversity term of Zhang et al., "Expanding small-scale datasets with guided imagination" (NeurIPS 2023),
    there of features; of classes it is the inception score's, Salimans et al. (NeurIPS 2016).

    >>> diversity(torch.zeros(2, 2), torch.tensor([[50.0, 0.0], [0.0, 50.0]])).exp().tolist()
    [2.0, 2.0]
    """
    log_p = (_wide(teacher_logits) / _positive("diversity", temperature)).log_softmax(-1)
    p = log_p.exp()
    log_m = _finite(p.mean(0, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny).log())
    return _by_example((p * (_finite(log_p) - log_m)).sum(-1))


def scored(op: str, score: Score, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """A score's numbers, [B], if they are such.

    Raises:
        DTypeError, ShapeError: they are not.
    """
    found = score(student_logits, teacher_logits)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        got = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise DTypeError(f"{op}: score must return a floating-point tensor, got {got}")
    if found.shape != student_logits.shape[:1]:
        raise ShapeError(
            f"{op}: score must return a number an example, ({student_logits.shape[0]},), got {tuple(found.shape)}"
        )
    return found


def check_score(op: str, score: object) -> Score | None:
    """
    Raises:
        ArgumentError: it can neither be called nor is it None.
    """
    if score is not None and not callable(score):
        raise ArgumentError(f"{op}: score must be callable, as those of tgt_fast.scores, got {type(score).__name__}")
    return score


def _wide(logits: Tensor) -> Tensor:
    """Half-precision logits as float32: the scores are sums of small differences."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _finite(log_p: Tensor) -> Tensor:
    """Logarithms of probabilities with 0 for those of 0, so that p * log p is 0 there, and its slope, too."""
    return log_p.masked_fill(log_p == -torch.inf, 0.0)


def _by_example(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def _positive(name: str, temperature: float) -> float:
    if not temperature > 0:
        raise ArgumentError(f"{name}: temperature must be > 0, got {temperature!r}")
    return temperature
