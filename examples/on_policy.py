"""On-policy distillation: the student writes, the teacher judges every token: ``python examples/on_policy.py``.

The student samples with transformers' ``generate``, and the loss compares both models on what it wrote: reverse KL, or
``--jsd``, from hidden states and heads, so that neither model's logits are ever all there. Only tokens that the student
wrote count.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tgt_fast as tgt

END = 2


def model(width: int, sharpness: float = 1.0) -> LlamaForCausalLM:
    sizes = {"intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=width, pad_token_id=0, eos_token_id=END, **sizes))
    made.lm_head.weight.data.mul_(sharpness)  # random weights are of no opinion
    return made.eval()


def write(student: LlamaForCausalLM, prompts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Texts that the student samples, and for each position the token after it, -100 where the student wrote none."""
    ids = student.generate(prompts, max_new_tokens=count, do_sample=True, top_k=0)
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    labels[:, : prompts.shape[1] - 1] = -100
    ended = (ids[:, prompts.shape[1] :] == END).cumsum(1) > 0  # from the end token on there is padding
    labels[:, prompts.shape[1] :][ended] = -100
    return ids, labels


def main(steps: int = 40, divergence: str = "reverse_kl") -> dict[str, float]:
    torch.manual_seed(0)
    student, teacher = model(16), model(32, sharpness=40.0).requires_grad_(False)
    loss_fn = tgt.LinearDistillationLoss(divergence, beta=0.5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    history = []
    for _ in range(steps):
        ids, labels = write(student, torch.randint(3, 60, (16, 4)), count=8)
        with torch.no_grad():
            judged = teacher.model(ids).last_hidden_state
        hidden = student.model(ids).last_hidden_state
        loss = loss_fn(hidden, student.lm_head.weight, judged, teacher.lm_head.weight, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    few = max(1, steps // 5)
    return {"before": sum(history[:few]) / few, "after": sum(history[-few:]) / few}


if __name__ == "__main__":
    print(main(divergence="jsd" if "--jsd" in sys.argv else "reverse_kl"))
