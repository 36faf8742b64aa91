"""fit(autocast=, ema=, callbacks=)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_kit import adam, assert_same_weights, make_data, make_run, make_student, make_teacher, score

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, CheckpointError


def test_callbacks_hear_what_happens_in_order(tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []
    seen: dict[str, Any] = {}

    def hear(event: str, run: Any) -> None:
        torch.rand(3)
        heard.append((event, run.steps))
        seen["run"] = run
        seen[event] = run.epoch, run.lr, run.best_score, len(run.history)

    run = make_run()
    options = {"steps": 5, "evaluate": score, "eval_every": 2, "checkpoint_every": 3}
    result = tgt.fit(**run, **options, checkpoint_dir=tmp_path / "heard", callbacks=[hear, lambda event, view: None])
    steps = [(event, step) for step in range(1, 6) for event in ("step", "record", "checkpoint")]
    left_out = {("record", 1), ("record", 3), ("checkpoint", 1), ("checkpoint", 2), ("checkpoint", 4)}
    assert heard == [("start", 0), *(one for one in steps if one not in left_out), ("end", 5)]
    view = seen["run"]
    assert (view.total_steps, view.rank, view.world_size, view.student) == (5, 0, 1, run["student"])
    assert seen["end"][2:] == (result.best_score, len(result.history))
    with pytest.raises(AttributeError, match="a callback reads the run; steps cannot be set"):
        view.steps = 3
    with pytest.raises(TypeError):
        view.history[0]["loss"] = 0.0
    unheard = make_run()
    assert tgt.fit(**unheard, **options).history == result.history  # whatever they draw
    assert_same_weights(unheard["student"], run["student"])
    without = make_run()
    events: list[str] = []
    tgt.fit(**without, steps=1, callbacks=[lambda event, view: events.append(event)])
    assert events == ["start", "step", "record", "end"]  # no folder, no checkpoint


def test_an_error_of_a_callback_ends_the_run() -> None:
    def stop(event: str, run: Any) -> None:
        if run.steps == 2:
            raise KeyError("enough")

    run, taken = make_run(), []
    with pytest.raises(KeyError, match="enough"):
        tgt.fit(**run, steps=5, callbacks=[lambda event, view: taken.append(view.steps), stop])
    assert max(taken) == 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"callbacks": print}, "callbacks must be a list of functions"),
        ({"callbacks": [3]}, "callbacks must be a list of functions"),
        ({"ema": 1.0}, r"ema must be in \(0, 1\), got 1.0"),
        ({"ema": "0.9"}, r"ema must be in \(0, 1\)"),
        ({"autocast": torch.float16}, "bfloat16 or None, got torch.float16; float16 needs gradients that are scaled"),
        ({"autocast": True}, "autocast must be torch.bfloat16 or None, got True"),
    ],
)
def test_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        tgt.fit(**make_run(), steps=1, **options)


DECAY = 0.9


def test_averaged_weights_are_evaluated_and_saved(tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    evaluated: list[dict[str, torch.Tensor]] = []
    run = make_run()
    student = run["student"]

    def average(event: str, view: Any) -> None:
        for name, weight in view.student.named_parameters():
            if event == "start":
                expected[name] = weight.detach().clone()
            elif event == "step":
                expected[name] = DECAY * expected[name] + (1 - DECAY) * weight.detach()

    def evaluate(model: nn.Module) -> dict[str, float]:
        evaluated.append({name: value.clone() for name, value in model.state_dict().items()})
        return score(model)

    plain = make_run()
    tgt.fit(**plain, steps=6)
    result = tgt.fit(
        **run, steps=6, ema=DECAY, callbacks=[average], evaluate=evaluate, eval_every=6, checkpoint_dir=tmp_path / "run"
    )
    assert_same_weights(student, plain["student"])  # which is trained as ever
    assert result.ema is not None
    assert result.best is not None
    for name, value in expected.items():
        torch.testing.assert_close(evaluated[0][name], value)
        assert torch.equal(evaluated[0][name], result.ema[name])
        assert torch.equal(result.ema[name], result.best[name])
        assert not torch.equal(result.ema[name], student.state_dict()[name])
    assert torch.equal(result.ema["1.running_mean"], student.state_dict()["1.running_mean"])
    student.load_state_dict(result.ema)


def test_averages_go_on_after_a_resume(tmp_path: Path) -> None:
    def fit(folder: str, steps: int, **options: Any) -> Any:
        run = make_run()
        given = {"checkpoint_every": 2, "resume": True, "evaluate": score, "eval_every": 2, "ema": DECAY, **options}
        return tgt.fit(**run, steps=steps, checkpoint_dir=tmp_path / folder, **given), run["student"]

    whole, student = fit("whole", 6)
    fit("broken", 3)
    broken, other = fit("broken", 6)
    assert_same_weights(student, other)
    assert whole.history[:1] + whole.history[2:] == broken.history[:1] + broken.history[3:]
    for name, value in whole.ema.items():
        assert torch.equal(value, broken.ema[name])
    with pytest.raises(CheckpointError, match=r"the checkpoint has averaged weights .*, the run has none"):
        fit("broken", 7, ema=None)
    fit("without", 2, ema=None)
    with pytest.raises(CheckpointError, match=r"the run has averaged weights .*, the checkpoint has none"):
        fit("without", 3)


def test_low_precision_averages_move() -> None:
    teacher, student = make_teacher(), make_student(batch_norm=False, dropout=0.0).bfloat16()
    x, y = make_data(8)
    options = {"steps": 20, "optimizer": torch.optim.SGD(student.parameters(), lr=0.2), "progress": False}
    before = {name: value.clone() for name, value in student.state_dict().items()}

    def objective(model: nn.Module, x: Any, y: Any, **keywords: Any) -> Any:
        return {"loss": tgt.distillation_loss(model(x.bfloat16()), teacher.label(x), y, hard_weight=1.0)}

    result = tgt.fit(student, objective, [(x, y)], ema=0.999, **options)
    assert result.ema is not None
    assert any(not torch.equal(result.ema[name], value) for name, value in before.items())


def test_autocast() -> None:
    student = make_student(batch_norm=False, dropout=0.0)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    student.register_forward_hook(lambda module, inputs, made: seen.append((made.dtype, module[0].weight.dtype)))
    teacher = make_teacher()

    def evaluate(model: nn.Module) -> dict[str, float]:
        return tgt.train.evaluate(model, teacher, [make_data(4)])

    result = tgt.fit(
        student, tgt.TGTObjective(teacher), [make_data(8)], steps=2, optimizer=adam(student), progress=False,
        autocast=torch.bfloat16, evaluate=evaluate,
    )  # fmt: skip
    assert seen == [(torch.bfloat16, torch.float32)] * 2 + [(torch.float32, torch.float32)]
    assert torch.isfinite(torch.tensor(result.history[-1]["loss"]))
