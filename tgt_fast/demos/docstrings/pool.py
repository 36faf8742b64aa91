"""Synthetic texts in bulk: made once for a training of many epochs, with the labels that go with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tgt_fast.demos.docstrings.data import Texts
from tgt_fast.demos.docstrings.settings import Settings
from tgt_fast.demos.text.generator import PAD
from tgt_fast.explore import LatentSampler
from tgt_fast.teacher import Seq2SeqTeacher

_BATCH = 128


@dataclass(frozen=True)
class Pool:
    """M synthetic texts."""

    ids: Tensor  # [M, L] int64, as the student reads them
    logits: Tensor  # [M, C] float32, the labeler's
    anchors: Tensor  # [M] int64, the rows that they were made from (batch anchors)

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def joined(pools: Sequence[Pool]) -> Pool:
        return Pool(*(torch.cat([getattr(p, name) for p in pools]) for name in ("ids", "logits", "anchors")))


def make_sampler(teacher: Seq2SeqTeacher, texts: Texts, settings: Settings, seed: int, **options: Any) -> LatentSampler:
    """The sampler, calibrated on the labelled texts."""
    chosen: dict[str, Any] = {
        "mode": "random", "sigma": settings.sigma, "anchors": settings.anchors, "seed": seed,
        "step_size": settings.step_size,
    }  # fmt: skip
    sampler = LatentSampler(teacher, **{**chosen, **options})
    return sampler.calibrate((x, y) for _, x, y in _batches(texts))


def explore(
    sampler: LatentSampler,
    texts: Texts,
    steps: Sequence[int],
    length: int,
    student: nn.Module | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Pool:
    """A synthetic text of each anchor for each of ``steps``, numbers that key the noise."""
    made = []
    for step in steps:
        for rows, x, _ in _batches(texts):
            synth = sampler(x, sample_ids=rows, step=step, student=student)
            ids = synth.x["input_ids"][:, :length]
            made.append(
                Pool(
                    F.pad(ids, (0, length - ids.shape[1]), value=PAD),
                    synth.teacher_logits.float().detach(),
                    rows,
                )
            )
        progress()
    return Pool.joined(made)


def _batches(texts: Texts) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
    """(rows, data, classes), texts of about one length together: little padding."""
    order = (texts.ids != PAD).sum(1).argsort(stable=True)
    for rows in order.split(_BATCH):
        ids = texts.ids[rows]
        real = ids != PAD
        longest = int(real.sum(1).max())
        yield rows, {"input_ids": ids[:, :longest], "attention_mask": real[:, :longest].long()}, texts.y[rows]
