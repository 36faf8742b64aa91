"""Noise belongs to a sample id: not to its place in a batch, its process, its padding, or a global generator."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tgt_fast.explore import LatentSampler
from tgt_fast.explore.synthetic import Synthetic

X = toys.normal(12, toys.FEATURES)
IDS = torch.tensor([7, 3, 11, 0, 5, 2, 40, 1 << 40, 9, 13, 21, 34])


def sampler_for(mode: str, **options: Any) -> LatentSampler:
    settings: dict[str, Any] = {"steps": 2, "step_noise": 0.3, "radius": 4.0, "seed": 11, **options}
    sampler = LatentSampler(toys.vector_teacher(prior="normal"), mode, **settings)
    return sampler.calibrate([toys.normal(64, toys.FEATURES, seed=9)])


def run(mode: str, rows: Tensor, **options: Any) -> Synthetic:
    sampler = sampler_for(mode, **options)
    return sampler(X[rows], student=toys.student(), sample_ids=IDS[rows], step=4)


MODES = pytest.mark.parametrize("mode", ["prior", "random", "gradient", "persistent"])


@MODES
@settings(max_examples=12)
@given(order=st.permutations(range(12)), cut=st.integers(0, 12))
def test_noise_is_the_same_in_any_order_and_split(mode: str, order: list[int], cut: int) -> None:
    whole = run(mode, torch.arange(12)).latents.z
    rows = torch.tensor(order)
    parts = [run(mode, part).latents.z for part in (rows[:cut], rows[cut:]) if len(part)]
    torch.testing.assert_close(torch.cat(parts), whole[rows], rtol=1e-4, atol=1e-5)


@MODES
def test_noise_differs_with_id_step_replica_and_seed(mode: str) -> None:
    rows = torch.zeros(4, dtype=torch.int64)  # one example, four ids: only the noise tells them apart
    drawn = []
    for seed, step in ((11, 4), (12, 4), (11, 5)):
        sampler = sampler_for(mode, replicas=2, seed=seed)
        made = sampler(X[rows], student=toys.student(), sample_ids=IDS[:4], step=step)
        drawn.append(made.latents.z)
    z = torch.cat(drawn)
    distance = torch.cdist(z, z) + torch.eye(len(z))
    assert distance.min() > 1e-3


@MODES
def test_two_samplers_in_one_process_equal_each_alone(mode: str) -> None:
    def trajectory(seed: int) -> Any:
        sampler, student = sampler_for(mode, seed=seed), toys.student(seed)
        optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
        student.eval()
        for _ in range(4):
            made = sampler(X, student=student, sample_ids=IDS)
            loss = (student(made.x) - made.teacher_logits).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield made.latents.z.detach().clone()

    alone = [list(trajectory(seed)) for seed in (1, 2)]
    together = list(zip(trajectory(1), trajectory(2), strict=True))
    for step, (first, second) in enumerate(together):
        assert torch.equal(first, alone[0][step])
        assert torch.equal(second, alone[1][step])
        assert not torch.equal(first, second)


@MODES
def test_no_global_generator_is_read_or_written(mode: str) -> None:
    states = []
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        drawn.append(run(mode, torch.arange(12)).latents.z)
        after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        states.append(torch.equal(before[0], after[0]) and before[1:] == after[1:])
    assert all(states)
    assert torch.equal(*drawn)


def test_the_step_counter_advances_once_a_call_and_a_given_step_leaves_it_alone() -> None:
    sampler = sampler_for("random")
    first = sampler(X, sample_ids=IDS).latents.z
    other = sampler(X, sample_ids=IDS, step=77).latents.z
    second = sampler(X, sample_ids=IDS).latents.z
    fresh = sampler_for("random")
    for step, expected in ((0, first), (77, other), (1, second)):
        assert torch.equal(fresh(X, sample_ids=IDS, step=step).latents.z, expected)
        as_tensor = fresh(X, sample_ids=IDS, step=torch.tensor(step)).latents.z
        assert torch.equal(as_tensor, expected)


def test_default_ids_count_on() -> None:
    sampler = sampler_for("random")
    assert [sampler(X[:n]).ids.tolist() for n in (3, 2)] == [[0, 1, 2], [3, 4]]


def test_ranks_take_their_parts_of_the_global_batch() -> None:
    ranks = [sampler_for("random", rank=r, world_size=3) for r in range(3)]
    alone = sampler_for("random")
    for _ in range(3):
        parts = [sampler(X[4 * r : 4 * r + 4]) for r, sampler in enumerate(ranks)]
        whole = alone(X)
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
        assert torch.equal(torch.cat([part.latents.z for part in parts]), whole.latents.z)


def test_the_place_comes_from_torch_distributed_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_for("random")
    assert sampler(X[:3]).ids.tolist() == [0, 1, 2]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert [sampler(X[:3]).ids.tolist() for _ in range(2)] == [[6, 7, 8], [18, 19, 20]]


@settings(max_examples=20)
@given(sizes=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), max_size=4))
def test_ranks_never_share_an_id_even_with_a_smaller_last_batch(sizes: list[list[int]]) -> None:
    ranks = [sampler_for("prior", rank=r, world_size=3) for r in range(3)]
    seen: list[int] = []
    for batch in [[4, 4, 4], *sizes]:
        for rank, (sampler, size) in enumerate(zip(ranks, batch, strict=True)):
            ids = sampler(X[:size]).ids.tolist()
            assert all(i // 4 % 3 == rank for i in ids)
            seen += ids
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("mode", ["prior", "random", "gradient"])
@pytest.mark.parametrize("junk", [0.0, 5.0])
def test_unequal_lengths_in_one_batch_equal_one_by_one(mode: str, junk: float) -> None:
    lengths = [5, 2, 3, 1]
    batch, ids = toys.sequences(lengths), torch.tensor([4, 8, 15, 16])
    batch["features"] += junk * ~batch["mask"][..., None]
    teacher, student = toys.sequence_teacher(prior="normal"), toys.seeded(toys.SequenceClassifier, 6)
    options: dict[str, Any] = {"steps": 3, "step_noise": 0.2, "radius": 1.5, "sigma": 0.7}
    sampler = LatentSampler(teacher, mode, **options).calibrate([toys.sequences([4] * 20, seed=3)])
    whole = sampler(batch, student=student, sample_ids=ids, step=2)
    if mode == "gradient":
        assert sampler.scale is not None
        offset = (whole.latents.z - teacher.encode(batch).z) / sampler.scale
        distance = offset.flatten(1).norm(dim=1)
        assert distance.max() <= 1.5 + 1e-4
        assert distance.max() > 1.49  # the region binds
    for row, length in enumerate(lengths):
        alone = {name: leaf[row : row + 1, :length] for name, leaf in batch.items()}
        made = sampler(alone, student=student, sample_ids=ids[row : row + 1], step=2)
        torch.testing.assert_close(whole.latents.z[row : row + 1, :length], made.latents.z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole.teacher_logits[row : row + 1], made.teacher_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["gradient", "persistent"])
def test_a_gradient_at_masked_positions_takes_nothing_from_the_step(mode: str) -> None:
    """A student that forgets the mask pulls at padding too: the step's length is still that of real positions."""
    head = toys.seeded(lambda: nn.Linear(toys.FEATURES, toys.CLASSES), 6)
    teacher, options = toys.sequence_teacher(), {"sigma": 0.0, "restart_probability": 0.0}
    sampler = LatentSampler(teacher, mode, step_size=0.5, units="absolute", **options)
    batch, ids = toys.sequences([5, 2, 3, 1]), torch.arange(4)

    def student(x: dict[str, Tensor]) -> Tensor:
        logits: Tensor = head(x["features"].sum(1))
        return logits

    made = sampler(batch, student=student, sample_ids=ids)
    if mode == "persistent":
        (student(made.x) - made.teacher_logits).square().sum().backward()
        made = sampler(batch, sample_ids=ids)
    moved = (made.latents.z.detach() - teacher.encode(batch).z).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, torch.full((4,), 0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("mode", ["random", "gradient", "persistent"])
def test_masked_positions_keep_the_encoding_bit_for_bit(mode: str) -> None:
    batch = toys.sequences([5, 2, 3])
    teacher, student = toys.sequence_teacher(), toys.seeded(toys.SequenceClassifier, 6)
    sampler = LatentSampler(teacher, mode, steps=2, step_noise=0.2, radius=2.0, restart_probability=0.0)
    sampler.calibrate([batch])
    encoded = teacher.encode(batch).z
    for _ in range(2):
        made = sampler(batch, student=student, sample_ids=torch.arange(3))
        moved = made.latents.z.detach() != encoded
        assert not moved[~batch["mask"]].any()
        assert moved[batch["mask"]].all()
        if mode == "persistent":
            (student(made.x) - made.teacher_logits).square().sum().backward()
