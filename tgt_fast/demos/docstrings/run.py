"""The demo from end to end: texts, teacher, synthetic texts, students."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from tgt_fast._threads import cores
from tgt_fast.demos.artifacts import Artifacts
from tgt_fast.demos.corpus import Corpus, load_corpus
from tgt_fast.demos.docstrings import data, teachers
from tgt_fast.demos.docstrings.data import Texts
from tgt_fast.demos.docstrings.methods import Labelled, StudentResult, train_student
from tgt_fast.demos.docstrings.pool import Pool, explore, make_sampler
from tgt_fast.demos.docstrings.results import DemoResult, PoolFacts, TextFacts
from tgt_fast.demos.docstrings.settings import BASELINES, METHODS, TGT_METHODS, Settings
from tgt_fast.demos.docstrings.teachers import TeacherWeights
from tgt_fast.demos.networks import Weights
from tgt_fast.demos.progress import Progress
from tgt_fast.demos.results import checked_seeds, in_order
from tgt_fast.demos.text.generator import train_generator
from tgt_fast.demos.text.sentences import sentence_encoder, sentence_tokenizer
from tgt_fast.demos.text.vocabulary import common_pieces, word_pieces
from tgt_fast.demos.workers import Crew, crew

TEACHER_SEED = 0  # one teacher for all seeds


@dataclass(frozen=True)
class Prepared:
    """Texts and vocabulary."""

    classes: tuple[str, ...]
    counts: list[int]  # labelled texts a class
    vocabulary: list[str]
    unlabelled: list[str]  # what the generator learns from
    train: Texts
    test: Texts
    validation: Texts
    fingerprint: str


def prepare(corpus: Corpus, settings: Settings) -> Prepared:
    """Choose the classes, make the vocabulary, and turn texts into tokens."""
    s = settings
    classes = data.choose_classes(corpus, s.classes)
    corpus = corpus if s.limit is None else corpus.capped(s.limit)
    unlabelled = [entry.text[: s.characters] for entry in corpus.train]
    vocabulary = common_pieces(unlabelled, sentence_tokenizer(), s.vocabulary)
    tokenizer = word_pieces(vocabulary, s.generator.max_length)
    train, test, validation = (
        data.texts_of(part, classes, tokenizer, s.characters) for part in (corpus.train, corpus.test, corpus.validation)
    )
    counts = data.class_counts(s.classes, s.labels, s.decay)
    held = [int((train.y == c).sum()) for c in range(s.classes)]
    return Prepared(
        tuple(classes), [min(pair) for pair in zip(counts, held, strict=True)], vocabulary, unlabelled, train,
        data.at_most(test, s.test_per_class), data.at_most(validation, s.test_per_class), corpus.fingerprint,
    )  # fmt: skip


def generator_task(prepared: Prepared, settings: Settings, artifacts: Artifacts) -> Weights:
    """The generator, from all training texts, whatever their class."""
    s = settings.generator

    def trained() -> dict[str, Tensor]:
        tokenizer = word_pieces(prepared.vocabulary, s.max_length)
        rows = tokenizer(prepared.unlabelled, add_special_tokens=False, truncation=True, max_length=s.max_length - 1)
        weights = train_generator(rows["input_ids"], len(prepared.vocabulary), s, TEACHER_SEED)
        return {name: torch.from_numpy(value) for name, value in weights.items()}

    identity = [prepared.fingerprint, settings.characters, settings.vocabulary, asdict(s), TEACHER_SEED]
    return {name: value.numpy() for name, value in artifacts.tensors("generator", identity, trained).items()}


def labeler_task(
    prepared: Prepared, settings: Settings, artifacts: Artifacts
) -> tuple[Weights, Tensor, Tensor, Tensor]:
    """The labeler's head, and its logits of the texts for training, for the test and for validation."""
    length = settings.generator.max_length
    parts = (prepared.train, prepared.test, prepared.validation)

    def embedded() -> list[Tensor]:
        return [sentence_encoder().embed(part.text, length).clone() for part in parts]

    identity = [prepared.fingerprint, prepared.classes, settings.characters, length, settings.test_per_class]
    seen = artifacts.tensors("embeddings", identity, embedded)
    head = teachers.train_head(seen[0], prepared.train.y, settings.classes, settings, TEACHER_SEED)
    train, test, validation = (teachers.head_logits(head, x, settings.classes, settings) for x in seen)
    return head, train, test, validation


def pool_task(teacher: TeacherWeights, texts: Texts, settings: Settings, seed: int) -> tuple[Pool, float]:
    """The synthetic texts of random exploration, and the seconds they took."""
    built = teacher.build(settings)
    begun = time.perf_counter()
    with torch.no_grad():
        sampler = make_sampler(built, texts, settings, seed)
        pool = explore(sampler, texts, range(settings.variants), settings)
    return pool, time.perf_counter() - begun


