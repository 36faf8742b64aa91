"""The choice of the settings: ``python -m tgt_fast.demos.lm.tune [GROUP ...] [--seeds N,...] [--json FILE]``.

Judged by the bits per byte of the validation text; the test text is used for nothing. The seeds are other ones than the
demo's. Each group varies something about the settings that stand in ``settings.py``. Distillation with text in plenty
takes over what was chosen for few windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tgt_fast.demos.lm.corpus import Corpus, load_corpus
from tgt_fast.demos.lm.data import Text, make_text
from tgt_fast.demos.lm.settings import METHODS, Settings
from tgt_fast.demos.lm.students import StudentResult, train_student
from tgt_fast.demos.lm.teachers import TeacherResult, train_teacher
from tgt_fast.demos.tuning import Found, Options, Trial, each, ranked, tune_command
from tgt_fast.demos.workers import Crew, crew

GROUPS: dict[str, tuple[str, list[Options]]] = {
    "teacher": ("teacher", each(teacher_rate=(1.5e-3, 3e-3))),
    "one-hot": ("one-hot", each(one_hot_rate=(3e-3, 1e-2, 2e-2), one_hot_steps=(150, 220))),
    "one-hot-plenty": ("one-hot-plenty", each(one_hot_rate=(5e-3, 1e-2, 2e-2))),
    "distillation": ("distillation", each(rate=(5e-3, 1e-2, 2e-2))),
    "records": (
        "distillation-cached",
        each(k=(64, 256), tail=("bucket", "uniform"), record_hard_weight=(0.0, 0.3, 1.0)),
    ),
    "labels": ("distillation", each(temperature=(1.0, 2.0), hard_weight=(0.0, 0.5))),
}


def trials(group: str, base: Settings) -> list[Trial]:
    """The trials of a group."""
    if group == "methods":
        return [Trial(method, {}, base) for method in METHODS]
    method, choices = GROUPS[group]
    return [Trial(method, options, replace(base, **options)) for options in choices]


def tune(
    groups: Sequence[str],
    seeds: Sequence[int],
    workers: int,
    base: Settings | None = None,
    corpus: Corpus | None = None,
) -> Found:
    """For each group its trials with their bits per byte of validation text, the best first."""
    base = base or Settings()
    text = make_text(load_corpus() if corpus is None else corpus, base)
    found = {group: trials(group, base) for group in groups}
    every = [trial for some in found.values() for trial in some]
    with crew(workers) as team:
        for trial in every:
            if trial.method == "teacher":
                team.submit(
                    train_teacher, text, text.validation, trial.settings, then=partial(_teacher_reached, trial)
                )  # fmt: skip
        students = [trial for trial in every if trial.method != "teacher"]
        if students:
            then = partial(_taught, team, text, students, seeds)
            team.submit(train_teacher, text, text.validation, base, then=then)
        team.finish()
    return ranked(found, "bits_per_byte", lowest=True)


def _teacher_reached(trial: Trial, teacher: TeacherResult) -> None:
    trial.reached[0] = teacher.bits_per_byte


def _taught(team: Crew, text: Text, students: Sequence[Trial], seeds: Sequence[int], teacher: TeacherResult) -> None:
    for trial in students:
        for seed in seeds:
            team.submit(
                train_student, trial.method, teacher, text, text.validation, trial.settings, seed,
                then=partial(_student_reached, trial),
            )  # fmt: skip


def _student_reached(trial: Trial, student: StudentResult) -> None:
    trial.reached[student.seed] = student.bits_per_byte


def main() -> None:
    description = "choose the lm demo's settings on its validation text"
    tune_command(description, [*GROUPS, "methods"], "101", tune, "{bits_per_byte:.4f}  {method:24s}")


if __name__ == "__main__":
    main()
