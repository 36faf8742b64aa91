"""The demo from end to end: pictures, teachers, students, diagnostics."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tgt_fast._threads import cores
from tgt_fast.demos.digits.data import Images, long_tailed
from tgt_fast.demos.digits.methods import StudentResult
from tgt_fast.demos.glyphs import diagnostics, teachers
from tgt_fast.demos.glyphs.data import Split, class_counts, load_glyphs
from tgt_fast.demos.glyphs.diagnostics import Diagnostics
from tgt_fast.demos.glyphs.methods import train_student
from tgt_fast.demos.glyphs.results import DemoResult, Pictures
from tgt_fast.demos.glyphs.settings import BASELINES, BEST_TGT, METHODS, TGT_METHODS, Settings
from tgt_fast.demos.glyphs.teachers import TeacherQuality, TeacherWeights
from tgt_fast.demos.networks import Weights
from tgt_fast.demos.progress import Progress
from tgt_fast.demos.results import checked_seeds, in_order
from tgt_fast.demos.workers import Crew, crew
from tgt_fast.teacher import Teacher
from tgt_fast.train import class_thirds

ALL = 1e6  # times the labels of the main experiment: as many of each class as the pool has of every class
CURVE = {  # times the labels of the main experiment
    "one-hot": (0.25, 4.0, 16.0, ALL),
    "distillation": (0.25, 4.0, 16.0, ALL),
    "distillation-augmented": (0.25, 4.0, 16.0, ALL),
    BEST_TGT: (0.25, 4.0),
}
# The longest first, so that no core waits at the end for one that began late.
_BY_LENGTH = (*sorted(TGT_METHODS, key=lambda method: "gradient" not in method), *reversed(BASELINES))


@dataclass
class _Seed:
    """Results of a seed so far."""

    vae: tuple[Weights, Weights] | None = None
    labeler: Weights | None = None
    teacher: TeacherWeights | None = None
    theirs: Tensor | None = None  # the labeler's logits of the test images


class _Run:
    def __init__(self, workers: Crew, split: Split, settings: Settings, curve: bool, progress: Progress) -> None:
        self.crew, self.settings, self.with_curve, self.progress = workers, settings, curve, progress
        self.pool, self.test = split.pool.images, split.test.images
        self.fewest = int(self.pool.y.bincount().min())
        self.seeds: dict[int, _Seed] = {}
        self.students: list[StudentResult] = []
        self.curve: list[StudentResult] = []
        self.diagnostics: list[Diagnostics] = []
        self.qualities: list[TeacherQuality] = []
        self.done: dict[str, int] = {}
        self.totals: dict[str, int] = {}

    def start(self, seeds: Sequence[int]) -> None:
        self.totals = {"teachers": 2 * len(seeds), "students": len(METHODS) * len(seeds), "diagnostics": len(seeds)}
        if self.with_curve:
            self.totals["label curve"] = sum(map(len, CURVE.values())) * len(seeds)
        for phase in self.totals:
            self._step(phase, 0)
        for seed in seeds:
            self.seeds[seed] = _Seed()
            todo = (self.pool, self.settings, seed)
            self.crew.submit(teachers.train_vae, *todo, then=partial(self._vae, seed))
            self.crew.submit(teachers.train_labeler, *todo, then=partial(self._labeler, seed))

    def _step(self, phase: str, steps: int = 1) -> None:
        self.done[phase] = self.done.get(phase, 0) + steps
        self.progress(phase, self.done[phase], self.totals[phase])

    def _vae(self, seed: int, made: tuple[Weights, Weights]) -> None:
        self.seeds[seed].vae = made
        self._taught(seed)

    def _labeler(self, seed: int, made: Weights) -> None:
        self.seeds[seed].labeler = made
        self._taught(seed)

    def _taught(self, seed: int) -> None:
        """Once both halves of its teacher are trained, it is asked about the test images."""
        self._step("teachers")
        state = self.seeds[seed]
        if state.vae is None or state.labeler is None:
            return
        state.teacher = TeacherWeights(*state.vae, state.labeler)
        self.crew.submit(quality_task, state.teacher, self.test, self.settings, seed, then=self._asked)

    def _asked(self, found: tuple[TeacherQuality, Tensor]) -> None:
        """Then a seed's students can be trained."""
        quality, theirs = found
        self.qualities.append(quality)
        self.seeds[quality.seed].theirs = theirs
        for method in _BY_LENGTH:
            self._train(method, class_counts(), quality.seed, self._student)
        if self.with_curve:
            for method, factors in reversed(CURVE.items()):
                for factor in factors:
                    self._train(method, class_counts(factor, self.fewest), quality.seed, self._curve_student)

    def _train(self, method: str, counts: list[int], seed: int, then: Callable[[StudentResult], None]) -> None:
        images, state = long_tailed(self.pool, counts, seed), self.seeds[seed]
        self.crew.submit(
            student_task, method, state.teacher, images, self.test, state.theirs, counts, self.settings, seed, then=then
        )

    def _student(self, student: StudentResult) -> None:
        self.students.append(student)
        self._step("students")
        if student.method == "distillation":
            images = long_tailed(self.pool, class_counts(), student.seed)
            teacher = self.seeds[student.seed].teacher
            self.crew.submit(
                diagnose_task, teacher, images, self.test, student.weights, self.settings, student.seed,
                then=self._diagnosed,
            )  # fmt: skip

    def _diagnosed(self, found: Diagnostics) -> None:
        self.diagnostics.append(found)
        self._step("diagnostics")

    def _curve_student(self, student: StudentResult) -> None:
        self.curve.append(student)
        self._step("label curve")


