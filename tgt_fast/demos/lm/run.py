"""The demo from end to end: text, teacher, students."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tgt_fast._threads import cores
from tgt_fast.demos.lm import memory
from tgt_fast.demos.lm.corpus import Corpus, load_corpus
from tgt_fast.demos.lm.data import Text, make_text
from tgt_fast.demos.lm.results import DemoResult, TextFacts
from tgt_fast.demos.lm.settings import METHODS, Settings
from tgt_fast.demos.lm.students import StudentResult, train_student
from tgt_fast.demos.lm.teachers import TeacherResult, train_teacher
from tgt_fast.demos.progress import Progress
from tgt_fast.demos.results import checked_seeds, in_order
from tgt_fast.demos.workers import Crew, crew

# The longest first, so that no core waits at the end for one that began late.
_TAUGHT = ("distillation-records", "distillation", "distillation-plenty", "distillation-cached")
_UNTAUGHT = tuple(method for method in METHODS if method not in _TAUGHT)


class _Run:
    def __init__(self, workers: Crew, text: Text, settings: Settings, seeds: Sequence[int], progress: Progress) -> None:
        self.crew, self.text, self.settings, self.seeds, self.progress = workers, text, settings, seeds, progress
        self.teacher: TeacherResult | None = None
        self.students: list[StudentResult] = []
        self.peaks: dict[str, int] | None = None
        self.totals = {"text": 1, "teacher": 1, "students": len(METHODS) * len(seeds)}

    def start(self) -> None:
        """The teacher, and meanwhile on the other cores what needs none."""
        for phase in self.totals:
            self.progress(phase, int(phase == "text"), self.totals[phase])
        self.crew.submit(train_teacher, self.text, self.text.test, self.settings, then=self._taught)
        self._train(_UNTAUGHT)
        self.crew.submit(memory.peaks, then=self._measured)

    def _train(self, methods: Sequence[str]) -> None:
        for method in methods:
            for seed in self.seeds:
                self.crew.submit(
                    train_student, method, self.teacher, self.text, self.text.test, self.settings, seed,
                    then=self._student,
                )  # fmt: skip

    def _taught(self, teacher: TeacherResult) -> None:
        self.teacher = teacher
        self.progress("teacher", 1, 1)
        self._train(_TAUGHT)

    def _student(self, student: StudentResult) -> None:
        self.students.append(student)
        self.progress("students", len(self.students), self.totals["students"])

    def _measured(self, peaks: dict[str, int] | None) -> None:
        self.peaks = peaks


def run_demo(
    seeds: Sequence[int] = (0, 1, 2),
    settings: Settings | None = None,
    *,
    corpus: Corpus | None = None,
    workers: int | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> DemoResult:
    """Train the teacher, then a student by every method and seed.

    Args:
        seeds: of the students, their text and its order; teacher and test text are always the same.
        settings: hyper-parameters; by default those chosen on the validation text.
        corpus: by default the running Python's library.
        workers: processes; by default one a core, at most 8; 0: none but this one. Bits per byte do not depend on it.
        progress: called as ``progress(phase, done, total)``.

    Raises:
        ArgumentError: no seeds, or one twice; no text.
    """
    seeds = checked_seeds(seeds)
    settings = Settings() if settings is None else settings
    started = time.perf_counter()
    corpus = load_corpus() if corpus is None else corpus
    text = make_text(corpus, settings)
    with crew(min(cores(), 8) if workers is None else workers) as team:
        run = _Run(team, text, settings, seeds, progress)
        run.start()
        team.finish()
    assert run.teacher is not None
    return DemoResult(
        settings=settings,
        seeds=seeds,
        text=TextFacts(
            train_modules=len(corpus.train),
            test_modules=len(corpus.test),
            train_windows=len(text.train),
            test_windows=len(text.test),
            bytes_per_token=text.bytes_of[text.test.y].double().mean().item(),
        ),
        teacher=run.teacher,
        students=in_order(run.students, METHODS, seeds),
        memory=run.peaks,
        seconds=time.perf_counter() - started,
    )
