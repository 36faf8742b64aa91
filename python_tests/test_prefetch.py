"""Exploration ahead of its turn: the same numbers, errors where they belong, and no thread that stays."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training_kit import FEATURES, LATENT, Augmented, Numbered, make_data, make_run, make_student, make_teacher

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError
from tgt_fast.explore import ahead

NAME = "tgt_fast: exploration ahead"


def threads() -> int:
    return sum(thread.name == NAME for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a core to spare; afterwards no thread of exploration is there."""
    monkeypatch.setattr(ahead, "pays", lambda device: True)
    yield
    assert threads() == 0


class Decoder(nn.Module):
    """Notes which threads it was run in; fails where an example says so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, LATENT * FEATURES).reshape(LATENT, FEATURES))
        self.threads: list[str] = []

    def forward(self, z: Tensor) -> Tensor:
        self.threads.append(threading.current_thread().name)
        if bool((z.abs() > 1e3).any()):
            raise ValueError("this example cannot be decoded")
        return z @ self.weight


def teacher_of(decoder: nn.Module) -> tgt.Teacher:
    made = make_teacher(prior="normal")
    return tgt.Teacher(made.encoder, decoder, made.labeler, prior="normal")


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    x, y = make_data(4 * count)
    return [(x[at : at + 4], y[at : at + 4]) for at in range(0, 4 * count, 4)]


def same(one: Any, two: Any) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(a, two[name]) if isinstance(a, Tensor) else a == two[name] for name, a in one.items()
    )


@pytest.mark.parametrize(
    "options", [{"units": "absolute"}, {"replicas": 2}, {"mode": "prior"}, {"anchors": "balanced"}]
)
def test_the_numbers_and_the_state_are_those_without(options: dict[str, Any]) -> None:
    """Also where the scale is measured in the first batch, and where the sampler is changed in the loop."""
    decoder = Decoder()
    pair = [tgt.LatentSampler(teacher_of(decoder), **{"mode": "random", "sigma": 0.5, **options}) for _ in range(2)]
    for sampler in pair if "anchors" in options else ():
        sampler.calibrate(batches())
    plain, sampler = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for at, ((x, _), synth) in enumerate(sampler.prefetch(batches(), depth=3)):
            expected = plain(x)
            for name in ("x", "teacher_logits", "ids"):
                assert torch.equal(getattr(synth, name), getattr(expected, name))
            assert torch.equal(synth.latents.z, expected.latents.z)
            assert same(sampler.state_dict(), plain.state_dict())
            if at == 3:
                plain.sigma = sampler.sigma = 0.25
    assert at == 5
    assert NAME in decoder.threads


def test_depth_0_and_a_busy_cpu_start_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder()
    sampler = tgt.LatentSampler(teacher_of(decoder), sigma=0.5, units="absolute")
    assert len(list(sampler.prefetch(batches(), depth=0))) == 6
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert len(list(sampler.prefetch(batches()))) == 6
    assert set(decoder.threads) == {"MainThread"}


def read_into(seen: list[Any], pairs: Iterator[Any], fail_at: int = -1) -> None:
    for at, pair in enumerate(pairs):
        seen.append(pair)
        if at == fail_at:
            raise KeyboardInterrupt


def test_an_error_is_raised_in_the_turn_of_its_batch() -> None:
    decoder = Decoder()
    sampler = tgt.LatentSampler(teacher_of(decoder), sigma=0.5, units="absolute")
    wrong = [x for x, _ in batches()]
    wrong[3] = wrong[3] * 1e6
    seen: list[Any] = []
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_into(seen, sampler.prefetch(wrong))
    assert len(seen) == 3
    assert sampler.state_dict()["step"] == 3

    def broken() -> Iterator[Any]:
        yield from wrong[:3]
        raise OSError("the disk is gone")

    seen.clear()
    with pytest.raises(OSError, match="disk is gone"):
        read_into(seen, sampler.prefetch(broken(), depth=5))
    assert len(seen) == 3


def test_a_loop_that_is_left_leaves_no_thread() -> None:
    sampler = tgt.LatentSampler(teacher_of(Decoder()), sigma=0.5, units="absolute")
    for at, _ in enumerate(sampler.prefetch(batches(12))):
        if at == 4:
            assert threads() == 1
            break
    assert threads() == 0
    assert sampler.state_dict()["step"] == 5
    with pytest.raises(KeyboardInterrupt):
        read_into([], sampler.prefetch(batches(12)), 4)
    assert threads() == 0
    never = sampler.prefetch(batches())
    next(never)
    del never


@pytest.mark.parametrize("mode", ["gradient", "persistent"])
def test_modes_that_need_the_student_are_refused(mode: str) -> None:
    teacher = make_teacher()
    sampler = tgt.LatentSampler(teacher, mode=mode, sigma=0.5, units="absolute")
    with pytest.raises(ArgumentError, match=f'"{mode}".*random and prior'):
        sampler.prefetch(batches())
    run = make_run(mode)
    with pytest.raises(ArgumentError, match=f'fit: mode="{mode}"'):
        tgt.fit(**run, steps=1, prefetch=2)
    with pytest.raises(ArgumentError, match="with a sampler"):
        tgt.fit(**make_run(None), steps=1, prefetch=2)
    for depth in (-1, 1.5, True):
        with pytest.raises(ArgumentError, match="depth must be"):
            tgt.LatentSampler(teacher).prefetch(batches(), depth=depth)  # type: ignore[arg-type]


def weights(**changes: Any) -> tuple[dict[str, Tensor], Any]:
    run = make_run("random", loader=changes.pop("loader", None))
    steps, student = changes.pop("steps", 11), run["student"]
    result = tgt.fit(**{**run, **changes}, steps=steps)
    return student.state_dict(), result


LOADERS: dict[str, Any] = {
    "shuffled": lambda: DataLoader(Numbered(), batch_size=5, shuffle=True),
    "augmented": lambda: DataLoader(Augmented(), batch_size=5, shuffle=True),
    "replacement": lambda: DataLoader(
        Numbered(),
        batch_size=4,
        sampler=torch.utils.data.RandomSampler(
            Numbered(), replacement=True, num_samples=24, generator=torch.Generator().manual_seed(1)
        ),
    ),
    "no ids": lambda: [(x, y) for x, y in batches()],
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loader", list(LOADERS))
def test_fit_gives_the_bits_of_a_run_without(loader: str, accumulate: int, tmp_path: Path) -> None:
    """Over epochs, evaluations that draw, accumulation; and a run that is resumed with it."""

    def evaluate(student: nn.Module) -> dict[str, float]:
        return {"accuracy": float(torch.rand(()))}

    options: dict[str, Any] = {"evaluate": evaluate, "eval_every": 4, "accumulate": accumulate, "checkpoint_every": 5}
    expected, found = weights(loader=LOADERS[loader](), **options)
    options["prefetch"] = 2
    ahead, result = weights(loader=LOADERS[loader](), **options)
    assert same(expected, ahead)
    assert found.history == result.history
    weights(loader=LOADERS[loader](), steps=7, checkpoint_dir=tmp_path, **options)
    assert same(expected, weights(loader=LOADERS[loader](), resume=True, checkpoint_dir=tmp_path, **options)[0])


def test_fit_explores_in_the_thread_and_with_a_cache(tmp_path: Path) -> None:
    found = []
    for depth in (0, 2):
        run = make_run(None, loader=DataLoader(Numbered(), batch_size=2))
        decoder = Decoder()
        teacher = teacher_of(decoder)
        sampler = tgt.LatentSampler(teacher, sigma=0.5, units="absolute")
        with tgt.TeacherCache(tmp_path / str(depth), teacher, k=None, latents=True, version="1") as cache:
            run["objective"] = tgt.TGTObjective(teacher, sampler, cache=cache)
            tgt.fit(**run, steps=14, prefetch=depth, autocast=torch.bfloat16)
        found.append(run["student"].state_dict())
        assert decoder.threads.count(NAME) == (14 if depth else 0)
    assert same(*found)


@pytest.mark.parametrize("options", [{}, {"select": "disagreement", "retire": 0.01}])
def test_a_replay_explores_ahead_too(options: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for depth in (0, 2):
        run = make_run(None, loader=DataLoader(Numbered(), batch_size=4))
        decoder = Decoder()
        teacher = teacher_of(decoder)
        replay = tgt.SyntheticReplay(tgt.LatentSampler(teacher, sigma=0.5, units="absolute"), reuse=2, **options)
        with tgt.TeacherCache(tmp_path / str(depth), teacher, k=None, latents=True, version="1") as cache:
            run["objective"] = tgt.TGTObjective(teacher, replay, cache=cache)
            tgt.fit(**run, steps=14, prefetch=depth)
        found.append({**run["student"].state_dict(), **replay.statistics()})
        assert decoder.threads.count(NAME) == (14 if depth else 0)
    assert same(*found)
    if options:
        with pytest.raises(ArgumentError, match="no place for"):
            replay.prefetch(batches())
        return
    pair = [tgt.SyntheticReplay(tgt.LatentSampler(teacher, sigma=0.5, units="absolute"), reuse=3) for _ in range(2)]
    for at, ((x, _), synth) in enumerate(pair[0].prefetch(batches(8))):
        expected = pair[1](x)
        assert torch.equal(synth.x, expected.x)
        if at == 4:
            pair[0].seed = pair[1].seed = 3


def test_errors_of_a_fit_come_with_their_step() -> None:
    broken = [x for x, _ in batches()]
    broken[4] = broken[4] * 1e6
    run = make_run(None, loader=broken)
    teacher = teacher_of(Decoder())
    run["objective"] = tgt.TGTObjective(teacher, tgt.LatentSampler(teacher, sigma=0.5, units="absolute"))
    taken = []
    with pytest.raises(ValueError, match="cannot be decoded"):
        tgt.fit(**run, steps=9, prefetch=3, callbacks=[lambda event, run: taken.append(event)])
    assert taken.count("step") == 4


def test_a_weight_of_0_leaves_the_sampler_alone() -> None:
    """A schedule that switches the synthetic term off and on, the sampler counting what it made alone."""
    found = []
    for depth in (0, 2):
        run = make_run("random", loader=[(x, y) for x, y in batches()])
        objective = run["objective"]

        def schedule(event: str, view: Any, objective: Any = objective) -> None:
            objective.synthetic_weight = float(view.steps % 3 > 0)

        tgt.fit(**run, steps=8, prefetch=depth, callbacks=[schedule])
        found.append({**run["student"].state_dict(), **objective.sampler.state_dict()})
    assert same(*found)


def test_a_student_in_a_plain_loop() -> None:
    teacher, student = make_teacher(), make_student(dropout=0.0)
    sampler = tgt.LatentSampler(teacher, sigma=0.5, units="absolute")
    objective = tgt.TGTObjective(teacher)
    for (x, y), synth in sampler.prefetch(batches()):
        objective(student, x, y, synthetic=synth)["loss"].backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
