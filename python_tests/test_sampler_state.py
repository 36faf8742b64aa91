"""The state that a sampler learns and keeps: the latents' scale, balanced anchors, and a state to resume from."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from tgt_fast.explore import LatentSampler
from tgt_fast.teacher import Latents, Teacher

IDENTITY = Teacher(nn.Identity(), nn.Identity(), lambda x: x[:, :3], prior="normal")


def balanced(teacher: Teacher = IDENTITY, **options: Any) -> LatentSampler:
    settings: dict[str, Any] = {
        "mode": "random", "anchors": "balanced", "sigma": 0.0, "units": "absolute", **options,
    }  # fmt: skip
    return LatentSampler(teacher, **settings)


@given(cuts=st.lists(st.integers(0, 40), max_size=4), offset=st.sampled_from((0.0, 1e4)))
@settings(max_examples=20)
def test_the_scale_is_the_standard_deviation_however_the_loader_cuts(cuts: list[int], offset: float) -> None:
    z = toys.normal(40, 2, 3) * torch.tensor([1e-3, 1.0, 50.0]) + offset
    edges = [0, *sorted(cuts), 40]
    parts = [z[a:b] for a, b in itertools.pairwise(edges)]
    sampler = LatentSampler(IDENTITY, "random").calibrate([part for part in parts if len(part)])
    torch.testing.assert_close(sampler.scale, z.double().std(0).float(), rtol=1e-4, atol=0)


def test_loaders_of_every_form_serve() -> None:
    x, y, ids = toys.normal(10, 4), torch.arange(10) % 3, torch.arange(10)
    expected = x.std(0)
    for batch in (x, (x,), [x, y], (ids, x, y)):
        sampler = LatentSampler(IDENTITY, "random").calibrate([batch])
        torch.testing.assert_close(sampler.scale, expected)
    with pytest.raises(ArgumentError, match="gave a tuple of 4"):
        LatentSampler(IDENTITY, "random").calibrate([(x, y, ids, ids)])


def test_a_masked_scale_is_pooled_over_real_positions() -> None:
    batch = toys.sequences([5, 2, 3, 1, 4])
    batch["features"][~batch["mask"]] = float("nan")
    teacher = toys.sequence_teacher()
    z = teacher.encode(batch).z
    sampler = LatentSampler(teacher, "random").calibrate([batch])
    torch.testing.assert_close(sampler.scale, z[batch["mask"]].std(0)[None])
    images = Latents(toys.normal(3, 2, 4, 4), torch.arange(4)[None, None, None].expand(3, 1, 4, 4) < 2)
    masked = Teacher(lambda x: images, lambda z: z.z, lambda x: x.flatten(1))
    found = LatentSampler(masked, "random").calibrate([torch.zeros(3, 1)]).scale
    torch.testing.assert_close(found, images.z[..., :2].transpose(0, 1).flatten(1).std(1)[:, None, None])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 4), "at least two examples"),
        (torch.ones(5, 4), "every example the same latent"),
        (torch.full((5, 4), torch.nan), "not all finite"),
    ],
)
def test_latents_without_a_standard_deviation_are_refused(x: Tensor, message: str) -> None:
    sampler = LatentSampler(IDENTITY, "random").calibrate([toys.normal(9, 4)])
    before = sampler.state_dict()
    with pytest.raises(ArgumentError, match=message):
        sampler.calibrate([x])
    assert toys.same(before, sampler.state_dict())
    with pytest.raises(ArgumentError, match="at least two examples"):
        LatentSampler(IDENTITY, "random").calibrate([])


def test_a_change_of_latent_shape_within_a_loader_is_named() -> None:
    with pytest.raises(ShapeError, match=r"\[5\] after latents of shape \[4\]"):
        LatentSampler(IDENTITY, "random").calibrate([toys.normal(9, 4), toys.normal(9, 5)])


def tail(classes: int = 4, most: int = 64) -> tuple[Tensor, Tensor]:
    """A long tail: the class of an example is its first coordinate; 64, 16, 4, 1 members, shuffled."""
    y = torch.cat([torch.full((max(1, most // 4**c),), c) for c in range(classes)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    return torch.stack([y.float(), torch.arange(len(y)).float()], 1), y


def test_balanced_anchors_take_classes_and_members_uniformly() -> None:
    x, y = tail()
    sampler = balanced().calibrate(list(zip(x.split(10), y.split(10), strict=True)))
    count = 8000
    drawn = sampler(torch.zeros(count, 2)).latents.z
    assert set(map(tuple, drawn.tolist())) == set(map(tuple, x.tolist()))
    shares = torch.bincount(drawn[:, 0].long(), minlength=4) / count
    assert (shares - 0.25).abs().max() < 4 * (0.25 * 0.75 / count) ** 0.5
    members = torch.unique(drawn[drawn[:, 0] == 0][:, 1], return_counts=True)[1].double()
    expected = members.sum() / 64
    assert ((members - expected) ** 2 / expected).sum() < 63 + 4 * (2 * 63) ** 0.5  # chi-square, 63 degrees


def test_balanced_anchors_depend_on_id_step_and_seed_alone() -> None:
    x, y = tail()
    ids = torch.arange(50) * 7

    def draw(ids: Tensor, step: int = 0, seed: int = 0) -> Tensor:
        sampler = balanced(seed=seed).calibrate([(x, y)])
        return sampler(torch.zeros(len(ids), 2), sample_ids=ids, step=step).latents.z

    whole = draw(ids)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat([draw(ids[order][:20]), draw(ids[order][20:])]), whole[order])
    assert not torch.equal(whole, draw(ids, step=1))
    assert not torch.equal(whole, draw(ids, seed=1))


def test_balanced_anchors_serve_gradient_mode_and_replicas() -> None:
    teacher = toys.vector_teacher()
    x = toys.normal(30, toys.FEATURES)
    sampler = LatentSampler(teacher, "gradient", anchors="balanced", replicas=2, sigma=0.1, step_size=0.1)
    made = sampler.calibrate([(x, torch.arange(30) % 3)])(x[:5], student=toys.student())
    distance = torch.cdist(made.latents.z, teacher.encode(x).z)
    assert (distance.min(1).values < 1).all()
    assert torch.equal(distance[:5].argmin(1), distance[5:].argmin(1))  # replicas share the anchor


@pytest.mark.parametrize("named", [True, False], ids=["ids", "no ids"])
@pytest.mark.parametrize("mode", ["random", "gradient"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_the_anchor_of_each_row_and_its_class_are_known(mode: str, replicas: int, named: bool) -> None:
    x, y = tail()
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(2))[: len(x)]
    columns = [ids.split(10), x.split(10), y.split(10)] if named else [x.split(10), y.split(10)]
    sampler = balanced(mode=mode, replicas=replicas, sigma=1e-6, step_size=0.0).calibrate(zip(*columns, strict=True))
    again = balanced(mode=mode, replicas=replicas, sigma=1e-6, step_size=0.0)
    again.load_state_dict(sampler.state_dict())
    for explorer in (sampler, again):
        made = explorer(torch.zeros(50, 2), student=nn.Linear(2, 2), step=3)
        assert made.anchor_ids is not None
        assert made.anchor_labels is not None
        assert made.anchor_ids.shape == made.anchor_labels.shape == made.ids.shape == (50 * replicas,)
        place = (ids[None] == made.anchor_ids[:, None]).nonzero()[:, 1] if named else made.anchor_ids
        assert torch.equal(made.latents.z.round(), x[place])
        assert torch.equal(made.anchor_labels, y[place])
        assert not torch.equal(made.anchor_ids, made.ids)


@pytest.mark.parametrize("mode", ["prior", "random", "gradient", "persistent"])
def test_anchors_of_the_batch_are_the_batchs_own(mode: str) -> None:
    sampler = LatentSampler(toys.vector_teacher(prior="normal"), mode, replicas=2, units="absolute")
    made = sampler(toys.normal(3, toys.FEATURES), student=toys.student(), sample_ids=torch.tensor([7, 5, 9]))
    assert made.anchor_labels is None
    if mode == "prior":  # starts from no example
        assert made.anchor_ids is None
        return
    assert made.anchor_ids is not None
    assert made.anchor_ids.tolist() == [7, 5, 9, 7, 5, 9]


def test_a_pool_saved_without_ids_has_none_and_a_mixture_is_refused() -> None:
    x, y = tail()
    state = balanced().calibrate([(x, y)]).state_dict()
    del state["pool_ids"]
    sampler = balanced()
    sampler.load_state_dict(state)
    made = sampler(torch.zeros(5, 2))
    assert made.anchor_ids is None
    assert made.anchor_labels is not None
    assert torch.equal(made.anchor_labels, made.latents.z[:, 0].long())
    with pytest.raises(ArgumentError, match="some batches have ids"):
        balanced().calibrate([(torch.arange(len(x)), x, y), (x, y)])


def test_missing_labels_are_the_labelers_opinion() -> None:
    x = torch.eye(3)[torch.tensor([0, 0, 0, 0, 1, 2])]
    for y in (None, torch.tensor([0, -1, 0, -1, -100, 2])):
        batch = x if y is None else (x, y)
        drawn = balanced().calibrate([batch])(torch.zeros(3000, 3)).latents.z
        assert (drawn.mean(0) - 1 / 3).abs().max() < 0.04


def test_a_pool_keeps_at_most_so_many_a_class() -> None:
    x, y = tail()
    sampler = balanced().calibrate([(x, y)], per_class=3)
    kept = sampler.state_dict()["pool_labels"]
    assert isinstance(kept, Tensor)
    assert torch.bincount(kept).tolist() == [3, 3, 3, 1]


def test_a_pool_of_sequences_is_padded_to_the_longest() -> None:
    teacher = toys.sequence_teacher()
    batches = [toys.sequences([2, 3]), toys.sequences([5, 1])]
    sampler = balanced(teacher).calibrate([(batch, torch.tensor([0, 1])) for batch in batches])
    drawn = sampler(toys.sequences([4] * 200)).latents
    assert drawn.z.shape == (200, 5, toys.LATENT)
    assert drawn.mask is not None
    assert set(drawn.mask.sum(1).tolist()) == {1, 2, 3, 5}


def test_bad_labels_and_a_missing_pool_are_named() -> None:
    x = toys.normal(6, 3)
    with pytest.raises(ArgumentError, match="call calibrate"):
        balanced()(x)
    with pytest.raises(DTypeError, match=r"integer classes, got torch\.float32"):
        balanced().calibrate([(x, torch.zeros(6))], columns=(None, 0, 1))
    with pytest.raises(ShapeError, match=r"labels must be \[batch\], got \(6, 2\)"):
        balanced().calibrate([(x, torch.zeros(6, 2, dtype=torch.int64))])
    with pytest.raises(ArgumentError, match="per_class"):
        balanced().calibrate([x], per_class=0)


def make(mode: str, **options: Any) -> LatentSampler:
    if mode == "balanced":
        return LatentSampler(toys.vector_teacher(), "random", anchors="balanced", **options)
    return LatentSampler(toys.vector_teacher(prior=(4,)), mode, **options)


def advance(sampler: LatentSampler, calls: range) -> list[Tensor]:
    student = toys.student().eval()
    found = []
    for call in calls:
        x = toys.normal(6, toys.FEATURES, seed=call)
        ids = torch.arange(6) + 3 * (call % 2) if sampler.mode == "persistent" else None
        made = sampler(x, student=student, sample_ids=ids)
        if made.x.requires_grad:
            (student(made.x) - made.teacher_logits).square().sum().backward()
        found.append(made.latents.z.detach().clone())
    return found


@pytest.mark.parametrize("mode", ["prior", "random", "gradient", "persistent", "balanced"])
def test_a_resumed_sampler_goes_on_bit_for_bit(mode: str) -> None:
    options: dict[str, Any] = {"radius": 2.0, "seed": 5, "replicas": 2, "rank": 1, "world_size": 2}
    calibration = [(toys.normal(30, toys.FEATURES, seed=8), torch.arange(30) % 3)]
    unbroken = make(mode, **options).calibrate(calibration)
    advance(unbroken, range(4))
    state = unbroken.state_dict()
    assert all(isinstance(value, (int, Tensor)) for value in state.values())
    kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
    expected = advance(unbroken, range(4, 8))
    assert toys.same(kept, state)  # a state is a copy: going on does not change it

    resumed = make(mode, **{**options, "seed": 99})
    resumed.load_state_dict(state)
    assert toys.same(resumed.state_dict(), kept)
    for a, b in zip(advance(resumed, range(4, 8)), expected, strict=True):
        assert torch.equal(a, b)
    assert toys.same(kept, state)  # nor does going on from it


def test_a_smaller_bank_keeps_the_most_recently_visited() -> None:
    large, small = make("persistent"), make("persistent", bank_size=3)
    large.calibrate([toys.normal(9, toys.FEATURES)])
    for ids in ([0, 1, 2, 3], [1]):
        large(toys.normal(len(ids), toys.FEATURES), sample_ids=torch.tensor(ids))
    small.load_state_dict(large.state_dict())
    kept = small.state_dict()["bank_chains"]
    assert isinstance(kept, Tensor)
    assert kept.tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        ("random", {"step": None}, r"missing \['step'\]"),
        ("random", {"weights": torch.zeros(2)}, r"foreign \['weights'\]"),
        ("random", {"bank_chains": torch.arange(2)}, r"mode='random'.*foreign \['bank_chains'\]"),
        ("random", {"version": 2}, "format 2"),
        ("random", {"stride": -1}, "stride must be"),
        ("random", {"mode": None}, r"missing \['mode'\]"),
        ("random", {"mode": "random"}, "mode must be a non-negative integer"),
        ("random", {"mode": 99}, "mode=99, here 'random'"),
        ("random", {"stride": torch.tensor(1)}, "stride must be"),
        ("random", {"seed": 3}, "seed must be a tensor"),
        ("random", {"step": torch.zeros(2, dtype=torch.int64)}, r"0-d int64 tensor, got torch.int64 \(2,\)"),
        ("random", {"next_id": torch.tensor(0.5)}, "0-d int64 tensor, got torch.float32"),
        ("random", {"scale": torch.tensor([1.0, torch.nan])}, "finite standard deviations"),
        ("random", {"scale": torch.tensor([1, 2])}, "finite standard deviations"),
        ("persistent", {"bank_latents": None}, r"missing \['bank_latents'\]"),
        ("persistent", {"bank_chains": torch.arange(3)}, r"do not fit together.*\(3,\).*\(6, 4\)"),
        ("persistent", {"bank_chains": torch.arange(6.0)}, "do not fit together"),
        ("persistent", {"bank_chains": torch.zeros(6, dtype=torch.int64)}, "occurs twice"),
        ("persistent", {"bank_latents": torch.zeros(6, 4, dtype=torch.int64)}, "floating-point"),
        ("persistent", {"bank_mask": torch.ones(6, 9)}, "mask"),
        ("persistent", {"bank_anchors": torch.ones(6, 9)}, "do not fit together"),
        ("balanced", {"pool_labels": None}, r"missing \['pool_labels'\]"),
        ("balanced", {"pool_labels": torch.arange(4)}, "pool_labels torch.int64"),
        ("balanced", {"pool_ids": torch.zeros(2)}, "pool_ids torch.float32"),
        ("balanced", {"pool_mask": torch.ones(1, 9)}, "mask"),
    ],
)
def test_foreign_and_damaged_states_are_refused_and_change_nothing(
    mode: str, change: dict[str, Any], message: str
) -> None:
    sampler = make(mode).calibrate([toys.normal(9, toys.FEATURES)])
    advance(sampler, range(1))
    before = sampler.state_dict()
    state = {name: value for name, value in {**before, **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        sampler.load_state_dict(state)
    assert toys.same(before, sampler.state_dict())


@pytest.mark.parametrize(
    ("mode", "saved", "here", "message"),
    [
        ("gradient", {"mode": "gradient"}, {"mode": "random"}, "with mode='gradient', here 'random'$"),
        ("gradient", {"units": "absolute"}, {}, "with units='absolute', here 'std'$"),
        ("gradient", {"norm": "linf"}, {}, "with norm='linf', here 'l2'$"),
        ("random", {"replicas": 3}, {"replicas": 2}, "with replicas=3, here 2$"),
        ("persistent", {"replicas": 3}, {"norm": "linf"}, "with norm='l2', here 'linf'; replicas=3, here 1$"),
    ],
)
def test_the_state_of_a_sampler_with_other_options_is_refused(
    mode: str, saved: dict[str, Any], here: dict[str, Any], message: str
) -> None:
    there = make(**{"mode": mode, **saved})
    sampler = make(**{"mode": mode, **here})
    before = sampler.state_dict()
    with pytest.raises(CheckpointError, match=message):
        sampler.load_state_dict(there.state_dict())
    assert toys.same(before, sampler.state_dict())


def test_options_that_a_schedule_may_change_are_not_compared() -> None:
    there = make("gradient", sigma=1.0, step_size=0.5, steps=2, radius=3.0)
    make("gradient", sigma=0.5, step_size=0.2, steps=3).load_state_dict(there.state_dict())


def test_a_state_that_is_no_dict_or_lacks_the_anchors_of_a_trust_region_is_refused() -> None:
    with pytest.raises(CheckpointError, match="got list"):
        make("random").load_state_dict([])  # type: ignore[arg-type]
    free = make("persistent").calibrate([toys.normal(9, toys.FEATURES)])
    advance(free, range(1))
    with pytest.raises(CheckpointError, match=r"missing \['bank_anchors'\]"):
        make("persistent", radius=1.0).load_state_dict(free.state_dict())