@torch.no_grad()
def quality_task(
    weights: TeacherWeights, images: Images, settings: Settings, seed: int
) -> tuple[TeacherQuality, Tensor]:
    """A teacher on images of families it has not seen, and its labeler's logits of them."""
    teacher: Teacher = weights.build(settings)
    parts = torch.split(images.x, 512)
    theirs = torch.cat([teacher.label(part) for part in parts])
    squares = sum(float((teacher.decode(teacher.encode(part)) - part).square().sum()) for part in parts)
    right = (theirs.argmax(1) == images.y).float()
    rare = torch.isin(images.y, class_thirds(class_counts())[2])
    shares = (100 * float(right.mean()), 100 * float(right[rare].mean()))
    return TeacherQuality(seed, *shares, (squares / images.x.numel()) ** 0.5), theirs


def student_task(
    method: str,
    teacher: TeacherWeights,
    images: Images,
    test: Images,
    theirs: Tensor,
    counts: list[int],
    settings: Settings,
    seed: int,
) -> StudentResult:
    """``train_student`` in a worker process."""
    return train_student(method, teacher.build(settings), images, test, theirs, counts, settings, seed)


def diagnose_task(
    teacher: TeacherWeights, images: Images, test: Images, student: Weights, settings: Settings, seed: int
) -> Diagnostics:
    """``diagnose`` in a worker process."""
    return diagnostics.diagnose(teacher.build(settings), images, test, student, settings, seed)


def run_demo(
    seeds: Sequence[int] = (0, 1, 2),
    settings: Settings | None = None,
    *,
    curve: bool = False,
    workers: int | None = None,
    progress: Progress = lambda phase, done, total: None,
    split: Split | None = None,
) -> DemoResult:
    """Run every method on every seed.

    Args:
        seeds: of the teachers, the students and the choice of labelled examples; the families are always the same.
        settings: hyper-parameters; by default those chosen on families of the pool.
        curve: also train on fewer and on more labelled examples.
        workers: processes; by default one a core, at most 8; 0: none but this one. The numbers do not depend on it.
        progress: called as ``progress(phase, done, total)``.
        split: the pictures; by default those of the installed font packages.

    Raises:
        ArgumentError: no seeds, or one twice; too few font packages.
    """
    seeds = checked_seeds(seeds)
    settings = Settings() if settings is None else settings
    started, spent = time.perf_counter(), _processor_seconds()
    split = load_glyphs() if split is None else split
    with crew(min(cores(), 8) if workers is None else workers) as team:
        run = _Run(team, split, settings, curve, progress)
        run.start(seeds)
        team.finish()
    order = {seed: place for place, seed in enumerate(seeds)}
    pool, test = split.pool, split.test
    return DemoResult(
        settings=settings,
        seeds=seeds,
        pictures=Pictures(
            len(pool.names) + len(test.names) + len(split.left_out), split.left_out, len(pool.names), len(test.names),
            len(pool.images), len(test.images),
        ),
        counts=tuple(class_counts()),
        teachers=tuple(sorted(run.qualities, key=lambda teacher: order[teacher.seed])),
        students=in_order(run.students, METHODS, seeds),
        diagnostics=tuple(sorted(run.diagnostics, key=lambda found: order[found.seed])),
        curve=tuple(sorted(run.curve, key=lambda s: (s.method, s.labels, order[s.seed]))),
        seconds=time.perf_counter() - started,
        processor_seconds=_processor_seconds() - spent,
    )  # fmt: skip


def _processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])
