"""The demo from end to end: texts, teacher, synthetic passages, students."""

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
from tgt_fast.demos.networks import Weights
from tgt_fast.demos.progress import Progress
from tgt_fast.demos.results import checked_seeds, in_order
from tgt_fast.demos.retrieval import data, teachers
from tgt_fast.demos.retrieval.data import Labelled, Pairs, Vectors
from tgt_fast.demos.retrieval.methods import StudentResult, train_student
from tgt_fast.demos.retrieval.models import recalls
from tgt_fast.demos.retrieval.results import DemoResult, Example, PairFacts
from tgt_fast.demos.retrieval.settings import BASELINES, DEPTHS, METHODS, TGT_METHODS, Settings
from tgt_fast.demos.retrieval.teachers import Written
from tgt_fast.demos.text.generator import train_generator
from tgt_fast.demos.text.sentences import sentence_encoder, sentence_tokenizer
from tgt_fast.demos.text.vocabulary import common_pieces, word_pieces
from tgt_fast.demos.workers import Crew, crew

TEACHER_SEED = 0  # one teacher for all seeds
UNIFORM_SEED = 1  # one choice of further real passages
EXAMPLES = 6


@dataclass(frozen=True)
class Prepared:
    """Texts and vocabulary."""

    vocabulary: list[str]
    unlabelled: list[str]  # what the generator learns from
    pairs: dict[str, Pairs]  # "train": those of all seeds, "test": the ones that students are measured on
    tokens: dict[str, Labelled]  # of the same, without what the teacher thinks
    rows: dict[int, Tensor]  # of a seed: its labelled pairs among "train"
    uniform: Tensor  # [U] the further real passages among "train"
    of_all: int  # pairs for training, chosen or not
    fingerprint: str


def prepare(corpus: Corpus, settings: Settings, seeds: Sequence[int], test: str = "test") -> Prepared:
    """Make pairs and vocabulary, choose the pairs that are needed, and turn their texts into tokens.

    Args:
        test: or "validation", the pairs that students are measured on.
    """
    s = settings
    splits = data.splits_of(corpus)
    unlabelled = data.unlabelled_texts(corpus)
    vocabulary = common_pieces(unlabelled, sentence_tokenizer(), s.vocabulary)
    tokenizer = word_pieces(vocabulary, s.length)
    rows = {seed: data.chosen_pairs(splits.train, s.labels, seed) for seed in seeds}
    uniform = data.chosen_pairs(splits.train, s.uniform, UNIFORM_SEED)
    needed = torch.unique(torch.cat([*rows.values(), uniform]))  # the teacher reads no other
    pairs = {"train": splits.train.take(needed), "test": getattr(splits, test)}
    place = torch.full((len(splits.train),), -1)
    place[needed] = torch.arange(len(needed))

    def tokens(texts: Sequence[str]) -> Vectors:
        return Vectors(data.token_rows(texts, tokenizer), torch.empty(len(texts), 0))

    return Prepared(
        vocabulary,
        unlabelled,
        pairs,
        {name: Labelled(tokens(p.queries), tokens(p.passages)) for name, p in pairs.items()},
        {seed: place[chosen] for seed, chosen in rows.items()},
        place[uniform],
        len(splits.train),
        corpus.fingerprint,
    )


def generator_task(
    unlabelled: list[str], vocabulary: list[str], fingerprint: str, settings: Settings, artifacts: Artifacts
) -> Weights:
    """The generator, from all texts for training."""
    s = settings.generator

    def trained() -> dict[str, Tensor]:
        rows = word_pieces(vocabulary, s.max_length)(
            unlabelled, add_special_tokens=False, truncation=True, max_length=s.max_length - 1
        )
        weights = train_generator([r for r in rows["input_ids"] if r], len(vocabulary), s, TEACHER_SEED)
        return {name: torch.from_numpy(value) for name, value in weights.items()}

    identity = ["retrieval", fingerprint, len(unlabelled), settings.vocabulary, asdict(s), TEACHER_SEED]
    return {name: value.numpy() for name, value in artifacts.tensors("generator", identity, trained).items()}


def embed_task(texts: tuple[str, ...], tokens: int, artifacts: Artifacts) -> Tensor:
    """Embeddings of texts by the teacher: [N, 384]."""
    made: Tensor = artifacts.tensors(
        "vectors", [tokens, texts], lambda: sentence_encoder().embed(texts, tokens).clone()
    )
    return made


def explore_task(vocabulary: list[str], generator: Weights, passages: Tensor, settings: Settings, seed: int) -> Written:
    """The synthetic passages of a seed."""
    return teachers.explore(teachers.build_teacher(vocabulary, generator, settings), passages, settings, seed)


