"""``vocab_group`` of the loss from hidden states: a process has a slice of the heads, the loss is of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import relative_error
from process_kit import all_made, in_processes, needs_processes
from torch import Tensor
from vocab_kit import CLASSES, OFFSETS, ROWS

import tgt_fast as tgt
from tgt_fast.kernels.linear_heads import Head
from tgt_fast.ops.vocab_parallel import linear_library, shards

WIDTH, TEACHER_WIDTH = 6, 5
HEADS = ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias")
SLICED = {"student_weight": 0, "student_bias": 0, "teacher_weight": 0, "teacher_bias": 0, "teacher_logits": 1}
MASK = torch.arange(CLASSES) % 5 != 3

# What each call passes beside the student's head and the teacher's, and in which dtype.
CALLS: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {"hard_weight": 1.0, "label_smoothing": 0.1, "temperature": 2.0, "memory_budget": 700}),
    (torch.float32, {"divergence": "jsd", "student_softcap": 5.0, "teacher_scale": 0.5, "vocab_size": CLASSES - 3}),
    (torch.float32, {"divergence": "reverse_kl", "vocab_mask": MASK, "reduction": "none", "hard_weight": 0.5}),
    (torch.float32, {"divergence": "symmetric", "teacher_logits": True, "reduction": "sum", "vocab_size": 30}),
    (torch.float64, {"divergence": "tvd", "vocab_mask": MASK, "vocab_size": 30, "hard_weight": 1.0}),
    (torch.bfloat16, {"divergence": "forward_kl", "temperature": 2.0}),
    (torch.float16, {"divergence": "cross_entropy", "hard_weight": 1.0}),
)


def inputs(dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Tensor]:
    def normal(*shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    made = {
        "student_hidden": normal(ROWS, WIDTH, seed=1), "student_weight": normal(CLASSES, WIDTH, seed=2),
        "student_bias": normal(CLASSES, seed=3), "teacher_hidden": normal(ROWS, TEACHER_WIDTH, seed=4),
        "teacher_weight": normal(CLASSES, TEACHER_WIDTH, seed=5), "teacher_bias": normal(CLASSES, seed=6),
    }  # fmt: skip
    if options.get("teacher_logits"):
        made = {name: made[name] for name in HEADS[:3]}
        made["teacher_logits"] = normal(ROWS, CLASSES, seed=7) * 2
    return made


def target() -> Tensor:
    made = torch.arange(ROWS) * 3  # of classes that the mask leaves in, below 30
    made = torch.where(MASK[made], made, made + 1)
    made[0], made[1] = -100, -1
    return made


def evaluated(
    tensors: dict[str, Tensor], options: dict[str, Any], **more: Any
) -> tuple[Tensor, dict[str, Tensor], Any]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    rest = {name: value for name, value in options.items() if name != "teacher_logits"}
    loss, stats = tgt.linear_distillation_loss(**leaves, target=target(), return_stats=True, **rest, **more)
    weights = torch.arange(1, ROWS + 1, dtype=loss.dtype)  # an upstream gradient a row, where there is a loss a row
    (loss * weights if loss.dim() else loss * 2).sum().backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}, tuple(stats)


@needs_processes
@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradients_are_those_of_whole_heads(world: int, tmp_path: Path) -> None:
    offsets = OFFSETS[world]

    def work(rank: int) -> Any:
        made = []
        here = slice(offsets[rank], offsets[rank + 1])
        for dtype, options in CALLS:
            tensors = inputs(dtype, options)
            for name, dim in SLICED.items():
                if name in tensors:
                    tensors[name] = tensors[name][(slice(None),) * dim + (here,)].contiguous()
            made.append(evaluated(tensors, options, vocab_group="world"))
        return made

    found = all_made(in_processes(world, tmp_path, work))
    for (dtype, options), *parts in zip(CALLS, *found, strict=True):
        loss, grads, stats = evaluated(inputs(dtype, options), options)
        wide = evaluated({k: v.double() for k, v in inputs(dtype, options).items()}, options)[1]
        bar = {torch.float32: 2e-5, torch.float64: 1e-9}.get(dtype)
        for own_loss, own, own_stats in parts:
            assert torch.equal(own_loss, parts[0][0])
            torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=1e-6)
            for mine, theirs in zip(own_stats, stats, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)
            assert own.keys() == grads.keys()
        for name, grad in grads.items():
            if name in SLICED:
                joined = torch.cat([own[name] for _, own, _ in parts], dim=SLICED[name])
            else:
                joined = parts[0][1][name]
                assert all(torch.equal(own[name], joined) for _, own, _ in parts)
            truth = wide[name]
            floor = 1e-2 * float(truth.norm().clamp_min(1.0))
            rounding = relative_error(truth.to(dtype), truth, floor)
            assert relative_error(joined, truth, floor) <= (bar or 1.5 * rounding + 2e-5), (options, name)
            assert joined.dtype == grad.dtype


@needs_processes
def test_what_travels_and_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = OFFSETS[2]
    dtype, options = CALLS[0]

    def work(rank: int) -> Any:
        here = slice(offsets[rank], offsets[rank + 1])
        tensors = inputs(dtype, options)
        tensors = {name: x[here] if name in SLICED else x for name, x in tensors.items()}
        sent: list[Any] = []
        begin, end, product = shards.started, linear_library.finished, Head.logits

        def begun(numbers: Tensor, operation: str, groups: tuple[str, ...]) -> Tensor:
            sent.append(tuple(numbers.shape))
            return begin(numbers, operation, groups)

        def ended(numbers: Tensor, operation: str, groups: tuple[str, ...]) -> Tensor:
            sent.append("sums")
            return end(numbers, operation, groups)

        def multiplied(head: Head, at: slice, slot: int) -> Tensor:
            sent.append("product")
            return product(head, at, slot)

        module = tgt.LinearDistillationLoss(vocab_group="world", **options)
        module(**tensors, target=target())
        monkeypatch.setattr(shards, "started", begun)
        monkeypatch.setattr(linear_library, "started", begun)
        monkeypatch.setattr(linear_library, "finished", ended)
        monkeypatch.setattr(Head, "logits", multiplied)
        leaves = {name: x.clone().requires_grad_(name == "student_hidden") for name, x in tensors.items()}
        module(**leaves, target=target()).backward()
        messages = []
        for more in (
            {"vocab_map": torch.arange(CLASSES)}, {"vocab_mask": torch.ones(5, dtype=torch.bool)},
            {"vocab_size": CLASSES + 1}, {"backend": "reference"},
        ):  # fmt: skip
            with pytest.raises((ValueError, RuntimeError)) as raised:
                tgt.linear_distillation_loss(**tensors, target=target(), **{**options, **more, "vocab_group": "world"})
            messages.append(f"{type(raised.value).__name__}: {raised.value}")
        return sent, messages

    for sent, messages in all_made(in_processes(2, tmp_path, work)):
        rows = [shape[0] for shape in sent if shape[1:] == (7,)]
        assert sum(rows) == ROWS
        assert len(rows) > 1
        # The sums of a chunk's hidden states are on their way while the next chunk is at work.
        chunks = [["product", "product", (n, 7), (n, 8), "sums", (n * WIDTH,)] for n in rows]
        assert sent == [*chunks[0][:4], chunks[0][5], *(one for chunk in chunks[1:] for one in chunk), "sums"]
        assert "vocab_map is not taken with vocab_group" in messages[0]
        assert "vocab_mask must hold a bool for each of the 37 classes of all processes" in messages[1]
        assert "but the processes have 37 classes between them" in messages[2]
        assert messages[3].startswith("BackendError: linear: backend 'reference' has all classes of a row")
