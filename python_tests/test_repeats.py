"""Copies of one example in a batch: noise of their own, the same noise, or an error; and copies in several calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
import training_kit
from torch import Tensor, nn
from torch.utils.data import DataLoader, WeightedRandomSampler

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.explore import LatentSampler, Synthetic
from tgt_fast.explore.repeats import first_replicas, occurrences
from tgt_fast.teacher import Key, Teacher
from tgt_fast.teacher.batches import Batch

EXAMPLES = toys.normal(3, toys.FEATURES)
ROWS = torch.tensor([2, 0, 2, 1, 2, 0])  # the batch: examples 2, 0, 2, 1, 2, 0
COPIES = torch.tensor([0, 0, 1, 0, 2, 1])
IDS = torch.tensor([2**40 + 1, 7, 5])
MODES = pytest.mark.parametrize("mode", ["prior", "random", "gradient", "persistent"])


def sampler_for(mode: str, teacher: Teacher | None = None, **options: Any) -> LatentSampler:
    settings: dict[str, Any] = {"steps": 2, "step_noise": 0.3, "radius": 4.0, "seed": 11, "sigma": 0.7, **options}
    teacher = teacher or toys.vector_teacher(prior="normal")
    return LatentSampler(teacher, mode, **settings).calibrate([toys.normal(64, toys.FEATURES, seed=9)])


def explore(sampler: LatentSampler, rows: Tensor = ROWS, **options: Any) -> Synthetic:
    return sampler(EXAMPLES[rows], student=toys.student(), sample_ids=IDS[rows], step=4, **options)


@MODES
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_copy_is_a_further_replica(mode: str, replicas: int) -> None:
    """Copy k of an id is its replicas k * replicas + r: what one row gives with more replicas."""
    made = explore(sampler_for(mode, replicas=replicas)).latents.z.detach().reshape(replicas, len(ROWS), -1)
    alone = sampler_for(mode, replicas=9)
    for row, (example, copy) in enumerate(zip(ROWS.tolist(), COPIES.tolist(), strict=True)):
        expected = explore(alone, torch.tensor([example])).latents.z.detach()
        torch.testing.assert_close(made[:, row], expected[copy * replicas :][:replicas], rtol=1e-5, atol=1e-6)
    apart = torch.cdist(made.flatten(0, 1), made.flatten(0, 1)) + torch.eye(replicas * len(ROWS))
    assert apart.min() > 1e-3


@MODES
def test_copies_in_calls_of_their_own_are_those_of_one_call(mode: str) -> None:
    whole = explore(sampler_for(mode)).latents.z.detach()
    split = sampler_for(mode)
    parts = [
        explore(split, ROWS[part], occurrence=COPIES[part].to(torch.int32)).latents.z.detach()
        for part in torch.arange(len(ROWS)).split(2)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)
    order = torch.tensor([4, 5, 0, 3, 1, 2])
    turned = explore(sampler_for(mode), ROWS[order], occurrence=COPIES[order]).latents.z.detach()
    torch.testing.assert_close(turned, whole[order], rtol=1e-5, atol=1e-6)


def test_oversampling_repeats_no_row() -> None:
    x, y = training_kit.make_data(40)
    weights = torch.where(torch.arange(40) < 2, 10.0, 0.1)  # of 40 examples two are drawn most of the time
    drawn = WeightedRandomSampler(weights, 256, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(list(zip(torch.arange(40), x, y, strict=True)), batch_size=128, sampler=drawn)
    sampler = LatentSampler(training_kit.make_teacher(), sigma=0.5, units="absolute")
    for ids, batch, _ in loader:
        assert len(ids.unique()) < 40
        assert len(sampler(batch, sample_ids=ids).x.unique(dim=0)) == 128


@pytest.mark.parametrize("mode", ["prior", "random", "gradient"])
def test_copies_can_share_their_noise(mode: str) -> None:
    sampler = sampler_for(mode, repeats="same")
    z = explore(sampler).latents.z
    torch.testing.assert_close(z[[0, 0, 1]], z[[2, 4, 5]], rtol=1e-5, atol=1e-6)
    assert not torch.equal(z[0], z[1])
    distinct = sampler_for(mode)
    torch.testing.assert_close(explore(distinct).latents.z[[0, 1, 3]], z[[0, 1, 3]], rtol=1e-5, atol=1e-6)
    distinct.repeats = "same"
    assert torch.equal(explore(distinct).latents.z, z)


@MODES
def test_copies_can_be_an_error(mode: str) -> None:
    sampler = sampler_for(mode, repeats="error")
    with pytest.raises(ArgumentError, match=r'sample id 5 occurs twice.*repeats="error" refuses'):
        explore(sampler)
    assert explore(sampler, torch.arange(3)).ids.tolist() == IDS.tolist()


def test_a_persistent_copy_has_a_chain_of_its_own() -> None:
    sampler, student = sampler_for("persistent", restart_probability=0.0), toys.student().eval()
    made = explore(sampler)
    (student(made.x) - made.teacher_logits).square().sum().backward()
    again = explore(sampler, ROWS[[2, 1]], occurrence=COPIES[[2, 1]])
    moved = ((again.latents.z - made.latents.z[[2, 1]]).detach() / sampler.scale).norm(dim=1)
    assert (moved > 0.1).all()
    with pytest.raises(ArgumentError, match="occurs twice in one batch as the same copy"):
        explore(sampler_for("persistent", repeats="same"))


def test_the_last_copy_that_a_key_has_room_for() -> None:
    """Its chain, too: above 2^15 the replica reaches the sign of the bank's 64 bits."""
    sampler = sampler_for("persistent", restart_probability=0.0)
    last = torch.full((3,), 2**16 - 1)
    rows = torch.arange(3)
    made = explore(sampler, rows, occurrence=last)
    other = sampler_for("persistent", restart_probability=0.0)
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(explore(other, rows, occurrence=last).latents.z, made.latents.z)
    assert not torch.equal(explore(other, rows, occurrence=last - 1).latents.z, made.latents.z)
    with pytest.raises(ArgumentError, match=r"occurrence must be in \[0, 65536\), got 65536"):
        explore(sampler, rows, occurrence=last + 1)
    many = sampler_for("random", replicas=2**8)
    with pytest.raises(ArgumentError, match=r"replicas=256 occurrence must be in \[0, 256\), got 256"):
        explore(many, rows, occurrence=last // 2**8 + 1)
    assert len(explore(many, rows, occurrence=last // 2**8).ids) == 3 * 2**8


def test_copies_get_anchors_of_their_own() -> None:
    x, y = torch.arange(300.0)[:, None].expand(-1, 2), torch.arange(300) % 3
    teacher = Teacher(nn.Identity(), nn.Identity(), nn.Linear(2, 3))
    sampler = LatentSampler(teacher, anchors="balanced", sigma=1e-6, units="absolute", replicas=2).calibrate([(x, y)])
    ids = torch.zeros(64, dtype=torch.int64)
    made = sampler(torch.zeros(64, 2), sample_ids=ids, step=0)
    assert made.anchor_ids is not None
    first, second = made.anchor_ids.split(64)
    assert torch.equal(first, second)  # replicas of one row share theirs
    assert len(first.unique()) > 40
    sampler.repeats = "same"
    shared = sampler(torch.zeros(64, 2), sample_ids=ids, step=0).anchor_ids
    assert shared is not None
    assert shared.tolist() == [int(first[0])] * 128


def test_a_decoder_that_draws_is_given_each_copys_replica() -> None:
    seen: list[Tensor] = []

    def decode(z: Tensor, key: Key) -> Tensor:
        assert isinstance(key.replica, Tensor)
        seen.append(torch.stack([key.ids, key.replica]))
        return z

    teacher = Teacher(nn.Identity(), decode, nn.Linear(toys.FEATURES, 3), max_batch=4)
    explore(LatentSampler(teacher, sigma=1.0, units="absolute", replicas=2))
    expected = torch.cat([torch.stack([IDS[ROWS], 2 * COPIES + replica]) for replica in range(2)], 1)
    assert torch.equal(torch.cat(seen, 1), expected)
    assert [part.shape[1] for part in seen] == [4, 2, 4, 2]


def test_counting_copies_reads_nothing_back() -> None:
    """On the meta device, where reading a value is an error; and in the order of the rows."""
    options = LatentSampler(toys.vector_teacher()).options
    found = first_replicas(torch.zeros(1000, dtype=torch.int64, device="meta"), None, options)
    assert isinstance(found, Tensor)
    assert found.shape == (1000,)
    generator = torch.Generator().manual_seed(0)
    for count, kinds in ((0, 1), (1, 1), (2, 1), (50, 3), (500, 400)):
        ids = torch.randint(0, kinds, (count,), generator=generator)
        expected = [ids[:row].eq(ids[row]).sum().item() for row in range(count)]
        counted = occurrences(ids)
        assert (counted is None) == (not any(expected))
        assert counted is None or counted.tolist() == expected


@pytest.mark.parametrize(
    ("options", "arguments", "error", "match"),
    [
        ({}, {"occurrence": COPIES.float()}, DTypeError, "occurrence must be a tensor of integers, got torch.float32"),
        ({}, {"occurrence": [0] * 6}, DTypeError, "occurrence must be a tensor of integers, got list"),
        ({}, {"occurrence": COPIES[:5]}, ShapeError, r"occurrence \(5,\) must be \(6,\)"),
        ({}, {"occurrence": COPIES - 1}, ArgumentError, r"occurrence must be in \[0, 65536\), got -1"),
        ({}, {"occurrence": COPIES, "sample_ids": None}, ArgumentError, "pass sample_ids="),
        ({"repeats": "same"}, {"occurrence": COPIES}, ArgumentError, "repeats='same' does not"),
        ({"repeats": "error"}, {"occurrence": COPIES}, ArgumentError, "repeats='error' does not"),
    ],
)
def test_an_occurrence_without_sense_is_named(
    options: dict[str, Any], arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        sampler_for("random", **options)(EXAMPLES[ROWS], **{"sample_ids": IDS[ROWS], **arguments})


def test_what_repeats_may_be() -> None:
    with pytest.raises(ArgumentError, match="repeats must be one of"):
        sampler_for("random", repeats="ignore")


def test_micro_batches_of_one_step_hold_copies_apart() -> None:
    teacher = training_kit.make_teacher()
    sampler = LatentSampler(teacher, sigma=0.5, units="absolute")
    objective = tgt.TGTObjective(teacher, sampler)
    x, y = training_kit.make_data(3)
    seen: list[Tensor] = []
    student = nn.Sequential(nn.Linear(training_kit.FEATURES, training_kit.CLASSES))
    student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))

    ids = torch.tensor([4, 8, 4])
    batches = [(ids, x[[0, 1, 0]], y[[0, 1, 0]]), (torch.tensor([4, 9]), x[[0, 2]], y[[0, 2]])]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    tgt.fit(student, objective, batches, steps=1, accumulate=2, optimizer=optimizer, progress=False)
    rows = torch.cat([seen[1], seen[3]])  # the synthetic ones of both
    whole = sampler(
        x[[0, 1, 0, 0, 2]], sample_ids=torch.tensor([4, 8, 4, 4, 9]), step=0, occurrence=torch.tensor([0, 0, 1, 2, 0])
    )
    torch.testing.assert_close(rows, whole.x)
    assert len(rows.unique(dim=0)) == 5

    parts = [Batch(*batch) for batch in batches]
    counted = objective.occurrences([parts[0], Batch(None, *parts[1][1:]), parts[1]])
    assert [None if copies is None else copies.tolist() for copies in counted] == [[0, 0, 1], None, [2, 0]]
    sampler.repeats = "same"
    assert objective.occurrences(parts) == [None, None]
    assert tgt.TGTObjective(teacher).occurrences(parts) == [None, None]


@MODES
def test_copies_are_counted_beside_the_data(mode: str) -> None:
    expected = explore(sampler_for(mode)).latents.z.detach()
    sampler, student = sampler_for(mode), toys.student()
    torch.set_default_device("meta")
    try:
        made = sampler(EXAMPLES[ROWS], student=student, sample_ids=IDS[ROWS], step=4)
    finally:
        torch.set_default_device(None)
    assert torch.equal(made.latents.z.detach(), expected)


@pytest.mark.once("torch.compile")
def test_compiled_exploration_gives_copies_their_own_noise() -> None:
    plain, fast = (sampler_for("gradient", compile=compiled) for compiled in (False, True))
    torch.testing.assert_close(explore(fast).latents.z, explore(plain).latents.z, rtol=1e-4, atol=1e-5)
