"""A teacher that sees more than the student: ``python examples/other_context.py``.

Both read the same answers, the teacher behind a hint, the student without one: what it learns is to answer as if it had
been given the hint. Answers then stand at other positions on the two sides, so the rows of the loss are picked by
position on each side, in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

import tgt_fast as tgt


def model(width: int, sharpness: float = 1.0) -> LlamaForCausalLM:
    sizes = {"intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=width, pad_token_id=0, **sizes))
    made.lm_head.weight.data.mul_(sharpness)  # random weights are of no opinion
    return made.eval()


def behind(contexts: list[Tensor], answers: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids [B, L], padded, and for each token of an answer its row among the B * L positions that predict one."""
    ids = pad_sequence([torch.cat(pair) for pair in zip(contexts, answers, strict=True)], batch_first=True)
    rows = []
    for number, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
        first = number * ids.shape[1] + len(context) - 1  # the position before a token predicts it
        rows.append(first + torch.arange(len(answer)))
    return ids, torch.cat(rows)


def hidden(reader: LlamaForCausalLM, ids: Tensor, rows: Tensor) -> Tensor:
    return reader.model(ids, attention_mask=(ids != 0).long()).last_hidden_state.flatten(0, 1)[rows]  # [N, H]


def main(steps: int = 40) -> dict[str, float]:
    torch.manual_seed(0)
    student, teacher = model(16), model(32, sharpness=40.0).requires_grad_(False)
    hint = torch.tensor([7, 8, 9, 10, 11])
    questions = [torch.randint(12, 60, (length,)) for length in (3, 5, 4, 6)]
    answers = [torch.randint(12, 60, (length,)) for length in (6, 3, 5, 4)]
    mine = behind(questions, answers)
    theirs = behind([torch.cat([hint, question]) for question in questions], answers)
    with torch.no_grad():
        judged = hidden(teacher, *theirs)
    loss_fn = tgt.LinearDistillationLoss("forward_kl", hard_weight=0.1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    history = []
    for _ in range(steps):
        loss = loss_fn(
            hidden(student, *mine), student.lm_head.weight, judged, teacher.lm_head.weight, torch.cat(answers)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return {"before": history[0], "after": history[-1]}


if __name__ == "__main__":
    print(main())