class _Run:
    def __init__(
        self, workers: Crew, prepared: Prepared, settings: Settings, seeds: Sequence[int], methods: Sequence[str],
        artifacts: Artifacts, progress: Progress,
    ) -> None:  # fmt: skip
        self.crew, self.prepared, self.settings, self.seeds = workers, prepared, settings, seeds
        self.methods, self.artifacts, self.progress = methods, artifacts, progress
        self.writes = any(method in TGT_METHODS for method in methods)
        self.vectors: dict[tuple[str, str], Tensor] = {}
        self.written: dict[int, Written] = {}
        self.students: list[StudentResult] = []
        self.done: dict[str, int] = {}
        self.totals = {
            "generator": 1, "teacher": 4, "synthetic texts": len(seeds), "students": len(methods) * len(seeds),
        }  # fmt: skip
        if not self.writes:
            del self.totals["generator"], self.totals["synthetic texts"]

    def start(self) -> None:
        for phase in self.totals:
            self._step(phase, 0)
        p, s = self.prepared, self.settings
        if self.writes:
            self.crew.submit(
                generator_task, p.unlabelled, p.vocabulary, p.fingerprint, s, self.artifacts, then=self._generator
            )
        for name, pairs in p.pairs.items():
            for kind, most in (("queries", s.query_tokens), ("passages", s.passage_tokens)):
                self.crew.submit(
                    embed_task, getattr(pairs, kind), most, self.artifacts, then=partial(self._embedded, name, kind)
                )

    def _step(self, phase: str, steps: int = 1) -> None:
        self.done[phase] = self.done.get(phase, 0) + steps
        self.progress(phase, self.done[phase], self.totals[phase])

    def _generator(self, weights: Weights) -> None:
        self._step("generator")
        for seed in self.seeds:
            passages = self.prepared.tokens["train"].passages.ids[self.prepared.rows[seed]]
            self.crew.submit(
                explore_task, self.prepared.vocabulary, weights, passages, self.settings, seed,
                then=partial(self._explored, seed),
            )  # fmt: skip

    def _embedded(self, name: str, kind: str, vectors: Tensor) -> None:
        self.vectors[name, kind] = vectors
        self._step("teacher")
        if len(self.vectors) < self.totals["teacher"]:
            return
        for method in self.methods:
            for seed in self.seeds if method in BASELINES else ():  # they need no generator
                self._student(method, seed)
        for seed in self.written:
            self._with_synthetic(seed)

    def _explored(self, seed: int, written: Written) -> None:
        self.written[seed] = written
        self._step("synthetic texts")
        if len(self.vectors) == self.totals["teacher"]:
            self._with_synthetic(seed)

    def _with_synthetic(self, seed: int) -> None:
        for method in self.methods:
            if method in TGT_METHODS:
                self._student(method, seed)

    def labelled(self, name: str) -> Labelled:
        """Pairs with what the teacher thinks of them."""
        tokens = self.prepared.tokens[name]
        return Labelled(
            Vectors(tokens.queries.ids, self.vectors[name, "queries"]),
            Vectors(tokens.passages.ids, self.vectors[name, "passages"]),
        )

    def _student(self, method: str, seed: int) -> None:
        train = self.labelled("train")
        further = None
        if method in TGT_METHODS:
            further = self.written[seed].passages
        elif method == "uniform-negatives":
            further = train.passages.take(self.prepared.uniform)
        self.crew.submit(
            train_student, method, train.take(self.prepared.rows[seed]), further, self.labelled("test"),
            len(self.prepared.vocabulary), self.settings, seed, then=self._trained,
        )  # fmt: skip

    def _trained(self, student: StudentResult) -> None:
        self.students.append(student)
        self._step("students")

    def examples(self) -> tuple[Example, ...]:
        """Passages of the first seed, and what was made of them."""
        seed = self.seeds[0]
        if seed not in self.written:
            return ()
        rows, written = self.prepared.rows[seed], self.written[seed]
        count = min(EXAMPLES, len(rows))
        pairs = self.prepared.pairs["train"].take(rows[:count])
        real = self.vectors["train", "passages"][rows[:count]]
        asked = self.vectors["train", "queries"][rows[:count]]
        made = written.passages.teacher.reshape(len(rows), -1, real.shape[1])[:count, 0]
        return tuple(
            Example(
                pairs.queries[k], pairs.passages[k], written.texts[k], float(asked[k] @ real[k]),
                float(asked[k] @ made[k]),
            )
            for k in range(count)
        )  # fmt: skip


def run_demo(
    seeds: Sequence[int] = (0, 1, 2),
    settings: Settings | None = None,
    *,
    methods: Sequence[str] = METHODS,
    corpus: Corpus | None = None,
    artifacts: Artifacts | None = None,
    workers: int | None = None,
    progress: Progress = lambda phase, done, total: None,
    test: str = "test",
) -> DemoResult:
    """Run every method on every seed.

    Args:
        seeds: of the students and the choice of labelled pairs; teacher and test pairs are always the same.
        settings: hyper-parameters; by default those chosen on the validation pairs.
        methods: some of them; the report is about all.
        corpus: by default the documentation strings of the installed packages.
        artifacts: where corpus, generator and the teacher's vectors of an earlier run are looked for, and kept.
        workers: processes; by default one a core, at most 8; 0: none but this one. Recalls do not depend on it.
        progress: called as ``progress(phase, done, total)``.
        test: or "validation", the pairs that students are measured on.

    Raises:
        ArgumentError: no seeds, or one twice; packages with too few texts.
        DependencyError: transformers, or the package with the sentence encoder, is not installed.
    """
    seeds = checked_seeds(seeds)
    settings = Settings() if settings is None else settings
    artifacts = Artifacts(None) if artifacts is None else artifacts
    started = time.perf_counter()
    progress("texts", 0, 1)
    corpus = load_corpus(limit=settings.limit, artifacts=artifacts) if corpus is None else corpus
    prepared = prepare(corpus, settings, seeds, test)
    progress("texts", 1, 1)
    with crew(min(cores(), 8) if workers is None else workers) as team:
        run = _Run(team, prepared, settings, seeds, methods, artifacts, progress)
        run.start()
        team.finish()
    held = run.labelled("test")
    return DemoResult(
        settings=settings,
        seeds=seeds,
        pairs=PairFacts(len(prepared.unlabelled), prepared.of_all, len(prepared.rows[seeds[0]]), len(held)),
        teacher=recalls(held.queries.teacher, held.passages.teacher, DEPTHS),
        examples=run.examples(),
        writing_seconds=sum(w.seconds for w in run.written.values()) / len(seeds),
        students=in_order(run.students, METHODS, seeds),
        seconds=time.perf_counter() - started,
    )
