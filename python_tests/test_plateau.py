"""When an objective explores: from a step on, and while validation stalls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from training_kit import Numbered, assert_same_weights, make_run, score

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError


def run_of(kind: str = "replay-random", **options: Any) -> dict[str, Any]:
    run = make_run(kind, loader=DataLoader(Numbered(), batch_size=5))
    objective = run["objective"]
    run["objective"] = tgt.TGTObjective(objective.teacher, objective.sampler, **options)
    return run


def calls(run: dict[str, Any]) -> int:
    return int(run["objective"].sampler.statistics()["calls"])


@pytest.mark.parametrize("counted", [False, True])
def test_the_third_term_begins_at_its_step(counted: bool) -> None:
    run = run_of(start_after=3)
    for step in range(5):
        ids, x, y = next(iter(run["loader"]))
        given: dict[str, Any] = {} if counted else {"step": step}
        parts = run["objective"](run["student"], x, y, sample_ids=ids, **given)["parts"]
        assert (parts["synthetic"] > 0) == (step >= 3)
        assert calls(run) == max(0, step - 2)
    if not counted:
        run["objective"](run["student"], x, y, sample_ids=ids, step=torch.tensor(2))
        assert calls(run) == 2
        with pytest.raises(ArgumentError, match="start_after"):
            run_of(start_after=-1)


def test_what_is_explored_ahead_begins_at_its_step_too() -> None:
    runs = [run_of("random", start_after=3) for _ in range(2)]
    for prefetch, run in enumerate(runs):
        tgt.fit(**run, steps=7, prefetch=2 * prefetch, accumulate=2)
    assert_same_weights(*(run["student"] for run in runs))
    everywhere = run_of("random")
    tgt.fit(**everywhere, steps=7, accumulate=2)
    assert not torch.equal(everywhere["student"][0].weight, runs[0]["student"][0].weight)


def test_exploration_waits_until_validation_stalls() -> None:
    run, judged = run_of(), iter([0.1, 0.2, 0.2, 0.1, 0.3, 0.1, 0.2, 0.2])
    explored: list[bool] = []

    def note(event: str, view: Any) -> None:
        if event == "step":
            explored.append(bool(view.losses["synthetic"] > 0))

    options = {"evaluate": lambda student: {"accuracy": next(judged)}, "eval_every": 2, "explore_on_plateau": 2}
    tgt.fit(**run, steps=16, callbacks=[note], **options)
    # Stalled after the fourth evaluation, better at the fifth, stalled again after the seventh.
    assert [explored[at : at + 2] for at in range(0, 16, 2)] == [[at in (4, 7)] * 2 for at in range(8)]
    assert calls(run) == 4
    assert not run["objective"].waiting


def test_a_resumed_run_waits_alike(tmp_path: Path) -> None:
    def judge(student: nn.Module) -> dict[str, float]:
        return {"accuracy": round(score(student)["accuracy"], 1)}

    options: dict[str, Any] = {"evaluate": judge, "eval_every": 1, "explore_on_plateau": 1}
    whole, broken = run_of(), run_of()
    tgt.fit(**whole, steps=12, **options)
    assert 0 < calls(whole) < 12
    for steps in (5, 9, 12):
        broken = run_of()
        tgt.fit(**broken, steps=steps, checkpoint_dir=tmp_path, resume=True, **options)
    assert_same_weights(whole["student"], broken["student"])
    assert calls(whole) == calls(broken)


def test_what_cannot_wait_is_refused() -> None:
    for options, match in (
        ({"explore_on_plateau": 0, "evaluate": score}, "explore_on_plateau must be"),
        ({"explore_on_plateau": 2}, "needs evaluate"),
    ):
        with pytest.raises(ArgumentError, match=match):
            tgt.fit(**run_of(), steps=1, **options)
    with pytest.raises(ArgumentError, match="with a sampler"):
        tgt.fit(**make_run(None), steps=1, explore_on_plateau=2, evaluate=score)
