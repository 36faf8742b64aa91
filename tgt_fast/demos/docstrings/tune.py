"""The choice of the settings: ``python -m tgt_fast.demos.docstrings.tune [GROUP ...] [--seeds N,...] [--json FILE]``.

Judged by the mean accuracy on the validation texts; the test texts are used for nothing. The seeds are other ones than
the demo's. Each group varies something about the settings that stand in ``settings.py``; each method's student may
choose among as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tgt_fast.demos.artifacts import Artifacts, cache_folder
from tgt_fast.demos.corpus import Corpus, load_corpus
from tgt_fast.demos.docstrings import data
from tgt_fast.demos.docstrings.methods import Labelled, StudentResult, train_student
from tgt_fast.demos.docstrings.pool import Pool
from tgt_fast.demos.docstrings.run import Prepared, generator_task, labeler_task, pool_task, prepare
from tgt_fast.demos.docstrings.settings import METHODS, TGT_METHODS, Settings
from tgt_fast.demos.docstrings.teachers import TeacherWeights
from tgt_fast.demos.tuning import Found, Options, Trial, each, ranked, tune_command
from tgt_fast.demos.workers import Crew, crew

# Of a method's student, and of the exploration that TGT random begins with.
_STUDENT = each(rate=(2e-3, 4e-3, 8e-3), dropout=(0.1, 0.3)) + each(temperature=(1.0, 4.0))
GROUPS: dict[str, tuple[str, str, list[Options]]] = {
    **{method: (method, "student", _STUDENT) for method in METHODS},
    "noise": ("tgt-random", "exploration", each(sigma=(1.5, 2.5))),
    "anchors": ("tgt-random", "exploration", each(anchors=("batch", "balanced"))),
    "ascent": ("tgt-gradient", "exploration", each(step_size=(8.0, 16.0))),
}


def trials(group: str, base: Settings) -> list[Trial]:
    """The trials of a group."""
    method, what, choices = GROUPS[group]
    found = []
    for options in choices:
        if what == "student":
            students = {**base.students, method: replace(base.students[method], **options)}
            found.append(Trial(method, options, replace(base, students=students)))
        else:
            found.append(Trial(method, options, replace(base, **options)))
    return found


class _Tuning:
    def __init__(self, team: Crew, prepared: Prepared, every: Sequence[Trial], seeds: Sequence[int]) -> None:
        self.team, self.prepared, self.every, self.seeds = team, prepared, every, seeds
        self.made: dict[str, Any] = {}
        self.labelled: dict[int, Labelled] = {}

    def have(self, name: str, made: Any) -> None:
        """Once generator and labeler are there, everything else can begin."""
        self.made[name] = made
        if len(self.made) < 2:
            return
        head, train, _, _ = self.made["labeler"]
        base = self.every[0].settings
        self.teacher = TeacherWeights(self.prepared.vocabulary, self.made["generator"], head, base.classes)
        everything = Labelled(self.prepared.train, train)
        for seed in self.seeds:
            self.labelled[seed] = everything.take(data.long_tailed(self.prepared.train, self.prepared.counts, seed))
            waiting: dict[str, list[Trial]] = {}
            for trial in self.every:
                s = trial.settings
                if trial.method in TGT_METHODS:  # trials of the same exploration share its texts
                    explored = (s.sigma, s.anchors, s.draw_temperature, s.draw_top_p, s.variants)
                    waiting.setdefault(repr(explored), []).append(trial)
                else:
                    self._train(trial, seed, None)
            for some in waiting.values():
                task = (self.teacher, self.labelled[seed].texts, some[0].settings, seed)
                self.team.submit(pool_task, *task, then=partial(self._explored, some, seed))

    def _explored(self, some: Sequence[Trial], seed: int, made: tuple[Pool, float]) -> None:
        for trial in some:
            self._train(trial, seed, made[0])

    def _train(self, trial: Trial, seed: int, pool: Pool | None) -> None:
        validation = Labelled(self.prepared.validation, self.made["labeler"][3])
        self.team.submit(
            train_student, trial.method, self.labelled[seed], validation, self.prepared.counts, trial.settings, seed,
            self.teacher, pool, then=partial(_reached, trial),
        )  # fmt: skip


def _reached(trial: Trial, student: StudentResult) -> None:
    trial.reached[student.seed] = student.accuracy


def tune(
    groups: Sequence[str],
    seeds: Sequence[int],
    workers: int,
    base: Settings | None = None,
    corpus: Corpus | None = None,
    artifacts: Artifacts | None = None,
) -> Found:
    """For each group its trials with their accuracies on the validation texts, the best first."""
    base = base or Settings()
    artifacts = Artifacts(None) if artifacts is None else artifacts
    prepared = prepare(load_corpus(artifacts=artifacts) if corpus is None else corpus, base)
    found = {group: trials(group, base) for group in groups}
    with crew(workers) as team:
        tuning = _Tuning(team, prepared, [trial for some in found.values() for trial in some], seeds)
        for name, task in (("generator", generator_task), ("labeler", labeler_task)):
            team.submit(task, prepared, base, artifacts, then=partial(tuning.have, name))
        team.finish()
    return ranked(found, "accuracy")


def main() -> None:
    tune_command(
        "choose the docstrings demo's settings on its validation texts", list(GROUPS), "100,101",
        partial(tune, artifacts=Artifacts(cache_folder())), "{accuracy:.1f}  {method:14s}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
