"""Training a student, one method at a time."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tgt_fast.cache import TeacherCache
from tgt_fast.demos.lm.data import Batches, Text, Windows, few_windows
from tgt_fast.demos.lm.models import LanguageModel
from tgt_fast.demos.lm.settings import PLENTY, Settings
from tgt_fast.demos.lm.teachers import Recorder, TeacherResult
from tgt_fast.demos.lm.training import Loss, bits_per_byte, next_token_loss, train
from tgt_fast.losses.linear import LinearDistillationLoss
from tgt_fast.ops.topk import TeacherTopK


@dataclass(frozen=True)
class StudentResult:
    """One student on the test text."""

    method: str
    seed: int
    windows: int  # that it was trained on
    steps: int
    before: float  # bits per byte, untrained
    bits_per_byte: float
    curve: tuple[tuple[int, float], ...]  # (step, bits per byte)
    seconds: float  # of training, on one core
    first_epoch_ms: float  # a step, in the median of the first epoch
    step_ms: float  # a step, in the median of the later epochs; of the first where there is no other
    cache_bytes: int  # on the disk; 0 without a cache


def student_model(settings: Settings) -> LanguageModel:
    s = settings
    return LanguageModel(s.tokens, s.length, s.width, s.layers, s.heads)


def train_student(
    method: str, teacher: TeacherResult | None, text: Text, judge: Windows, settings: Settings, seed: int
) -> StudentResult:
    """Train by ``method``; ``judge``: the text whose bits per byte are reported. One-hot labels need no teacher.

    A seed chooses the few windows, their order and the initial weights, the same for every method.
    """
    torch.manual_seed(seed)
    student = student_model(settings)
    windows = text.train if method in PLENTY else few_windows(text, settings, seed)
    batches = Batches(windows, settings.batch, settings.steps_of(method), seed)
    with tempfile.TemporaryDirectory(prefix="tgt-fast-lm-") as folder:
        with _loss(method, student, teacher, settings, Path(folder)) as loss:
            trained = train(
                student,
                loss,
                batches,
                settings.rate_of(method),
                settings.weight_decay,
                lambda model: bits_per_byte(model, judge, text.bytes_of),
                settings.evaluations,
            )
        cache_bytes = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    first, later = trained.step_seconds[: batches.per_epoch], trained.step_seconds[batches.per_epoch :]
    return StudentResult(
        method=method,
        seed=seed,
        windows=len(windows),
        steps=batches.count,
        before=trained.curve[0][1],
        bits_per_byte=trained.curve[-1][1],
        curve=trained.curve,
        seconds=trained.seconds,
        first_epoch_ms=1000 * statistics.median(first),
        step_ms=1000 * statistics.median(later or first),
        cache_bytes=cache_bytes,
    )


@contextmanager
def _loss(
    method: str, student: LanguageModel, teacher: TeacherResult | None, settings: Settings, folder: Path
) -> Iterator[Loss]:
    """The loss that a method minimises; only the hidden states of a side meet its head, a chunk of rows at a time."""
    if method.startswith("one-hot"):
        yield lambda hidden, ids, x, y: next_token_loss(hidden, student.head, y)
        return
    assert teacher is not None
    model = teacher.build(settings)
    if method in ("distillation", "distillation-plenty"):
        distill = LinearDistillationLoss(temperature=settings.temperature, hard_weight=settings.hard_weight)

        def against_model(hidden: Tensor, ids: Tensor, x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                theirs = model(x)
            target = y if settings.hard_weight else None
            return cast(Tensor, distill(hidden, student.head, theirs, model.head, target))

        yield against_model
        return
    distill = LinearDistillationLoss(temperature=settings.temperature, hard_weight=settings.record_hard_weight)

    def against_record(hidden: Tensor, record: TeacherTopK, y: Tensor) -> Tensor:
        target = y if settings.record_hard_weight else None
        return cast(Tensor, distill(hidden, student.head, target=target, teacher_logits=record))

    recorder = Recorder(model, settings.k, settings.temperature, settings.tail)
    if method == "distillation-records":
        yield lambda hidden, ids, x, y: against_record(hidden, recorder(x), y)
        return
    with TeacherCache(folder, recorder, k=settings.k, temperature=settings.temperature, tail=settings.tail) as cache:
        yield lambda hidden, ids, x, y: against_record(hidden, cast(TeacherTopK, cache.label(x, ids)), y)
