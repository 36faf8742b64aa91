"""The choice of the settings: ``python -m tgt_fast.demos.glyphs.tune [GROUP ...] [--json FILE]``.

Everything is trained on two thirds of the pool's families and judged by the mean accuracy on the last third; the test
families are used for nothing. The seeds are other ones than the demo's. Each group varies something about the settings
that stand in ``settings.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tgt_fast.demos.digits.data import long_tailed
from tgt_fast.demos.digits.methods import StudentResult
from tgt_fast.demos.glyphs import teachers
from tgt_fast.demos.glyphs.augment import Augmentation
from tgt_fast.demos.glyphs.data import Split, class_counts, load_glyphs, validation_split
from tgt_fast.demos.glyphs.run import quality_task, student_task
from tgt_fast.demos.glyphs.settings import METHODS, Settings
from tgt_fast.demos.glyphs.teachers import TeacherWeights
from tgt_fast.demos.networks import Weights
from tgt_fast.demos.tuning import Found, Options, Trial, each, ranked, tune_command
from tgt_fast.demos.workers import Crew, crew


def trials(group: str, base: Settings) -> list[Trial]:
    """The trials of a group, ``base`` among them."""
    if group == "methods":
        return [Trial(method, {}, base) for method in METHODS]
    method, choices = GROUPS[group]
    return [Trial(method, options, replace(base, **options)) for options in choices]


def _sampling(method: str) -> list[tuple[str, ...]]:
    """The settings' balanced methods without this one and with it."""
    others = [one for one in Settings().balanced if one != method]
    return [tuple(one for one in METHODS if one in chosen) for chosen in (others, [*others, method])]


_RATES = (3e-3, 1e-2, 2e-2)
_WARPS = Augmentation(warp=1.0, elastic=0.1, weight=0.8)

# Some options of a method at a time, 12 tries at most, the others as they stand.
GROUPS: dict[str, tuple[str, list[Options]]] = {
    # Judged by the labeler's own accuracy.
    "labeler": (
        "labeler",
        each(labeler_augmentation=(Augmentation(), Augmentation(warp=0.5), Augmentation(warp=1.0, weight=0.5))),
    ),
    "vae": ("tgt-random", each(pixel_noise=(0.1, 0.2, 0.3), latents=(24,))),
    "one-hot": ("one-hot", each(one_hot_rate=(1e-3, 3e-3, 1e-2), balanced=_sampling("one-hot"))),
    "distillation": (
        "distillation",
        each(distillation_temperature=(4.0, 8.0, 16.0), rate=(1e-2, 2e-2), balanced=_sampling("distillation")),
    ),
    "mixup": (
        "distillation-mixup",
        each(
            mixup=(Augmentation(mixup=True), Augmentation(mixup=True, noise=0.2)),
            balanced=_sampling("distillation-mixup"),
        ),
    ),
    "mixed": ("distillation-mixup", each(mixup_temperature=(4.0, 8.0), rate=_RATES)),
    "augmentation": (
        "distillation-augmented",
        each(
            augmentation=(
                Augmentation(warp=1.0),
                Augmentation(warp=2.0),
                Augmentation(warp=1.0, mixup=True),
                Augmentation(warp=1.0, weight=0.8),
                _WARPS,
                replace(_WARPS, mixup=True),
            ),
            balanced=_sampling("distillation-augmented"),
        ),
    ),
    "augmented": ("distillation-augmented", each(augmented_temperature=(2.0, 4.0, 8.0), rate=(*_RATES, 3e-2))),
    "prior": ("tgt-prior", each(prior_sigma=(0.8, 1.0, 1.2), temperature=(2.0, 4.0, 8.0))),
    "random": ("tgt-random", each(sigma=(0.75, 1.0, 1.3), anchors=("batch", "balanced"))),
    "student": ("tgt-random", each(temperature=(2.0, 4.0, 8.0), rate=_RATES)),
    "gradient": ("tgt-gradient", each(sigma=(0.75, 1.0, 1.3), step_size=(0.5, 1.0, 2.0, 4.0))),
    "replay": ("tgt-random-replay", each(reuse=(2, 4, 8), candidates=(2, 4, 8))),
    "best": ("tgt-gradient-replay", each(temperature=(4.0, 8.0), rate=(1e-2, 2e-2, 3e-2))),
    "in-turn": (
        "tgt-gradient-augmented",
        each(temperature=(4.0, 8.0), sigma=(1.0, 1.3), augmentation=(_WARPS, Augmentation(warp=2.0, weight=0.8))),
    ),
}

_OF_TEACHER = ("latents", "pixel_noise", "teacher_batch")


class _Tuning:
    def __init__(self, team: Crew, seeds: Sequence[int], chosen: Sequence[Trial], split: Split) -> None:
        self.crew = team
        fit, validation = validation_split(split.pool)
        self.fit, self.validation = fit.images, validation.images
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

        def kept(name: str, made: Any) -> None:
            self.parts[key][name] = made
            self._taught(key)

        todo = (self.fit, trial.settings, seed)
        self.crew.submit(teachers.train_vae, *todo, then=partial(kept, "vae"))
        self.crew.submit(teachers.train_labeler, *todo, then=partial(kept, "labeler"))

    def _taught(self, key: tuple[Settings, int]) -> None:
        parts = self.parts[key]
        if "vae" not in parts or "labeler" not in parts:
            return
        vae: tuple[Weights, Weights] = parts["vae"]
        teacher = TeacherWeights(*vae, parts["labeler"])
        self.crew.submit(quality_task, teacher, self.validation, *key, then=partial(self._asked, key, teacher))

    def _asked(self, key: tuple[Settings, int], teacher: TeacherWeights, found: Any) -> None:
        quality, theirs = found
        counts, seed = class_counts(), key[1]
        images = long_tailed(self.fit, counts, seed)
        for trial in self.parts[key]["waiting"]:
            if trial.method == "labeler":
                trial.reached[seed] = quality.labeler_accuracy
                continue
            self.crew.submit(
                student_task, trial.method, teacher, images, self.validation, theirs, counts, trial.settings, seed,
                then=partial(_judged, trial),
            )  # fmt: skip


def _judged(trial: Trial, student: StudentResult) -> None:
    trial.reached[student.seed] = student.accuracy


def _of_teacher(settings: Settings) -> Settings:
    """The settings with everything that does not concern the teacher at its default."""
    default = Settings()
    own = [name for name in vars(default) if name.startswith(("vae_", "labeler_")) or name in _OF_TEACHER]
    return replace(default, **{name: getattr(settings, name) for name in own})


def tune(
    groups: Sequence[str], seeds: Sequence[int], workers: int, base: Settings | None = None, split: Split | None = None
) -> Found:
    """For each group its trials with their validation accuracy in percent, the best first."""
    found = {group: trials(group, base or Settings()) for group in groups}
    split = load_glyphs() if split is None else split
    with crew(workers) as team:
        _Tuning(team, seeds, [trial for some in found.values() for trial in some], split)
        team.finish()
    return ranked(found, "accuracy")


def main() -> None:
    description = "choose the glyphs demo's settings on its validation split"
    tune_command(description, [*GROUPS, "methods"], "100,101", tune, "{accuracy:6.2f}  {method:24s}")


if __name__ == "__main__":
    main()
