"""Ops in forked children, where PyTorch's own parallel loops hang: with two threads wanted, no op of ours does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from programs import ran

CHILD = """
import json, signal, sys
import torch
import tgt_fast as tgt

sys.path.insert(0, sys.argv[1])
from forked import said_by_child

N, C, H, THREADS = 64, 20_000, 128, 2
torch.set_num_threads(THREADS)
s, t = torch.randn(N, C, requires_grad=True), torch.randn(N, C)
target = torch.randint(0, C, (N,), dtype=torch.int32)
hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(C, H, requires_grad=True)
teacher_hidden, teacher_weight = torch.randn(N, H), torch.randn(C, H)
z, gradient = torch.randn(512, 4096), torch.randn(512, 4096)
sphere = torch.randn(512, 4096, requires_grad=True)
record = tgt.topk_teacher(t, k=64)
queries, passages = (torch.randn(512, H, requires_grad=True) for _ in range(2))
towers = torch.randn(512, H), torch.randn(512, H)
vocabulary = torch.randperm(C)
upstream = torch.randn(N, H)


def grads(loss, *inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def linear(*teacher, **options):
    loss = tgt.linear_distillation_loss(hidden, weight, *teacher, target=target, hard_weight=0.5, **options)
    return grads(loss, hidden, weight)


def soft(**options):
    out = tgt.soft_embedding(s, weight, **options)
    return [out.detach(), *torch.autograd.grad(out, (s, weight), upstream)]


def perturbed(*arguments, **options):
    out = tgt.perturb_latents(sphere, *arguments, **options)
    return [out.detach(), *torch.autograd.grad(out, sphere, gradient)]


CALLS = {
    "distill": lambda: grads(tgt.distillation_loss(s, t, target=target, hard_weight=0.5), s),
    "distill, strided": lambda: [tgt.distillation_loss(s.detach().T[:64], t.T[:64])],
    "distill, reference": lambda: [tgt.distillation_loss(s.detach(), t, backend="reference")],
    "record": lambda: grads(tgt.distillation_loss(s, record), s),
    "topk_teacher": lambda: [tgt.topk_teacher(t, k=64).log_probs],
    "linear": lambda: linear(teacher_hidden, teacher_weight),
    "linear, logits": lambda: linear(teacher_logits=t),
    "linear, record": lambda: linear(teacher_logits=record),
    "contrast": lambda: grads(
        tgt.contrastive_distillation_loss(queries, passages, *towers, temperature=0.1), queries, passages
    ),
    "align": lambda: list(tgt.align_logits(s.detach(), t, vocab_map=vocabulary)),
    "sample": lambda: [tgt.sample_tokens(t, top_p=0.9, seed=1), tgt.sample_tokens(t.T[:64], top_k=50, seed=1)],
    "soft": lambda: soft(seed=1),
    "perturb": lambda: [tgt.perturb_latents(z, 0.5, seed=1, sphere_radius="keep"), tgt.perturb_latents(z.T, 0.5)],
    "perturb, gradient": lambda: perturbed(0.5, seed=1, sphere_radius=3.0),
    "ascend": lambda: [tgt.ascend_latents(z, gradient, step_size=1.0, anchor=z, radius=0.5)],
}


def told(name, expected):
    signal.alarm(20)  # a hang ends here
    torch.set_num_threads(THREADS)
    found = CALLS[name]()
    said = "other threads" if torch.get_num_threads() != THREADS else "done"
    torch.set_num_threads(1)
    for one, other in zip(found, expected):
        if not torch.allclose(one, other, atol=1e-5):
            said = "other numbers"
    return said


found = {}
for name, call in CALLS.items():
    expected = call()
    found[name] = said_by_child(lambda: told(name, expected))
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_no_op_hangs_in_a_forked_child(native: str, child_environment: dict[str, str]) -> None:
    done = ran(CHILD, str(Path(__file__).parent), environment=child_environment, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {name: said for name, said in found.items() if said != "done"} == {}
