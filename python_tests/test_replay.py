"""SyntheticReplay: what a call explores and serves, the pool behind it, and a run that goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from process_kit import all_made, in_processes
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, CheckpointError, ShapeError
from tgt_fast.explore.pool import FIELDS, RowPool

B = 16


def made_by(mode: str = "random", teacher: Any = None, **options: Any) -> tgt.LatentSampler:
    chosen = {"sigma": 0.5, "units": "absolute", "seed": 5} | options
    return tgt.LatentSampler(toys.vector_teacher(prior=(toys.LATENT,)) if teacher is None else teacher, mode, **chosen)


def batch(step: Any, count: int = B) -> tuple[Tensor, Tensor]:
    number = int(step) % 5
    return torch.arange(count) + count * number, toys.normal(count, toys.FEATURES, seed=number)


def call(replay: Any, step: Any, count: int = B, **options: Any) -> tgt.Synthetic:
    ids, x = batch(step, count)
    return replay(x, sample_ids=ids, step=step, **options)


def rows_of(made: tgt.Synthetic) -> list[tuple[float, ...]]:
    return [tuple(row) for row in made.x.tolist()]


class Counting(nn.Module):
    """A decoder that counts the rows it decodes."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder, self.rows = decoder, 0

    def forward(self, z: Tensor) -> Tensor:
        self.rows += len(z)
        made: Tensor = self.decoder(z)
        return made


