"""The choice of the settings: ``python -m tgt_fast.demos.retrieval.tune [GROUP ...] [--seeds N,...] [--json FILE]``.

Judged by the mean recall within 20 on the validation pairs; the test pairs are used for nothing. The seeds are other
ones than the demo's. Each group varies something about the settings that stand in ``settings.py``; each method's
student may choose among as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial

from tgt_fast.demos.artifacts import Artifacts, cache_folder
from tgt_fast.demos.corpus import Corpus
from tgt_fast.demos.retrieval.run import run_demo
from tgt_fast.demos.retrieval.settings import METHODS, Settings, StudentSettings
from tgt_fast.demos.tuning import Found, Options, Trial, each, ranked, tune_command

_STUDENT = [
    options | {"teacher_temperature": options["temperature"]}
    for options in each(rate=(2e-3, 5e-3, 1e-2, 2e-2), temperature=(0.05, 0.1, 0.2))
]
GROUPS: dict[str, tuple[str, list[Options]]] = {
    **{method: (method, _STUDENT) for method in METHODS},
    "noise": ("tgt-random", each(sigma=(0.5, 1.0, 1.5, 2.0), draw_temperature=(0.8, 1.0))),
    "variants": ("tgt-random", each(variants=(4, 8, 16))),
}


def settings_of(base: Settings, method: str, options: Options) -> Settings:
    """``base`` with options of the method's student, or of the demo."""
    own = {field.name for field in fields(StudentSettings)}
    student = replace(base.students[method], **{name: value for name, value in options.items() if name in own})
    rest = {name: value for name, value in options.items() if name not in own}
    return replace(base, students={**base.students, method: student}, **rest)


def tune(
    groups: Sequence[str],
    seeds: Sequence[int],
    workers: int,
    base: Settings | None = None,
    corpus: Corpus | None = None,
    artifacts: Artifacts | None = None,
) -> Found:
    """For each group its choices with their recalls on the validation pairs, the best first."""
    base = base or Settings()
    found: dict[str, list[Trial]] = {}
    for group in groups:
        method, choices = GROUPS[group]
        found[group] = [Trial(method, options, settings_of(base, method, options)) for options in choices]
        for trial in found[group]:
            result = run_demo(
                seeds, trial.settings, methods=(method,), corpus=corpus, artifacts=artifacts, workers=workers,
                test="validation",
            )  # fmt: skip
            trial.reached = dict(zip(seeds, result.recalls(method, 20), strict=True))
    return ranked(found, "recall")


def main() -> None:
    tune_command(
        "choose the retrieval demo's settings on its validation pairs", list(GROUPS), "100,101",
        partial(tune, artifacts=Artifacts(cache_folder())), "{recall:.1f}  {method:18s}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
