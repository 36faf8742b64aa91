"""Training the student, one method at a time. Every method shows it the same number of texts a step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tgt_fast.demos.digits.teachers import cosine
from tgt_fast.demos.docstrings.data import Texts
from tgt_fast.demos.docstrings.models import Student, as_input
from tgt_fast.demos.docstrings.pool import Pool, explore, make_sampler
from tgt_fast.demos.docstrings.settings import TGT_METHODS, Settings
from tgt_fast.demos.docstrings.teachers import TeacherWeights
from tgt_fast.demos.text.vocabulary import word_pieces
from tgt_fast.errors import ArgumentError
from tgt_fast.losses.distill import DistillationLoss
from tgt_fast.teacher.modes import eval_mode
from tgt_fast.train import agreement, class_accuracy, class_thirds, mean_kl
from tgt_fast.train.rng import isolated_rng

EXAMPLES = 5  # shown of each method


@dataclass(frozen=True)
class Labelled:
    """Texts and what the labeler thinks of them."""

    texts: Texts
    logits: Tensor  # [N, C] float32

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Tensor) -> Labelled:
        return Labelled(self.texts.take(rows), self.logits[rows])


@dataclass(frozen=True)
class Example:
    """A labelled text and what was made of it."""

    text: str
    label: int
    made: str
    opinion: int  # the labeler's of it
    confidence: float  # its probability


@dataclass(frozen=True)
class StudentResult:
    """One student on the test texts. Accuracies in percent."""

    method: str
    seed: int
    labels: int  # labelled texts it was trained on
    synthetic: int  # different synthetic texts it was shown
    accuracy: float
    head: float
    middle: float
    tail: float
    agreement: float
    mean_kl: float  # nats, at temperature 1
    seconds: float  # of training, on one core, without the making of synthetic texts
    exploring_seconds: float  # of making them
    ascent: tuple[float, float] | None  # mean disagreement of relaxed texts before and after a step of the gradient
    per_class: tuple[float, ...]
    curve: tuple[tuple[int, float], ...]  # (step, accuracy)
    examples: tuple[Example, ...]  # of synthetic texts


def new_student(vocabulary: int, classes: int, settings: Settings, dropout: float) -> Student:
    s = settings
    return Student(vocabulary, classes, s.width, s.heads, s.layers, dropout, s.generator.max_length)


class _Explorer:
    """The synthetic texts of a method: all at once, or anew for the student as it is by now."""

    def __init__(
        self, method: str, teacher: TeacherWeights, texts: Texts, start: Pool | None, student: Student,
        settings: Settings, seed: int,
    ) -> None:  # fmt: skip
        self.seconds = 0.0
        self.ascent: list[tuple[float, float]] = []
        self.texts, self.student, self.settings = texts, student, settings
        self.pool = start if method in TGT_METHODS else None
        if method in TGT_METHODS and start is None:
            raise ArgumentError(f"{method} begins with synthetic texts")
        self.sampler = None
        if method == "tgt-gradient":
            begun = time.perf_counter()
            self.sampler = make_sampler(
                teacher.build(settings, student), texts, settings, seed, mode="gradient", record_disagreement=True,
                temperature=settings.students[method].temperature,
            )  # fmt: skip
            self.seconds += time.perf_counter() - begun

    def refresh(self, step: int) -> None:
        """Before a step of training: texts from the gradient, at ``refreshes`` of the steps."""
        s = self.settings
        every = s.steps // (s.refreshes + 1)
        if self.sampler is None or self.pool is None or not every or step == 0 or step % every:
            return
        turn = step // every
        if turn > s.refreshes:
            return
        begun = time.perf_counter()
        # Numbers that no other turn, and no text of the random pool, has used: new noise.
        keys = [s.variants + (turn - 1) * s.gradient_variants + k for k in range(s.gradient_variants)]
        fresh = explore(self.sampler, self.texts, keys, s, self.student, self.ascent.append)
        self.pool = Pool.joined([self.pool, fresh])
        self.seconds += time.perf_counter() - begun


def train_student(
    method: str,
    labelled: Labelled,
    test: Labelled,
    counts: list[int],
    settings: Settings,
    seed: int,
    teacher: TeacherWeights,
    start: Pool | None = None,
) -> StudentResult:
    """Train on ``labelled`` and, by teacher-guided training, on synthetic texts; measure on ``test``.

    The test accuracies along the way are for the learning curve alone: the student that is measured is that of the last
    step, whatever they say.

    Args:
        counts: labelled texts a class.
        seed: of the student's weights and the order of the texts.
        start: the synthetic texts of random exploration, with which both methods of it begin.
    """
    s, own = settings, settings.students[method]
    begun = time.perf_counter()
    with isolated_rng(seed):
        student = new_student(len(teacher.vocabulary), len(counts), settings, own.dropout).train()
        explorer = _Explorer(method, teacher, labelled.texts, start, student, settings, seed)
        optimizer = torch.optim.AdamW(student.parameters(), own.rate, weight_decay=own.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(s.steps))
        loss_fn = DistillationLoss(temperature=own.temperature, hard_weight=own.hard_weight)
        draw = torch.Generator().manual_seed(seed)
        curve = []
        for step in range(s.steps):
            explorer.refresh(step)
            optimizer.zero_grad()
            torch.autograd.backward(_loss(method, student, labelled, explorer.pool, loss_fn, s.batch, draw))
            optimizer.step()
            schedule.step()
            if (step + 1) % max(1, s.steps // s.evaluations) == 0:
                curve.append((step + 1, _accuracy(student, test.texts)))
    seconds = time.perf_counter() - begun - explorer.seconds
    tokenizer = word_pieces(teacher.vocabulary, s.generator.max_length)
    return _measured(method, seed, student, labelled, test, counts, seconds, explorer, tuple(curve), tokenizer)


def _loss(
    method: str, student: Student, labelled: Labelled, pool: Pool | None, loss_fn: DistillationLoss, batch: int,
    draw: torch.Generator,
) -> Tensor:  # fmt: skip
    """Of one step: ``batch`` real texts, or half as many and as many synthetic ones."""
    texts = labelled.texts
    real = batch if pool is None else batch // 2
    rows = torch.randint(len(labelled), (real,), generator=draw)
    ids, y = texts.ids[rows], texts.y[rows]
    if pool is None:
        logits = student(as_input(ids))
        if method == "one-hot":
            return F.cross_entropy(logits, y)
        return cast(Tensor, loss_fn(logits, labelled.logits[rows], y))
    made = torch.randint(len(pool), (batch - real,), generator=draw)
    logits = student(as_input(torch.cat([ids, pool.ids[made]])))
    on_real = cast(Tensor, loss_fn(logits[:real], labelled.logits[rows], y))
    return on_real + cast(Tensor, loss_fn.soft(logits[real:], pool.logits[made]))


@torch.no_grad()
def logits_of(student: Student, texts: Texts) -> Tensor:
    """float32 [N, C], in eval mode."""
    with eval_mode(student):
        return torch.cat([student(as_input(ids)) for ids in torch.split(texts.ids, 256)])


def _accuracy(student: Student, texts: Texts) -> float:
    return 100 * float((logits_of(student, texts).argmax(1) == texts.y).float().mean())


def _measured(
    method: str, seed: int, student: Student, labelled: Labelled, test: Labelled, counts: list[int], seconds: float,
    explorer: _Explorer, curve: tuple[tuple[int, float], ...], tokenizer: Any,
) -> StudentResult:  # fmt: skip
    logits, y = logits_of(student, test.texts), test.texts.y
    right = logits.argmax(1) == y

    def share(classes: Tensor) -> float:
        return 100 * float(right[torch.isin(y, classes)].float().mean())

    head, middle, tail = class_thirds(counts)
    climbs = list(zip(*explorer.ascent, strict=True))
    return StudentResult(
        method=method,
        seed=seed,
        labels=len(labelled),
        synthetic=0 if explorer.pool is None else len(explorer.pool),
        accuracy=100 * float(right.float().mean()),
        head=share(head),
        middle=share(middle),
        tail=share(tail),
        agreement=100 * agreement(logits, test.logits),
        mean_kl=mean_kl(logits, test.logits),
        seconds=seconds,
        exploring_seconds=explorer.seconds,
        ascent=(sum(climbs[0]) / len(climbs[0]), sum(climbs[1]) / len(climbs[1])) if climbs else None,
        per_class=tuple(100 * value for value in class_accuracy(logits, y)),
        curve=curve,
        examples=_examples(labelled.texts, explorer.pool, tokenizer, len(counts)),
    )


def _examples(texts: Texts, pool: Pool | None, tokenizer: Any, classes: int) -> tuple[Example, ...]:
    """A labelled text of several classes, and the last synthetic text made of it."""
    if pool is None:
        return ()
    found = []
    for c in sorted({round(k * (classes - 1) / max(1, EXAMPLES - 1)) for k in range(EXAMPLES)}):
        places = ((texts.y[pool.anchors] == c).nonzero().flatten()).tolist()
        if not places:
            continue
        place = places[-1]
        row = int(pool.anchors[place])
        confidence, opinion = pool.logits[place].softmax(0).max(0)
        rows = [texts.ids[row].tolist(), pool.ids[place].tolist()]
        text, made = tokenizer.batch_decode(rows, skip_special_tokens=True)
        found.append(Example(text, c, made, int(opinion), float(confidence)))
    return tuple(found)
