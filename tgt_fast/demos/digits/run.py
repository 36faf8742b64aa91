"""The demo from end to end: teachers, students, diagnostics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tgt_fast._threads import cores
from tgt_fast.demos.digits import diagnostics, teachers
from tgt_fast.demos.digits.cooking import train_recipe
from tgt_fast.demos.digits.data import Images, class_counts, load_digits, long_tailed
from tgt_fast.demos.digits.diagnostics import Diagnostics
from tgt_fast.demos.digits.methods import StudentResult, train_student
from tgt_fast.demos.digits.recipes import RECIPES
from tgt_fast.demos.digits.results import DemoResult
from tgt_fast.demos.digits.settings import BASELINES, METHODS, Settings
from tgt_fast.demos.digits.teachers import TeacherQuality, TeacherWeights
from tgt_fast.demos.networks import Weights
from tgt_fast.demos.progress import Progress
from tgt_fast.demos.results import checked_seeds, in_order
from tgt_fast.demos.workers import Crew, crew
from tgt_fast.errors import ArgumentError

CURVE_FACTORS = (0.25, 0.5, 2.0, 4.0, 8.0, 1000.0)  # times the labels of the main experiment; the last: all 900
CURVE_METHODS = ("one-hot", "distillation", "tgt-gradient")
# The longest first, so that no core waits at the end for one that began late.
_BY_LENGTH = ("tgt-gradient", "tgt-persistent", "tgt-random", "tgt-prior", *reversed(BASELINES))
_WATCHED = ("distillation", "tgt-random", "tgt-gradient")  # students whose disagreement is followed


@dataclass
class _Seed:
    """Results of a seed so far."""

    vae: tuple[Weights, Weights] | None = None
    labeler: Weights | None = None
    teacher: TeacherWeights | None = None
    watched: dict[str, Weights] = field(default_factory=dict)


class _Run:
    def __init__(
        self, workers: Crew, pool: Images, test: Images, settings: Settings, curve: bool, progress: Progress,
        recipes: Sequence[str],
    ) -> None:  # fmt: skip
        self.crew, self.pool, self.test, self.settings = workers, pool, test, settings
        self.with_curve, self.progress, self.recipes = curve, progress, recipes
        self.seeds: dict[int, _Seed] = {}
        self.students: list[StudentResult] = []
        self.curve: list[StudentResult] = []
        self.diagnostics: list[Diagnostics] = []
        self.qualities: list[TeacherQuality] = []
        self.done: dict[str, int] = {}
        self.totals: dict[str, int] = {}

    def start(self, seeds: Sequence[int]) -> None:
        self.totals = {
            "teachers": 2 * len(seeds),
            "students": (len(METHODS) + len(self.recipes)) * len(seeds),
            "diagnostics": len(seeds),
        }
        if self.with_curve:
            self.totals["label curve"] = len(CURVE_METHODS) * len(CURVE_FACTORS) * len(seeds)
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
        """Once both halves of its teacher are trained, a seed's students can be."""
        self._step("teachers")
        state = self.seeds[seed]
        if state.vae is None or state.labeler is None:
            return
        state.teacher = TeacherWeights(*state.vae, state.labeler)
        self.qualities.append(teachers.quality(state.teacher.build(self.settings), self.test, seed))
        counts = class_counts()
        for method in (*_BY_LENGTH, *self.recipes):
            self._train(method, counts, seed, self._student)
        if self.with_curve:
            for factor in CURVE_FACTORS[::-1]:
                for method in CURVE_METHODS:
                    self._train(method, class_counts(factor), seed, self._curve_student)

    def _train(self, method: str, counts: list[int], seed: int, then: Callable[[StudentResult], None]) -> None:
        images = long_tailed(self.pool, counts, seed)
        teacher = self.seeds[seed].teacher
        self.crew.submit(
            student_task, method, teacher, images, self.test, counts, self.settings, seed, then=then
        )  # fmt: skip

    def _student(self, student: StudentResult) -> None:
        self.students.append(student)
        self._step("students")
        state = self.seeds[student.seed]
        if student.method in _WATCHED:
            state.watched[student.method] = student.weights
            if len(state.watched) == len(_WATCHED):
                images = long_tailed(self.pool, class_counts(), student.seed)
                watched = {method: state.watched[method] for method in _WATCHED}
                self.crew.submit(
                    diagnose_task, state.teacher, images, self.test, watched, self.settings, student.seed,
                    then=self._diagnosed,
                )  # fmt: skip

    def _diagnosed(self, found: Diagnostics) -> None:
        self.diagnostics.append(found)
        self._step("diagnostics")

    def _curve_student(self, student: StudentResult) -> None:
        self.curve.append(student)
        self._step("label curve")


def student_task(
    method: str,
    teacher: TeacherWeights,
    images: Images,
    test: Images,
    counts: list[int],
    settings: Settings,
    seed: int,
) -> StudentResult:
    """``train_student``, or ``train_recipe``, in a worker process."""
    train = train_student if method in METHODS else train_recipe
    return train(method, teacher.build(settings), images, test, counts, settings, seed)


def diagnose_task(
    teacher: TeacherWeights,
    images: Images,
    test: Images,
    students: dict[str, Weights],
    settings: Settings,
    seed: int,
) -> Diagnostics:
    """``diagnose`` in a worker process."""
    return diagnostics.diagnose(teacher.build(settings), images, test, students, settings, seed)


def checked_recipes(names: Sequence[str]) -> tuple[str, ...]:
    """The recipes of these names, each once; "all": every one.

    Raises:
        ArgumentError: there is none of a name.
    """
    unknown = [name for name in names if name != "all" and name not in RECIPES]
    if unknown:
        raise ArgumentError(f"there is no recipe {unknown[0]!r}; there are {', '.join(RECIPES)}, and all")
    return tuple(RECIPES) if "all" in names else tuple(dict.fromkeys(names))


def run_demo(
    seeds: Sequence[int] = (0, 1, 2),
    settings: Settings | None = None,
    *,
    curve: bool = False,
    recipes: Sequence[str] = (),
    workers: int | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> DemoResult:
    """Run every method on every seed.

    Args:
        seeds: of the teachers, the students and the choice of labelled examples; the test images are always the same.
        settings: hyper-parameters; by default those chosen on the validation split.
        curve: also train on fewer and on more labelled examples.
        recipes: names in :data:`tgt_fast.demos.digits.recipes.RECIPES`, to train by, too.
        workers: processes; by default one a core, at most 8; 0: none but this one. The numbers do not depend on it.
        progress: called as ``progress(phase, done, total)``.

    Raises:
        ArgumentError: no seeds, or one twice; an unknown recipe.
    """
    seeds, recipes = checked_seeds(seeds), checked_recipes(recipes)
    settings = Settings() if settings is None else settings
    started = time.perf_counter()
    pool, test = load_digits()
    with crew(min(cores(), 8) if workers is None else workers) as team:
        run = _Run(team, pool, test, settings, curve, progress, recipes)
        run.start(seeds)
        team.finish()
    order = {seed: place for place, seed in enumerate(seeds)}
    return DemoResult(
        settings=settings,
        seeds=seeds,
        counts=tuple(class_counts()),
        teachers=tuple(sorted(run.qualities, key=lambda teacher: order[teacher.seed])),
        students=in_order(run.students, (*METHODS, *recipes), seeds),
        recipes=recipes,
        diagnostics=tuple(sorted(run.diagnostics, key=lambda found: order[found.seed])),
        curve=tuple(sorted(run.curve, key=lambda s: (s.method, s.labels, order[s.seed]))),
        seconds=time.perf_counter() - started,
    )
