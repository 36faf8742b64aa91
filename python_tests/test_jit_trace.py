"""``torch.jit.trace`` keeps what one call computed: an op that it cannot see through refuses to be recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast.errors import BackendError
from tgt_fast.kernels.adjust import Adjustments

A, B = torch.arange(12.0).view(3, 4).sin(), torch.arange(12.0).view(3, 4).cos()
RECORD = tgt.topk_teacher(B, 2)


OPS: dict[str, Callable[[Tensor, Tensor, str], Any]] = {
    "distillation_loss": lambda a, b, backend: tgt.distillation_loss(a, b, backend=backend),
    "a module": lambda a, b, backend: tgt.DistillationLoss(backend=backend)(a, b),
    "a record": lambda a, b, backend: tgt.distillation_loss(a, RECORD, backend=backend),
    "linear_distillation_loss": lambda a, b, backend: tgt.linear_distillation_loss(a, b, b, a, backend=backend),
    "contrastive_distillation_loss": lambda a, b, backend: tgt.contrastive_distillation_loss(
        a, b, b, a, temperature=0.5, backend=backend
    ),
    "perturb_latents": lambda a, b, backend: tgt.perturb_latents(a, 1.0, backend=backend),
    "ascend_latents": lambda a, b, backend: tgt.ascend_latents(a, b, step_size=1.0, backend=backend),
    "sample_tokens": lambda a, b, backend: tgt.sample_tokens(a, backend=backend),
    "soft_embedding": lambda a, b, backend: tgt.soft_embedding(a, b.T.contiguous(), backend=backend),
    "topk_teacher": lambda a, b, backend: tgt.topk_teacher(a, 2).log_probs,
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("chosen", ["auto", "reference"])
@pytest.mark.parametrize("gradients", [False, True])
def test_every_op_refuses_and_says_what_to_use(name: str, chosen: str, gradients: bool) -> None:
    op = OPS[name]
    op(A, B, chosen)
    inputs = tuple(x.clone().requires_grad_(gradients) for x in (A, B))
    with pytest.raises(BackendError, match=r"torch\.jit\.trace.*torch\.export"):
        torch.jit.trace(lambda a, b: op(a, b, chosen), inputs)


@pytest.mark.parametrize("mode", ["random", "gradient"])
def test_a_sampler_refuses(mode: str) -> None:
    teacher, student = tgt.Teacher(nn.Identity(), nn.Identity(), nn.Linear(4, 3)), nn.Linear(4, 3)
    sampler = tgt.LatentSampler(teacher, mode, units="absolute")
    assert sampler(A, student=student).teacher_logits.shape == (3, 3)
    with pytest.raises(BackendError, match=r"LatentSampler.*torch\.export"):
        torch.jit.trace(lambda x: sampler(x, student=student).teacher_logits, (A,))


def test_what_is_made_of_pytorch_alone_is_recorded_rightly() -> None:
    mapped, mask = torch.tensor([2, -1, 0, 1]), torch.tensor([True, True, False, True])

    def aligned(a: Tensor, b: Tensor, wanted: Tensor) -> Any:
        return tgt.align_logits(a, b, vocab_map=wanted, vocab_mask=mask)

    recorded = torch.jit.trace(aligned, (A, B, mapped))
    others = torch.randn(7, 4), torch.randn(7, 4), torch.tensor([3, 0, -1, 1])
    for got, want in zip(recorded(*others), aligned(*others), strict=True):
        assert torch.equal(got, want)


def test_the_registered_ops_are_recorded_rightly() -> None:
    """By name they are nodes of the graph, as PyTorch's own are."""

    def loss(a: Tensor, b: Tensor) -> Tensor:
        options = ("forward_kl", 0.5, 1.0, 1.0, 1.0, 0.0, 0.0, -100, -1, "mean", None)
        return torch.ops.tgt_fast.distillation_loss(a, b, *7 * [None], *options, *Adjustments(), False, "auto")[0]

    recorded = torch.jit.trace(loss, (A, B))
    others = torch.randn(6, 9), torch.randn(6, 9)
    assert torch.equal(recorded(*others), tgt.distillation_loss(*others))
