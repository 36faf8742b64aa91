"""One call of every public op, with a tensor in each argument that takes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tgt_fast as tgt

Call = tuple[Callable[..., Any], dict[str, Any]]


def rows(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)


def public_calls() -> dict[str, Call]:
    """Every public op, with a tensor in each argument that takes one."""
    labels, weight, one = torch.tensor([0, 1, 2]), torch.ones(3), torch.tensor(2.0)
    noise = {
        "seed": torch.tensor(3),
        "step": torch.tensor(1),
        "sample_ids": torch.arange(3),
        "replica": torch.arange(3),
    }
    hard = {"target": labels, "hard_weight": 1.0, "sample_weight": weight, "normalizer": one}
    shared = {"vocab_map": torch.arange(5), "vocab_mask": torch.ones(5, dtype=torch.bool)}
    record = tgt.topk_teacher(rows(3, 5), 2)
    heads = {"student_hidden": rows(3, 4), "student_weight": rows(5, 4), "student_bias": rows(5)}
    return {
        "distillation_loss": (
            tgt.distillation_loss, {"student_logits": rows(3, 5), "teacher_logits": rows(3, 5), **hard},
        ),
        "distillation_loss of a record": (
            lambda ids, log_probs, tail, **rest: tgt.distillation_loss(
                teacher_logits=tgt.TeacherTopK(ids, log_probs, tail, 1.0, 5), **rest
            ),
            {
                "student_logits": rows(3, 5), "ids": record.ids, "log_probs": record.log_probs,
                "tail": record.tail_log_prob, **hard,
            },
        ),
        "topk_teacher": (tgt.topk_teacher, {"logits": rows(3, 5), "k": 2}),
        "linear_distillation_loss": (
            tgt.linear_distillation_loss,
            {
                **heads, "teacher_hidden": rows(3, 2), "teacher_weight": rows(5, 2), "teacher_bias": rows(5), **hard,
                **shared,
            },
        ),
        "linear_distillation_loss of logits": (
            tgt.linear_distillation_loss, {**heads, "teacher_logits": rows(3, 5), **hard, **shared},
        ),
        "align_logits": (tgt.align_logits, {"student_logits": rows(3, 5), "teacher_logits": rows(3, 5), **shared}),
        "contrastive_distillation_loss": (
            tgt.contrastive_distillation_loss,
            {
                "student_q": rows(3, 4), "student_d": rows(4, 4), "teacher_q": rows(3, 2), "teacher_d": rows(4, 2),
                "temperature": 1.0, "hard_weight": 1.0, "positives": labels, "passage_ids": torch.arange(4),
                "sample_weight": weight, "normalizer": one,
            },
        ),
        "perturb_latents": (tgt.perturb_latents, {"z": rows(3, 5), "sigma": rows(3, 1).abs(), **noise}),
        "perturb_latents a coordinate": (tgt.perturb_latents, {"z": rows(3, 5), "sigma": rows(5).abs(), **noise}),
        "ascend_latents": (
            tgt.ascend_latents,
            {
                "z": rows(3, 5), "grad": rows(3, 5), "step_size": rows(3), "scale": rows(5).abs(),
                "anchor": rows(3, 5), "radius": torch.ones(3), "sigma": torch.ones(3), **noise,
            },
        ),
        "sample_tokens": (tgt.sample_tokens, {"logits": rows(3, 5), **noise}),
        "soft_embedding": (
            tgt.soft_embedding, {"logits": rows(3, 5), "table": rows(5, 2), "gumbel": True, **noise},
        ),
    }  # fmt: skip