@pytest.mark.parametrize("mode", ["prior", "random", "gradient"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_call_serves_the_fresh_rows_and_earlier_ones_none_twice(mode: str, replicas: int) -> None:
    plain = toys.vector_teacher()
    counting = Counting(plain.decoder)
    teacher = tgt.Teacher(plain.encoder, counting, plain.labeler, prior=(toys.LATENT,))
    replay = tgt.SyntheticReplay(made_by(mode, teacher, replicas=replicas), reuse=4, capacity=64)
    student, met = toys.student(), set()
    for step in range(12):
        served = call(replay, step, student=student)
        fresh, rows = B // 4 * replicas, rows_of(served)
        assert len(rows) == B * replicas == len(served.ids) == len(served.latents.z)
        assert met.isdisjoint(rows[:fresh])
        met |= set(rows[:fresh])
        assert met >= set(rows)
        if step >= 4:
            assert len(set(rows)) == len(rows)
        else:  # too few to choose from: in turn, equally often
            counts = [rows.count(row) for row in set(rows[fresh:])]
            assert max(counts) - min(counts) <= 1 + (step == 0)
        torch.testing.assert_close(teacher.decode(served.latents), served.x)
        torch.testing.assert_close(teacher.label(served.x), served.teacher_logits)
        assert not served.x.requires_grad
        assert served.source == mode
    shown = replay.statistics(student)
    assert (shown["explored"], shown["served"]) == (12 * B // 4 * replicas, 12 * B * replicas)
    assert shown["mean_uses"] == 4
    assert shown["held"] == min(64, shown["explored"])
    assert abs(sum(shown["share_by_class"]) - 1) < 1e-6
    assert 0 < shown["mean_age"] < 12
    assert shown["fresh_disagreement"] > 0 < shown["replayed_disagreement"]
    if mode != "gradient":
        counting.rows = 0
        call(replay, 12, student=student)
        assert counting.rows == B // 4 * replicas


def test_reuse_of_one_is_the_sampler_itself() -> None:
    replay, sampler = tgt.SyntheticReplay(made_by(), reuse=1), made_by()
    for step in range(3):
        served, made = call(replay, step), call(sampler, step)
        assert all(torch.equal(getattr(served, name), getattr(made, name)) for name in ("x", "ids", "teacher_logits"))
    assert torch.equal(replay(batch(3)[1]).x, sampler(batch(3)[1]).x)  # ids and steps that are counted, too
    known = sampler.teacher.encode(batch(4)[1])
    one, other = tgt.SyntheticReplay(made_by(), reuse=4), tgt.SyntheticReplay(made_by(), reuse=4)
    for _ in range(2):
        assert torch.equal(call(one, 4).x, call(other, 4, latents=known, occurrence=torch.zeros(B).long()).x)
    for name in ("latents", "occurrence"):
        with pytest.raises(ShapeError, match=name):
            call(other, 4, **{name: torch.zeros(3, 2).long()})


def test_every_example_has_its_turn_and_the_ring_drops_the_oldest() -> None:
    replay = tgt.SyntheticReplay(made_by(), reuse=4, capacity=12)
    seen: list[int] = []
    for step in range(8):
        ids, x = batch(0)
        served = replay(x, sample_ids=ids, step=step)
        seen += served.ids[:4].tolist()
        if step % 4 == 3:  # a round of a batch that stays the same
            assert sorted(seen[-B:]) == ids.tolist()
    assert seen[:B] != seen[B:]  # another order
    made = [call(made_by(), step, 4) for step in range(5)]
    pool = RowPool(6)
    for number, one in enumerate(made[:4]):
        pool.add(one, number, torch.device("cpu"), lambda parts: parts[0])
    held = pool.take(torch.arange(6), made[0])["x"]
    newest = torch.cat([one.x for one in made[:4]])[-6:]
    assert sorted(map(tuple, held.tolist())) == sorted(map(tuple, newest.tolist()))
    assert sorted(pool.marks["born"].tolist()) == [2, 2, 3, 3, 3, 3]


def test_the_draws_depend_on_seed_and_step_alone() -> None:
    def run(order: range | list[int], seed: int = 0) -> dict[int, list[tuple[float, ...]]]:
        replays = {rank: tgt.SyntheticReplay(made_by(rank=rank, world_size=3), reuse=4, seed=seed) for rank in order}
        found: dict[int, list[tuple[float, ...]]] = {rank: [] for rank in order}
        for step in range(6):
            for rank, replay in replays.items():
                torch.rand(rank + 1)
                found[rank] += rows_of(replay(batch(step)[1] + rank, step=step))
        return found

    before = torch.get_rng_state()
    run([0])
    torch.set_rng_state(before)
    forwards, backwards = run(range(3)), run([2, 1, 0])
    assert all(forwards[rank] == backwards[rank] for rank in range(3))
    assert run([0], seed=1)[0] != forwards[0]
    torch.set_rng_state(before)
    call(tgt.SyntheticReplay(made_by(), reuse=4), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_calls_of_one_step_draw_apart_and_a_step_may_be_a_tensor() -> None:
    by_int, by_tensor = (tgt.SyntheticReplay(made_by(), reuse=4) for _ in range(2))
    for step in range(8):
        call(by_int, step)
        call(by_tensor, torch.tensor(step))
    pairs = []
    for replay, step in ((by_int, 8), (by_tensor, torch.tensor(8))):
        ids, x = batch(8)
        pairs.append([rows_of(replay(x, sample_ids=ids, step=step)) for _ in range(2)])
    assert pairs[0] == pairs[1]
    first, second = (set(rows[4:]) for rows in pairs[0])
    assert len(first & second) < 10  # 12 of some 35 rows each


@pytest.mark.parametrize("kind", ["plain", "short of candidates"])
def test_disagreement_takes_the_rows_of_largest_divergence(kind: str) -> None:
    candidates = 4 if kind == "plain" else 100  # the whole pool
    sampler = made_by(divergence="reverse_kl", temperature=2.0)
    replay = tgt.SyntheticReplay(sampler, reuse=4, select="disagreement", candidates=candidates)
    uniform = tgt.SyntheticReplay(made_by(), reuse=4)
    student = toys.student()
    torch.manual_seed(3)

    def divergence(made: tgt.Synthetic) -> Tensor:
        frozen = copy.deepcopy(student).eval()
        log_q, log_p = (frozen(made.x) / 2).log_softmax(-1), (made.teacher_logits / 2).log_softmax(-1)
        return 4 * (log_q.exp() * (log_q - log_p)).sum(-1)

    for step in range(20):
        before = toys.snapshot(student), torch.get_rng_state()
        served, other = call(replay, step, student=student), call(uniform, step)
        assert toys.same(before[0], toys.snapshot(student))
        assert torch.equal(before[1], torch.get_rng_state())
    rows = rows_of(served)
    assert len(set(rows)) == len(rows)
    taken = divergence(served)[4:]
    assert taken.mean() > divergence(other)[4:].mean()
    assert torch.equal(taken, taken.sort(descending=True).values)
    if candidates == 100:
        everything = replay._pool.take(torch.arange(76), served)  # all but this call's
        best = divergence(tgt.Synthetic(**everything, source="random")).sort(descending=True).values[:12]
        torch.testing.assert_close(taken, best)


@pytest.mark.parametrize("select", ["uniform", "disagreement"])
def test_rows_that_are_learned_retire(select: str) -> None:
    replay = tgt.SyntheticReplay(made_by(), reuse=4, select=select, retire=1e9)
    student = toys.student()
    served = [call(replay, step, student=student) for step in range(6)]
    for one in served[2:]:  # all that was looked at went: what is served again was made just now
        assert len(set(rows_of(one))) <= B
    assert replay.statistics()["held"] < 24
    kept = tgt.SyntheticReplay(made_by(), reuse=4, select=select, retire=0.0)
    for step in range(6):
        call(kept, step, student=student)
    assert kept.statistics()["held"] == 24
    gone = ~replay._pool.marks["alive"][:24]
    old = {tuple(row) for row in replay._pool.fields["x"][0][:24][gone].tolist()}
    assert old.isdisjoint(rows_of(call(replay, 6, student=student)))


def test_texts_of_different_lengths_are_padded_to_the_longest_in_the_pool() -> None:
    class Teacher(tgt.Teacher):
        def join(self, pieces: Any) -> Any:
            longest = max(piece["mask"].shape[1] for piece in pieces)
            pad = torch.nn.functional.pad
            return {
                "features": torch.cat([pad(p["features"], (0, 0, 0, longest - p["mask"].shape[1])) for p in pieces]),
                "mask": torch.cat([pad(p["mask"], (0, longest - p["mask"].shape[1])) for p in pieces]),
            }

    plain = toys.sequence_teacher()
    sampler = made_by(teacher=Teacher(plain.encoder, plain.decoder, plain.labeler))
    replay = tgt.SyntheticReplay(sampler, reuse=2)
    for step, lengths in enumerate([[2, 3, 2, 1], [5, 4, 5, 1], [1, 2, 1, 2], [6, 6, 6, 6]]):
        served = replay(toys.sequences(lengths, seed=step), sample_ids=torch.arange(4), step=step)
        longest = served.x["mask"].shape[1]
        assert served.x["features"].shape == (4, longest, toys.FEATURES)
        assert served.latents.z.shape[1] == longest
        torch.testing.assert_close(plain.label(served.x), served.teacher_logits)
        assert torch.equal(served.latents.mask, served.x["mask"])  # type: ignore[arg-type]
    assert longest == 6

    class Positions(nn.Module):
        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return x["features"]

    replay = tgt.SyntheticReplay(made_by(teacher=Teacher(plain.encoder, plain.decoder, Positions())), reuse=2)
    replay(toys.sequences([3, 3]))
    with pytest.raises(ShapeError, match="position each"):
        replay(toys.sequences([5, 5]))


def test_a_state_goes_on_with_the_same_bits() -> None:
    student = toys.student()

    def new() -> tgt.SyntheticReplay:
        return tgt.SyntheticReplay(made_by(), reuse=4, capacity=24, select="disagreement", retire=0.05)

    replay, other = new(), new()
    for step in range(14):
        call(replay, step, student=student)
        if step % 4 == 0:  # before the ring is full, and after
            states = [new(), new()]
            for one in states:
                one.load_state_dict(copy.deepcopy(replay.state_dict()))
            made = [call(one, step + 1, student=student) for one in states]
            assert torch.equal(made[0].x, made[1].x)
    other.load_state_dict(replay.state_dict())
    for step in range(14, 18):
        a, b = (call(one, step, student=student) for one in (replay, other))
        for name in ("x", "ids", "teacher_logits", "anchor_ids"):
            assert torch.equal(getattr(a, name), getattr(b, name))
    assert replay.statistics(student) == other.statistics(student)
    saved = replay.state_dict()
    for broken in (
        {},
        saved | {"version": 2},
        saved | {"ranks": []},
        saved | {"ranks": [{}]},
        replay.sampler.state_dict(),
    ):
        with pytest.raises(CheckpointError):
            other.load_state_dict(broken)
    with pytest.raises(CheckpointError, match="capacity=24"):
        tgt.SyntheticReplay(made_by(), capacity=25).load_state_dict(saved)
    assert replay.statistics(student) == other.statistics(student)


def test_each_process_has_its_pool_and_one_state_holds_all(tmp_path: Path) -> None:
    def new(rank: int) -> tgt.SyntheticReplay:
        return tgt.SyntheticReplay(made_by(), reuse=4, capacity=8)

    def work(rank: int) -> Any:
        replay, others = new(rank), [new(rank), new(rank)]
        for step in range(3):
            call(replay, 2 * step + rank)
        whole = replay.state_dict(group="world")
        for one, state in zip(others, (whole, replay.state_dict()), strict=True):
            one.load_state_dict(state)
        return whole, [call(one, 7).x for one in (replay, *others)]

    found = all_made(in_processes(2, tmp_path, work))
    for whole, (first, *others) in found:
        assert toys.same(whole["ranks"], found[0][0]["ranks"])
        assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(found[0][1][0][4:], found[1][1][0][4:])  # of the pool
    alone = new(0)
    alone.load_state_dict(found[0][0])  # one process takes the first one's
    assert torch.equal(call(alone, 7).x, found[0][1][0])


def test_it_has_the_sampler_s_options_and_refuses_what_cannot_be() -> None:
    replay = tgt.SyntheticReplay(made_by("gradient", steps=2), reuse=4)
    replay.sigma = 0.25
    assert (replay.sampler.sigma, replay.mode, replay.options.steps) == (0.25, "gradient", 2)
    assert "SyntheticReplay(LatentSampler(mode='gradient'" in repr(replay)
    with pytest.raises(ArgumentError, match="persistent"):
        tgt.SyntheticReplay(made_by("persistent"))
    with pytest.raises(ArgumentError, match="LatentSampler, got SyntheticReplay"):
        tgt.SyntheticReplay(replay)  # type: ignore[arg-type]
    for wrong in (
        {"reuse": 0},
        {"capacity": 0},
        {"select": "all"},
        {"candidates": 0},
        {"retire": -1.0},
        {"device": 1.5},
    ):
        with pytest.raises(ArgumentError, match=f"SyntheticReplay: {next(iter(wrong))}"):
            tgt.SyntheticReplay(made_by(), **wrong)
    with pytest.raises(ArgumentError, match="capacity=2"):
        call(tgt.SyntheticReplay(made_by(), reuse=4, capacity=2), 0)
    choosy = tgt.SyntheticReplay(made_by(), select="disagreement")
    with pytest.raises(ArgumentError, match="student="):
        call(choosy, 0)
    with pytest.raises(ArgumentError, match="labeler"):
        call(choosy, 0, student=choosy.teacher.labeler)
    with pytest.raises(ShapeError, match="sample_ids"):
        replay(batch(0)[1], sample_ids=torch.arange(3), student=toys.student())


def test_the_objective_takes_it_for_a_sampler() -> None:
    replay = tgt.SyntheticReplay(made_by(), reuse=8, select="disagreement")
    objective = tgt.TGTObjective(replay.teacher, replay)
    student, batches = toys.student(), [(*batch(step), torch.arange(B) % 3) for step in range(3)]
    _, m = objective.normalizers(batches)
    assert m == 3 * B
    for step, (ids, x, y) in enumerate(batches):
        output = objective(student, x, y, sample_ids=ids, step=step)
        output["loss"].backward()
        assert output["parts"]["synthetic"] > 0
    assert set(FIELDS) < set(vars(call(replay, 3, student=student)))
