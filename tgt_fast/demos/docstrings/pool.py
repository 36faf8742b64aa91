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
    anchors: Tensor  # [M] int64, rows of the labelled texts that they were made from

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def joined(pools: Sequence[Pool]) -> Pool:
        return Pool(*(torch.cat([getattr(p, name) for p in pools]) for name in ("ids", "logits", "anchors")))


def make_sampler(teacher: Seq2SeqTeacher, texts: Texts, settings: Settings, seed: int, **options: Any) -> LatentSampler:
    """The sampler, calibrated on the labelled texts."""
    chosen: dict[str, Any] = {"mode": "random", "sigma": settings.sigma, "step_size": settings.step_size, "seed": seed}
    sampler = LatentSampler(teacher, **{**chosen, **options})
    return sampler.calibrate(x for _, _, x in _batches(texts, torch.arange(len(texts))))


def explore(
    sampler: LatentSampler,
    texts: Texts,
    steps: Sequence[int],
    settings: Settings,
    student: nn.Module | None = None,
    climbed: Callable[[tuple[float, float]], None] = lambda disagreement: None,
) -> Pool:
    """As many synthetic texts as there are labelled ones, for each of ``steps``, numbers that key the noise.

    ``climbed`` is told the mean disagreement of each batch before and after the gradient's steps.
    """
    made, length = [], settings.generator.max_length
    for step in steps:
        anchors = chosen_anchors(texts.y, settings.anchors, step)
        for places, rows, x in _batches(texts, anchors):
            synth = sampler(x, sample_ids=places, step=step, student=student)
            ids = synth.x["input_ids"][:, :length]
            padded = F.pad(ids, (0, length - ids.shape[1]), value=PAD)
            made.append(Pool(padded, synth.teacher_logits.float().detach(), rows))
            if sampler.last_disagreement:
                climbed((sampler.last_disagreement[0], sampler.last_disagreement[-1]))
    return Pool.joined(made)


def chosen_anchors(y: Tensor, how: str, step: int) -> Tensor:
    """Rows of the anchors, int64 [N], of N labelled texts of classes y.

    "batch": each once. "balanced": each is of a class drawn evenly, so that rare classes' texts are used more often.
    """
    if how == "batch":
        return torch.arange(len(y))
    generator = torch.Generator().manual_seed(step)
    weight = 1.0 / torch.bincount(y)[y].double()
    return torch.multinomial(weight, len(y), replacement=True, generator=generator)


def _batches(texts: Texts, anchors: Tensor) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """(places among the anchors, their rows, data), texts of about one length together: little padding."""
    order = (texts.ids[anchors] != PAD).sum(1).argsort(stable=True)
    for places in torch.split(order, _BATCH):
        rows = anchors[places]
        ids = texts.ids[rows]
        real = ids != PAD
        longest = int(real.sum(1).max())
        yield places, rows, {"input_ids": ids[:, :longest], "attention_mask": real[:, :longest].long()}