class _Run:
    def __init__(
        self, workers: Crew, prepared: Prepared, settings: Settings, seeds: Sequence[int], artifacts: Artifacts,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.crew, self.prepared, self.settings, self.seeds = workers, prepared, settings, seeds
        self.artifacts, self.progress = artifacts, progress
        self.generator: Weights | None = None
        self.head: Weights | None = None
        self.train: Labelled | None = None
        self.test: Labelled | None = None
        self.students: list[StudentResult] = []
        self.pools: dict[int, tuple[Pool, float]] = {}
        self.done: dict[str, int] = {}
        self.totals = {"teacher": 2, "synthetic texts": len(seeds), "students": len(METHODS) * len(seeds)}

    def start(self) -> None:
        for phase in self.totals:
            self._step(phase, 0)
        task = (self.prepared, self.settings, self.artifacts)
        self.crew.submit(generator_task, *task, then=self._generator)
        self.crew.submit(labeler_task, *task, then=self._labeler)

    def _step(self, phase: str, steps: int = 1) -> None:
        self.done[phase] = self.done.get(phase, 0) + steps
        self.progress(phase, self.done[phase], self.totals[phase])

    def _generator(self, weights: Weights) -> None:
        self.generator = weights
        self._taught()

    def _labeler(self, found: tuple[Weights, Tensor, Tensor, Tensor]) -> None:
        self.head = found[0]
        self.train, self.test = Labelled(self.prepared.train, found[1]), Labelled(self.prepared.test, found[2])
        for method in BASELINES:  # they need no generator
            for seed in self.seeds:
                self._student(method, seed)
        self._taught()

    @property
    def teacher(self) -> TeacherWeights:
        return TeacherWeights(self.prepared.vocabulary, self.generator or {}, self.head or {}, self.settings.classes)

    def _labelled(self, seed: int) -> Labelled:
        assert self.train is not None
        return self.train.take(data.long_tailed(self.prepared.train, self.prepared.counts, seed))

    def _taught(self) -> None:
        self._step("teacher")
        if self.generator is None or self.head is None:
            return
        for seed in self.seeds:
            task = (self.teacher, self._labelled(seed).texts, self.settings, seed)
            self.crew.submit(pool_task, *task, then=partial(self._explored, seed))

    def _explored(self, seed: int, made: tuple[Pool, float]) -> None:
        self.pools[seed] = made
        self._step("synthetic texts")
        for method in TGT_METHODS[::-1]:  # the longest first
            self._student(method, seed)

    def _student(self, method: str, seed: int) -> None:
        start = self.pools[seed][0] if method in TGT_METHODS else None
        self.crew.submit(
            train_student, method, self._labelled(seed), self.test, self.prepared.counts, self.settings, seed,
            self.teacher, start, then=self._trained,
        )  # fmt: skip

    def _trained(self, student: StudentResult) -> None:
        self.students.append(student)
        self._step("students")


def run_demo(
    seeds: Sequence[int] = (0, 1, 2),
    settings: Settings | None = None,
    *,
    corpus: Corpus | None = None,
    artifacts: Artifacts | None = None,
    workers: int | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> DemoResult:
    """Run every method on every seed.

    Args:
        seeds: of the students and the choice of labelled texts; teacher and test texts are always the same.
        settings: hyper-parameters; by default those chosen on the validation texts.
        corpus: by default the documentation strings of the installed packages.
        artifacts: where corpus, generator and labeler of an earlier run are looked for, and kept.
        workers: processes; by default one a core, at most 8; 0: none but this one. Accuracies do not depend on it.
        progress: called as ``progress(phase, done, total)``.

    Raises:
        ArgumentError: no seeds, or one twice; packages with too few texts.
        DependencyError: transformers, or the package with the sentence encoder, is not installed.
    """
    seeds = checked_seeds(seeds)
    settings = Settings() if settings is None else settings
    artifacts = Artifacts(None) if artifacts is None else artifacts
    started = time.perf_counter()
    progress("texts", 0, 1)
    prepared = prepare(load_corpus(artifacts=artifacts) if corpus is None else corpus, settings)
    progress("texts", 1, 1)
    with crew(min(cores(), 8) if workers is None else workers) as team:
        run = _Run(team, prepared, settings, seeds, artifacts, progress)
        run.start()
        team.finish()
    assert run.test is not None
    right = run.test.logits.argmax(1) == run.test.texts.y
    first = run.pools[seeds[0]][0]
    return DemoResult(
        settings=settings,
        seeds=seeds,
        texts=TextFacts(
            prepared.classes,
            tuple(prepared.counts),
            len(prepared.unlabelled),
            len(prepared.train),
            len(prepared.test),
            tuple(int((prepared.test.y == c).sum()) for c in range(settings.classes)),
        ),
        labeler_accuracy=100 * float(right.float().mean()),
        pool=PoolFacts(
            len(first),
            sum(seconds for _, seconds in run.pools.values()) / len(seeds),
            tuple(first.logits.softmax(1).sum(0).tolist()),
        ),
        students=in_order(run.students, METHODS, seeds),
        seconds=time.perf_counter() - started,
    )
