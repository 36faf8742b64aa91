"""A teacher whose rows do not depend on their neighbours, and writers in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tgt_fast as tgt

CLASSES, FEATURES = 37, 2


class RowWise(nn.Module):
    """Logits by a product and a sum a class: the same bits in any batch. Counts what it is asked."""

    def __init__(self, classes: int = CLASSES, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter((4 * torch.randn(FEATURES, classes, generator=generator)).to(dtype))
        self.register_buffer("shift", torch.zeros(classes, dtype=dtype))
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:  # [B, ..., 2] -> [B, ..., C]
        self.asked += len(x)
        x = x.to(self.weight.dtype)
        return x[..., :1] * self.weight[0] + x[..., 1:] * self.weight[1] + self.shift


def record_by_record(module: nn.Module, x: Tensor, k: int) -> tgt.TeacherTopK:
    """Records that are made a row at a time: the log-sum-exp of several rows depends on how many they are."""
    made = [tgt.topk_teacher(row[None], k, 2.0) for row in module(x)]
    return tgt.TeacherTopK(*(torch.cat(column) for column in zip(*map(parts, made), strict=True)), 2.0, CLASSES)


def data(count: int, *positions: int, seed: int = 1) -> Tensor:
    return torch.randn(count, *positions, FEATURES, generator=torch.Generator().manual_seed(seed))


def parts(label: Tensor | tgt.TeacherTopK) -> list[Tensor]:
    if isinstance(label, Tensor):
        return [label]
    return [label.ids, label.log_probs, *([] if label.tail_log_prob is None else [label.tail_log_prob])]


def same(one: Tensor | tgt.TeacherTopK, two: Tensor | tgt.TeacherTopK) -> bool:
    """Bit for bit, dtypes included."""
    pairs = list(zip(parts(one), parts(two), strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forked(run: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process that runs this and ends without the parent's exit handlers."""

    def child() -> None:
        torch.set_num_threads(1)
        run(*arguments)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def flip(path: Path, at: int) -> None:
    """One bit, counted from the end if negative, without a trace in the file's times."""
    times = path.stat()
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(bytes(raw))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
