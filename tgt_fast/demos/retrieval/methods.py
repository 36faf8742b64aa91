"""Training the student, one method at a time. Every method lets it read the same number of texts a step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from tgt_fast.demos.digits.teachers import cosine
from tgt_fast.demos.retrieval.data import Labelled, Vectors
from tgt_fast.demos.retrieval.models import Tower, recalls
from tgt_fast.demos.retrieval.settings import DEPTHS, TGT_METHODS, Settings
from tgt_fast.errors import ArgumentError
from tgt_fast.losses.contrast import ContrastiveDistillationLoss
from tgt_fast.train.rng import isolated_rng


@dataclass(frozen=True)
class StudentResult:
    """One student on the test pairs. Recall in percent."""

    method: str
    seed: int
    labels: int  # pairs it was trained on
    further: int  # different further passages it could be shown
    recall: dict[int, float]  # by depth
    seconds: float  # of training, on one core, without the making of synthetic passages
    curve: tuple[tuple[int, float], ...]  # (step, recall within 20)


def new_student(vocabulary: int, settings: Settings) -> Tower:
    s = settings
    return Tower(vocabulary, s.length, s.width, s.heads, s.vector, s.dropout)


def measured(student: Tower, pairs: Labelled) -> dict[int, float]:
    """The student's recall by depth, in percent."""
    return recalls(student.embed(pairs.queries.ids), student.embed(pairs.passages.ids), DEPTHS)


def train_student(
    method: str,
    labelled: Labelled,
    further: Vectors | None,
    test: Labelled,
    vocabulary: int,
    settings: Settings,
    seed: int,
) -> StudentResult:
    """Train on ``labelled`` and, where the method has any, on further passages; measure on ``test``.

    The test recalls along the way are for the learning curve alone: the student that is measured is that of the last
    step, whatever they say.

    Args:
        further: [M] other passages; of synthetic ones, M / N in a row are made of each labelled passage.
        seed: of the student's weights and the order of the texts.

    Raises:
        ArgumentError: further passages for a method that has none, or none for one that has.
    """
    if (further is None) != (method in ("one-hot", "distillation")):
        raise ArgumentError(f"{method} {'needs' if further is None else 'takes no'} further passages")
    s, own = settings, settings.students[method]
    begun = time.perf_counter()
    with isolated_rng(seed):
        student = new_student(vocabulary, settings).train()
        optimizer = torch.optim.AdamW(student.parameters(), own.rate, weight_decay=1e-2, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(s.steps))
        loss_fn = ContrastiveDistillationLoss(
            own.temperature, teacher_temperature=own.teacher_temperature, soft_weight=own.soft_weight,
            hard_weight=own.hard_weight,
        )  # fmt: skip
        draw = torch.Generator().manual_seed(seed)
        curve = []
        for step in range(s.steps):
            queries, passages = batch_of(method, labelled, further, s.texts, draw)
            both = queries.and_then(passages)
            vectors = student(both.ids)
            partners, ids = as_pairs(len(queries), len(both))
            optimizer.zero_grad()
            loss = loss_fn(vectors, vectors, both.teacher, both.teacher, positives=partners, passage_ids=ids)
            torch.autograd.backward(loss)  # type: ignore[arg-type]
            optimizer.step()
            schedule.step()
            if (step + 1) % max(1, s.steps // s.evaluations) == 0:
                curve.append((step + 1, measured(student, test)[20]))
    seconds = time.perf_counter() - begun
    return StudentResult(
        method, seed, len(labelled), 0 if further is None else len(further), measured(student, test), seconds,
        tuple(curve),
    )  # fmt: skip


def as_pairs(queries: int, texts: int) -> tuple[Tensor, Tensor]:
    """(partner, id) of each text of a batch, for a loss in which each asks for all others.

    A query's partner is its passage and the other way round, those of the further passages are each other. Partners
    have one id. What has the id of a text's partner without being it is the text itself: it is no answer.

    >>> [rows.tolist() for rows in as_pairs(2, 6)]
    [[2, 3, 0, 1, 5, 4], [0, 1, 0, 1, 4, 4]]
    """
    place = torch.arange(texts)
    further = place - 2 * queries
    partner = torch.where(place < queries, place + queries, place - queries)
    partner = torch.where(further >= 0, place + 1 - 2 * (further % 2), partner)
    return partner, torch.minimum(place, partner)


def batch_of(
    method: str, labelled: Labelled, further: Vectors | None, texts: int, draw: torch.Generator
) -> tuple[Vectors, Vectors]:
    """(queries, passages) of a step, ``texts`` in all. Passage i is query i's; the further ones are nobody's own.

    Half of the texts are further passages, two a pair: of teacher-guided training those made of the batch's passages,
    of uniform negatives any.
    """
    count = min(len(labelled), texts // 2 if further is None else texts // 4)
    rows = torch.randperm(len(labelled), generator=draw)[:count]
    pairs = labelled.take(rows)
    if further is None:
        return pairs.queries, pairs.passages
    if method in TGT_METHODS:
        each = len(further) // len(labelled)
        chosen = torch.rand(count, each, generator=draw).argsort(1)[:, :2]
        others = (rows[:, None] * each + chosen).flatten()
    else:
        others = torch.randperm(len(further), generator=draw)[: 2 * min(count, len(further) // 2)]
    return pairs.queries, pairs.passages.and_then(further.take(others))
