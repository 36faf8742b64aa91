"""The choice of the settings: ``python -m tgt_fast.demos.digits.tune [GROUP ...] [--json FILE]``.

Everything is trained on two thirds of the 900 images and judged by the mean accuracy on the last third; the 897 test
images are used for nothing. The seeds are other ones than the demo's. Each group varies something about the settings
that stand in ``settings.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tgt_fast.demos.digits import teachers
from tgt_fast.demos.digits.augment import Augmentation
from tgt_fast.demos.digits.data import class_counts, load_digits, long_tailed, validation_split
from tgt_fast.demos.digits.methods import StudentResult
from tgt_fast.demos.digits.run import student_task
from tgt_fast.demos.digits.settings import METHODS, Settings
from tgt_fast.demos.digits.teachers import TeacherWeights
from tgt_fast.demos.networks import Weights
from tgt_fast.demos.tuning import Found, Options, Trial, each, ranked, tune_command
from tgt_fast.demos.workers import Crew, crew


def trials(group: str, base: Settings) -> list[Trial]:
    """The trials of a group, ``base`` among them."""
    if group == "methods":
        return [Trial(method, {}, base) for method in METHODS]
    method, choices = GROUPS[group]
    return [Trial(method, options, replace(base, **options)) for options in choices]


def _augmentations() -> list[Augmentation]:
    """Every combination of shift or warp, mixup, and six strengths of noise, clipped or not: 77."""
    noises = [(0.0, False)] + [(noise, clip) for noise in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6) for clip in (False, True)]
    return [
        Augmentation(move == "shift", move == "warp", mixup, noise, clip)
        for move in ("", "shift", "warp")
        for mixup in (False, True)
        for noise, clip in noises
        if move or mixup or noise
    ]


_LABELERS = {"labeler_batchnorm": (True, False), "labeler_warp": (0.0, 0.8)}
_STRONG = (Augmentation(mixup=True, noise=0.2), Augmentation(mixup=True, noise=0.4), Augmentation(noise=0.4))

GROUPS: dict[str, tuple[str, list[Options]]] = {
    # Judged by the labeler's own accuracy.
    "labeler": ("labeler", each(**_LABELERS)),
    # How much the rival owes to the labeler: one that is calm on noisy images makes strong noise a good augmentation.
    "labeler-augmented": ("distillation-augmented", each(**_LABELERS, augmentation=_STRONG)),
    "labeler-gradient": ("tgt-gradient", each(**_LABELERS)),
    "vae": ("tgt-random", each(pixel_noise=(0.07, 0.1, 0.14, 0.2), vae_warp=(0.0, 0.3))),
    "one-hot": ("one-hot", each(one_hot_rate=(1e-3, 3e-3, 1e-2))),
    "distillation": ("distillation", each(distillation_temperature=(1.0, 2.0, 4.0, 8.0), rate=(3e-3, 1e-2))),
    "augmentation": ("distillation-augmented", each(augmentation=_augmentations())),
    "augmented": ("distillation-augmented", each(temperature=(2.0, 4.0, 8.0), rate=(3e-3, 1e-2))),
    "prior": ("tgt-prior", each(prior_sigma=(0.8, 1.0, 1.2))),
    "random": ("tgt-random", each(sigma=(0.5, 0.75, 1.0, 1.3), anchors=("batch", "balanced"))),
    "gradient": (
        "tgt-gradient",
        each(sigma=(0.75, 1.0, 1.3), step_size=(0.5, 1.0, 2.0), ascent_steps=(1, 2)),
    ),
    "student": ("tgt-gradient", each(temperature=(1.0, 2.0, 4.0), rate=(3e-3, 1e-2))),
    "persistent": (
        "tgt-persistent",
        each(persistent_step_size=(0.25, 0.5, 1.0, 2.0), restart_probability=(0.05, 0.1, 0.3)),
    ),
}

_OF_TEACHER = ("latents", "pixel_noise", "teacher_batch")


class _Tuning:
    def __init__(self, team: Crew, seeds: Sequence[int], chosen: Sequence[Trial]) -> None:
        self.crew = team
        self.fit, self.validation = validation_split(load_digits()[0])
        self.parts: dict[tuple[Settings, int], dict[str, Any]] = {}
        for trial in chosen:
            for seed in seeds:
                self._start(trial, seed)

    def _start(self, trial: Trial, seed: int) -> None:
        """Trials that differ in the student's settings alone share a teacher."""
        key = (_of_teacher(trial.settings), seed)
        if key in self.parts:
            self.parts[key]["waiting"].append(trial)
            return
        self.parts[key] = {"waiting": [trial]}

        def vae(made: tuple[Weights, Weights]) -> None:
            self.parts[key]["vae"] = made
            self._taught(key)

        def labeler(made: Weights) -> None:
            self.parts[key]["labeler"] = made
            self._taught(key)

        self.crew.submit(teachers.train_vae, self.fit, trial.settings, seed, then=vae)
        self.crew.submit(teachers.train_labeler, self.fit, trial.settings, seed, then=labeler)

    def _taught(self, key: tuple[Settings, int]) -> None:
        parts = self.parts[key]
        if "vae" not in parts or "labeler" not in parts:
            return
        encoder, decoder = parts["vae"]
        teacher, counts, seed = TeacherWeights(encoder, decoder, parts["labeler"]), class_counts(), key[1]
        images = long_tailed(self.fit, counts, seed)
        for trial in parts["waiting"]:
            if trial.method == "labeler":
                built = teacher.build(trial.settings)
                trial.reached[seed] = teachers.quality(built, self.validation, seed).labeler_accuracy
                continue
            self.crew.submit(
                student_task, trial.method, teacher, images, self.validation, counts, trial.settings, seed,
                then=partial(_judged, trial),
            )  # fmt: skip


def _judged(trial: Trial, student: StudentResult) -> None:
    trial.reached[student.seed] = student.accuracy


def _of_teacher(settings: Settings) -> Settings:
    """The settings with everything that does not concern the teacher at its default."""
    default = Settings()
    own = [name for name in vars(default) if name.startswith(("vae_", "labeler_")) or name in _OF_TEACHER]
    return replace(default, **{name: getattr(settings, name) for name in own})


def tune(groups: Sequence[str], seeds: Sequence[int], workers: int, base: Settings | None = None) -> Found:
    """For each group its trials with their validation accuracy in percent, the best first."""
    found = {group: trials(group, base or Settings()) for group in groups}
    with crew(workers) as team:
        _Tuning(team, seeds, [trial for some in found.values() for trial in some])
        team.finish()
    return ranked(found, "accuracy")


def main() -> None:
    description = "choose the digits demo's settings on its validation split"
    tune_command(description, [*GROUPS, "methods"], "100,101,102", tune, "{accuracy:6.2f}  {method:24s}")


if __name__ == "__main__":
    main()
