"""Synthetic examples in a folder: what is stored, what a second run adds, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from cache_kit import flip, parts, same, shards
from torch import Tensor
from torch.utils.data import DataLoader

import tgt_fast as tgt
from tgt_fast.cache.keys import SAMPLES, SYNTHETIC
from tgt_fast.errors import (
    ArgumentError,
    CacheError,
    CheckpointError,
    ShapeError,
    StaleCacheError,
    TgtError,
    UnknownIdError,
)
from tgt_fast.synthesis import Filters

ROWS, BATCH = 22, 6  # the last batch is smaller
IDS = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)) + 2**40
X = toys.normal(ROWS, toys.FEATURES, seed=1)


def batches(rows: int = ROWS) -> list[tuple[Tensor, Tensor]]:
    return [(IDS[at : at + BATCH], X[at : at + BATCH]) for at in range(0, rows, BATCH)]


def sampler_for(mode: str = "random", **options: Any) -> tgt.LatentSampler:
    options = {"sigma": 0.5, "units": "absolute", "seed": 3, "steps": 2, **options}
    return tgt.LatentSampler(toys.vector_teacher(prior="normal"), mode, **options)


def synthesize(folder: Path, *, loader: Any = None, sampler: Any = None, **options: Any) -> Any:
    given = batches() if loader is None else loader
    return tgt.synthesize(sampler or sampler_for(), given, folder, progress=False, **options)


def equal(one: tgt.SyntheticDataset, two: tgt.SyntheticDataset) -> bool:
    a, b = one.read(), two.read()
    return torch.equal(a.keys, b.keys) and torch.equal(a.x, b.x) and same(a.labels, b.labels)


@pytest.mark.parametrize(("mode", "k", "latents"), [("random", None, True), ("gradient", 2, False), ("prior", 2, True)])
def test_rows_are_those_of_live_exploration(tmp_path: Path, mode: str, k: int | None, latents: bool) -> None:
    sampler, student = sampler_for(mode), toys.student() if mode == "gradient" else None
    told = synthesize(tmp_path, sampler=sampler, student=student, replicas=3, k=k, latents=latents, step=5)
    assert (told.computed, told.found, sampler.replicas) == (3 * ROWS, 0, 1)
    data = tgt.SyntheticDataset(tmp_path)
    keys = [tuple(key) for key in data.keys.tolist()]
    assert keys == sorted((int(i), replica, 5) for i in IDS for replica in range(3))
    live = sampler_for(mode, replicas=3)
    for ids, x in batches():
        made = live(x, sample_ids=ids, step=5, student=student)
        here = [(int(i), replica, 5) for replica in range(3) for i in ids]
        rows = data.read(keys=here)
        assert torch.equal(rows.x, made.x)
        expected = made.teacher_logits if k is None else tgt.topk_teacher(made.teacher_logits, k, 1.0)
        assert same(rows.labels, expected)
        assert (rows.latents is None) is not latents
        assert rows.latents is None or torch.equal(rows.latents.z, made.latents.z)
        one = data[here[1]]
        assert len(one) == 3 + latents
        assert one[0].item() == here[1][0]
        assert torch.equal(one[1], made.x[1])
        assert torch.equal(parts(one[2])[0], parts(expected)[0][1])


def test_a_second_run_goes_on_where_the_first_was_stopped(tmp_path: Path) -> None:
    synthesize(tmp_path / "whole", replicas=2)
    asked: list[int] = []
    sampler = sampler_for()
    sampler.teacher.encoder.register_forward_hook(lambda module, given, made: asked.append(len(given[0])))

    def stopped() -> Any:
        yield from batches()[:2]
        raise ValueError("the disk is gone")

    before = torch.get_rng_state()
    for _ in range(2):  # what is there is not made again
        with pytest.raises(ValueError, match="the disk is gone"):
            synthesize(tmp_path / "two", loader=stopped(), sampler=sampler, replicas=2)
    told = synthesize(tmp_path / "two", sampler=sampler, replicas=2)
    assert asked == [6, 6, 6, 4]
    assert (told.computed, told.found) == (20, 24)
    assert equal(tgt.SyntheticDataset(tmp_path / "whole"), tgt.SyntheticDataset(tmp_path / "two"))
    assert torch.equal(torch.get_rng_state(), before)
    told = synthesize(tmp_path / "two", sampler=sampler, replicas=3)
    assert (told.computed, told.found, len(tgt.SyntheticDataset(tmp_path / "two"))) == (22, 44, 66)
    assert synthesize(tmp_path / "two", sampler=sampler, replicas=1, step=1).computed == 22
    steps = tgt.SyntheticDataset(tmp_path / "two").keys[:, 2]
    assert (int((steps == 0).sum()), int((steps == 1).sum())) == (66, 22)


def test_a_torn_shard_is_made_again_and_a_shuffled_loader_is_the_same_each_time(tmp_path: Path) -> None:
    items = [(int(i), x) for i, x in zip(IDS, X, strict=True)]
    loader = DataLoader(items, batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]
    for name in ("one", "two"):
        assert synthesize(tmp_path / name, loader=loader, shard_bytes=1).computed == ROWS
    flip(shards(tmp_path / "two")[1], -3)
    with pytest.warns(UserWarning, match="of a set of synthetic examples is torn"):
        assert synthesize(tmp_path / "two", loader=loader).computed == BATCH
    assert equal(tgt.SyntheticDataset(tmp_path / "one"), tgt.SyntheticDataset(tmp_path / "two"))


def test_filters_count_what_they_drop_and_do_not_ask_again(tmp_path: Path) -> None:
    sampler, student = sampler_for(), None
    made = [sampler(x, sample_ids=ids, step=0) for ids, x in batches()]
    shares = torch.cat([one.teacher_logits for one in made]).softmax(-1)
    entropy = -(shares * shares.log()).sum(-1)
    again = torch.cat([sampler.teacher.label(sampler.teacher.decode(sampler.teacher.encode(one.x))) for one in made])
    agreement = 1 - (shares - again.softmax(-1)).abs().sum(-1) / 2
    z = torch.cat([one.latents.z for one in made])
    distance = (torch.cat([sampler.teacher.encode(one.x).z for one in made]) - z).norm(dim=1)
    bounds = [float(value.quantile(at)) for value, at in ((entropy, 0.7), (agreement, 0.3), (distance, 0.6))]
    filters = Filters(max_entropy=bounds[0], min_agreement=bounds[1], max_distance=bounds[2])
    first = entropy > filters.max_entropy
    second = ~first & (agreement < filters.min_agreement)
    third = ~first & ~second & (distance > filters.max_distance)
    told = synthesize(tmp_path, filters=filters, student=student)
    expected = {"entropy": first, "agreement": second, "distance": third}
    assert dict(told.dropped) == {name: int(refused.sum()) for name, refused in expected.items()}
    assert min(told.dropped.values()) > 0
    kept = ~(first | second | third)
    data = tgt.SyntheticDataset(tmp_path)
    assert sorted(data.keys[:, 0].tolist()) == sorted(IDS[kept].tolist())
    assert sorted(data.dropped()[:, 0].tolist()) == sorted(IDS[~kept].tolist())
    one = told.examples["entropy"][0]
    where = IDS.tolist().index(one.key[0])
    assert one.value == pytest.approx(float(entropy[where]), rel=1e-5)
    assert torch.equal(one.x, torch.cat([m.x for m in made])[where])
    told = synthesize(tmp_path, filters=filters)
    assert (told.computed, told.found, dict(told.dropped)) == (0, ROWS, {})
    with pytest.raises(StaleCacheError, match="max_entropy"):
        synthesize(tmp_path, filters=Filters(max_entropy=0.1))
    with pytest.raises(StaleCacheError, match="max_distance"):
        synthesize(tmp_path)
    seen: list[int] = []
    told = synthesize(tmp_path / "b", filters=Filters(min_agreement=1.0, second=lambda x: seen.append(len(x)) or x + 1))
    assert (sum(seen), told.dropped.total()) == (ROWS, ROWS)


def test_data_of_several_tensors_and_latents_with_a_mask(tmp_path: Path) -> None:
    teacher = toys.sequence_teacher()
    x = toys.sequences([3, 1, 4, 2, 4])
    sampler = tgt.LatentSampler(teacher, sigma=0.5, units="absolute")
    synthesize(tmp_path, sampler=sampler, loader=[(torch.arange(5), x)], latents=True)
    data = tgt.SyntheticDataset(tmp_path)
    made = sampler(x, sample_ids=torch.arange(5), step=0)
    rows = data.read()
    assert set(rows.x) == set(made.x)
    assert all(torch.equal(rows.x[name], made.x[name]) for name in made.x)
    assert rows.latents is not None
    assert torch.equal(rows.latents.z, made.latents.z)
    assert torch.equal(rows.latents.mask, made.latents.mask)
    (batch,) = DataLoader(data, batch_size=5)
    assert torch.equal(batch[1]["features"], made.x["features"])
    assert torch.equal(batch[3][1], made.latents.mask)


def test_items_go_through_loaders_and_pickles(tmp_path: Path) -> None:
    synthesize(tmp_path, k=2)
    data = pickle.loads(pickle.dumps(tgt.SyntheticDataset(tmp_path)))
    rows = data.read()
    for workers in (0, 1):
        found = list(DataLoader(data, batch_size=8, num_workers=workers))
        assert torch.equal(torch.cat([batch[0] for batch in found]), IDS.sort().values)
        assert torch.equal(torch.cat([batch[1] for batch in found]), rows.x)
        record = found[0][2]
        assert same(record, rows.labels[:8])
    assert torch.equal(data[-1][1], rows.x[-1])
    with pytest.raises(IndexError):
        data[ROWS]
    with pytest.raises(UnknownIdError, match=r"does not hold 1 of the keys.*\(7, 0, 0\)"):
        data[7, 0, 0]
    for key in ((1, 0), (2**48, 0, 0)):
        with pytest.raises((ArgumentError, UnknownIdError), match="key"):
            data[key]


def test_equal_examples_give_equal_students(tmp_path: Path, one_thread: None) -> None:
    """Trained from the folder alone, and by live exploration."""
    sampler = sampler_for()
    for step in range(4):
        synthesize(tmp_path, sampler=sampler, loader=[batches()[step]], step=step)
    data, loss_fn = tgt.SyntheticDataset(tmp_path), tgt.DistillationLoss()

    def train(given: Any) -> list[Tensor]:
        student = toys.student().eval()
        weights = list(student.parameters())
        for x, logits in given:
            slopes = torch.autograd.grad(loss_fn(student(x), logits), weights)
            with torch.no_grad():
                for weight, slope in zip(weights, slopes, strict=True):
                    weight -= 0.1 * slope
        return weights

    live = (sampler(x, sample_ids=ids, step=step) for step, (ids, x) in enumerate(batches()))
    one = train((made.x, made.teacher_logits) for made in live)
    rows = (data.read(keys=[(int(i), 0, step) for i in ids]) for step, (ids, _) in enumerate(batches()))
    two = train((row.x, row.labels) for row in rows)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_another_provenance_is_refused_by_name(tmp_path: Path) -> None:
    gradient, student = sampler_for("gradient"), toys.student()
    synthesize(tmp_path, sampler=gradient, student=student, loader=batches(6))
    other = tgt.Teacher(toys.vector_teacher().encoder, toys.vector_teacher().decoder, toys.labeler(9), prior="normal")
    decoder = tgt.Teacher(toys.vector_teacher().encoder, torch.nn.Linear(4, 8), toys.labeler(), prior="normal")
    options = {"sigma": 0.5, "units": "absolute", "seed": 3, "steps": 2}
    refused: list[tuple[str, dict[str, Any]]] = [
        (r"they differ in sigma \(stored 0.5, given 0.25\)", {"sampler": sampler_for("gradient", sigma=0.25)}),
        (r"differ in seed", {"sampler": sampler_for("gradient", seed=4)}),
        (r"mode \(stored gradient, given random\)", {"sampler": sampler_for()}),
        (r"differ in steps", {"sampler": sampler_for("gradient", steps=3)}),
        (r"differ in temperature", {"sampler": sampler_for("gradient", temperature=2.0)}),
        (r"score_code \(stored none, given", {"sampler": sampler_for("gradient", score=tgt.scores.entropy)}),
        (r"differ in student_weights", {"student": toys.student(8)}),
        (r"differ in teacher_weights", {"sampler": tgt.LatentSampler(other, "gradient", **options)}),
        (r"teacher_weights", {"sampler": tgt.LatentSampler(decoder, "gradient", **options)}),
        (r"differ in k \(stored None, given 2\)", {"k": 2}),
        (r"differ in latents", {"latents": True}),
    ]
    for words, given in refused:
        with pytest.raises(StaleCacheError, match=words):
            synthesize(tmp_path, **{"sampler": gradient, "student": student, "loader": batches(6), **given})
    with pytest.raises(CacheError, match="holds a set of synthetic examples, and no teacher cache"):
        tgt.TeacherCache.open(tmp_path)
    with tgt.TeacherCache(tmp_path / "cache", toys.labeler(), k=None) as cache:
        cache.label(X, IDS)
    for open_it in (tgt.SyntheticDataset, synthesize):
        with pytest.raises(CacheError, match="holds a teacher cache, and no set of synthetic examples"):
            open_it(tmp_path / "cache")
    with pytest.raises(CacheError, match="there is no set of synthetic examples"):
        tgt.SyntheticDataset(tmp_path / "nothing")


def test_arguments_that_cannot_be(tmp_path: Path) -> None:
    standard = tgt.LatentSampler(toys.vector_teacher())
    any_width = tgt.LatentSampler(tgt.Teacher(lambda x: x, lambda z: z, lambda x: x[:, :3]), units="absolute")
    two_widths = {"sampler": any_width, "loader": [(IDS[:2], X[:2]), (IDS[2:4], X[2:4, 1:])]}
    cases: list[tuple[str, type[TgtError], dict[str, Any]]] = [
        ("sampler must be a tgt_fast.LatentSampler, got Teacher", ArgumentError, {"sampler": toys.vector_teacher()}),
        ("persistent chains move", ArgumentError, {"sampler": sampler_for("persistent")}),
        ("replicas=1, but the sampler has replicas=2", ArgumentError, {"sampler": sampler_for(replicas=2)}),
        (r"call sampler.calibrate\(loader\) first", ArgumentError, {"sampler": standard}),
        ("pass student=", ArgumentError, {"sampler": sampler_for("gradient")}),
        ("k=4, but there are 3 classes", ArgumentError, {"k": 4}),
        ("step must be", ArgumentError, {"step": 2**28}),
        ("replicas must be", ArgumentError, {"replicas": 0}),
        ("copies of each other", ArgumentError, {"sampler": sampler_for(sigma=0.0), "replicas": 2}),
        ("format must be", ArgumentError, {"format": "csv"}),
        ("memory maps, so in a folder; give 's3://", ArgumentError, {"folder": "s3://bucket/folder"}),
        ("shard_bytes must be", ArgumentError, {"shard_bytes": 0}),
        ("latents must be True or False", ArgumentError, {"latents": 1}),
        ("filters must be", ArgumentError, {"filters": {"max_entropy": 1.0}}),
        ("needs ids", ArgumentError, {"loader": [X]}),
        (r"all rows of a set .* differ in x: float32 \(8,\) and float32 \(7,\)", ShapeError, two_widths),
    ]
    for number, (words, kind, given) in enumerate(cases):
        with pytest.raises(kind, match=words):
            synthesize(**{"folder": tmp_path / str(number), **given})
    for bad in ({"max_entropy": -1}, {"min_agreement": 2}, {"max_distance": float("nan")}, {"second": abs}):
        with pytest.raises(ArgumentError, match="Filters"):
            Filters(**bad)


def test_an_id_is_one_example(tmp_path: Path) -> None:
    twice = torch.cat([IDS[:3], IDS[:3]])
    told = synthesize(tmp_path, loader=[(twice, torch.cat([X[:3], X[:3]])), (IDS[:3], X[:3])], replicas=2)
    assert (told.computed, told.found) == (6, 6)
    assert len(tgt.SyntheticDataset(tmp_path)) == 6


def test_keys_are_in_the_order_of_their_numbers() -> None:
    draw = np.random.default_rng(0)
    most = np.array([2**48, 2**16, 2**28])
    numbers = np.concatenate([draw.integers(0, most, (500, 3)), draw.integers(0, 3, (100, 3)), (most - 1)[None]])
    packed = SYNTHETIC.pack(numbers)
    assert packed.dtype == SYNTHETIC.dtype
    assert np.array_equal(SYNTHETIC.unpack(packed), numbers)
    in_order = [list(row) for row in sorted({tuple(row) for row in numbers.tolist()})]
    assert SYNTHETIC.unpack(np.unique(packed)).tolist() == in_order
    alone = SAMPLES.pack(numbers[:, :1])
    assert alone.dtype == np.int64
    assert np.array_equal(SAMPLES.unpack(alone)[:, 0], numbers[:, 0])


@pytest.mark.parametrize("mode", ["random", "gradient"])
def test_beside_real_data_stored_rows_train_as_live_exploration_does(
    tmp_path: Path, mode: str, one_thread: None
) -> None:
    y = torch.arange(ROWS) % toys.CLASSES
    frozen = toys.student(5)  # that gradient mode climbs away from: the same at each step
    for step in range(4):
        loader = [(IDS[step * BATCH :][:BATCH], X[step * BATCH :][:BATCH])]
        asked = frozen if mode == "gradient" else None
        synthesize(tmp_path, sampler=sampler_for(mode), loader=loader, step=step, student=asked, replicas=2)
    sampler, replay = sampler_for(mode, replicas=2), tgt.SyntheticDataset(tmp_path).as_replay(replicas=2)
    teacher = sampler.teacher

    def live(x: Tensor, *, student: Any, **given: Any) -> tgt.Synthetic:
        return sampler(x, student=frozen, **given)

    live.calibrate, live.options, live.encodes = None, None, False  # type: ignore[attr-defined]
    for step in range(4):
        ids, x = IDS[step * BATCH :][:BATCH], X[step * BATCH :][:BATCH]
        one, two = live(x, student=None, sample_ids=ids, step=step), replay(x, sample_ids=ids, step=step)
        assert torch.equal(one.x, two.x)
        assert torch.equal(one.teacher_logits, two.teacher_logits)
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(two.anchor_ids, ids.repeat(2))

    def train(made_by: Any) -> list[Tensor]:
        student = toys.student().eval()
        weights = list(student.parameters())
        objective = tgt.TGTObjective(teacher, made_by)
        for step in range(4):
            rows = slice(step * BATCH, (step + 1) * BATCH)
            given = {"sample_ids": IDS[rows], "step": step}
            slopes = torch.autograd.grad(objective(student, X[rows], y[rows], **given)["loss"], weights)
            with torch.no_grad():
                for weight, slope in zip(weights, slopes, strict=True):
                    weight -= 0.1 * slope
        return weights

    assert all(torch.equal(a, b) for a, b in zip(train(live), train(replay), strict=True))


def test_stored_rows_are_served_in_turn(tmp_path: Path) -> None:
    synthesize(tmp_path, replicas=3, latents=True)
    data = tgt.SyntheticDataset(tmp_path)
    replay = data.as_replay()
    for step, replica in ((0, 0), (1, 1), (2, 2), (3, 0)):
        made = replay(X[:4], sample_ids=IDS[:4])  # counts its steps
        rows = data.read(keys=[(int(i), replica, 0) for i in IDS[:4]])
        assert torch.equal(made.x, rows.x), step
        assert torch.equal(made.latents.z, rows.latents.z)
    saved = replay.state_dict()
    following = replay(X[:5])
    assert torch.equal(following.ids, IDS.sort().values[:5])
    other = data.as_replay()
    other.load_state_dict(saved)
    assert torch.equal(other(X[:5]).x, following.x)
    assert other.calibrate() is other
    with pytest.raises(UnknownIdError, match="holds no example of 1 ids, such as 5"):
        replay(X[:2], sample_ids=torch.tensor([5, int(IDS[0])]))
    for state in ({}, {**saved, "fingerprint": "another"}, {**saved, "step": -1}):
        with pytest.raises(CheckpointError, match="StoredReplay"):
            replay.load_state_dict(state)
    synthesize(tmp_path / "records", k=2)
    with pytest.raises(ArgumentError, match="are records of 2 classes"):
        tgt.SyntheticDataset(tmp_path / "records").as_replay()
    synthesize(tmp_path / "some", filters=Filters(max_entropy=1.09))
    some = tgt.SyntheticDataset(tmp_path / "some")
    kept = set(some.keys[:, 0].tolist())
    served = some.as_replay()(X, sample_ids=IDS, step=0)
    assert set(served.ids.tolist()) <= kept
    assert all(int(i) == int(j) for i, j in zip(IDS, served.ids, strict=True) if int(i) in kept)


def test_fit_takes_stored_rows_and_pictures_are_shown(tmp_path: Path) -> None:
    teacher = toys.image_teacher()
    x, ids = toys.normal(8, 1, 8, 8), torch.arange(8)
    sampler = tgt.LatentSampler(teacher, sigma=0.5, units="absolute")
    tgt.synthesize(sampler, [(ids, x)], tmp_path / "rows", progress=False)
    data = tgt.SyntheticDataset(tmp_path / "rows")
    assert tgt.report.save_grid(data, tmp_path / "grid.png", most=4).stat().st_size > 100
    student = toys.seeded(lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, toys.CLASSES)), 0)
    result = tgt.fit(
        student, tgt.TGTObjective(teacher, data.as_replay()), [(ids, x, ids % toys.CLASSES)],
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1), steps=2, progress=False,
        checkpoint_dir=tmp_path / "run", checkpoint_every=1,
    )  # fmt: skip
    assert result.steps == 2
