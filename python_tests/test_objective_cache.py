"""Labels and latents of real examples out of a cache: the same step, without the teacher's work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from training_kit import CLASSES, FEATURES, LATENT, Augmented, make_data, make_run, make_student

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.teacher import Latents

BATCHES = 3


class Counted(nn.Module):
    """A linear part that counts the rows it is asked."""

    def __init__(self, inputs: int, outputs: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(inputs, outputs, generator=generator) / inputs**0.5)
        self.__dict__["rows"] = [0]  # a list of this object, which a fingerprint would read: see version=

    def forward(self, x: Tensor) -> Tensor:
        self.rows[0] += len(x)
        return x @ self.weight


class Parts:
    def __init__(self, seed: int = 0, **options: Any) -> None:
        self.encoder, self.decoder = Counted(FEATURES, LATENT, seed), Counted(LATENT, FEATURES, seed + 1)
        self.labeler = Counted(FEATURES, CLASSES, seed + 2)
        self.teacher = tgt.Teacher(self.encoder, self.decoder, self.labeler, prior="normal", **options)

    def asked(self) -> tuple[int, int]:
        """Rows that encoder and labeler were asked since the last look."""
        found = self.encoder.rows[0], self.labeler.rows[0]
        self.encoder.rows[0] = self.labeler.rows[0] = 0
        return found


def cache_of(parts: Parts, folder: Path, **options: Any) -> tgt.TeacherCache:
    return tgt.TeacherCache(folder, parts.teacher, version="1", **{"k": None, "latents": True, **options})


def sampler_of(teacher: tgt.Teacher, mode: str = "random", **options: Any) -> tgt.LatentSampler:
    return tgt.LatentSampler(teacher, mode=mode, sigma=0.5, **{"units": "absolute", **options})


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    x, y = make_data(4 * BATCHES)
    return [(torch.arange(at, at + 4), x[at : at + 4], y[at : at + 4]) for at in range(0, 4 * BATCHES, 4)]


def losses(objective: tgt.TGTObjective, student: nn.Module) -> list[Tensor]:
    torch.manual_seed(0)
    return [objective(student, x, y, sample_ids=ids)["loss"].detach() for ids, x, y in batches()]


@pytest.mark.parametrize("mode", ["random", "gradient", "persistent", "prior"])
def test_the_second_epoch_asks_neither_encoder_nor_labeler(mode: str, tmp_path: Path) -> None:
    parts, student, rows = Parts(), make_student(batch_norm=False), 4 * BATCHES
    plain = tgt.TGTObjective(parts.teacher, sampler_of(parts.teacher, mode))
    expected = losses(plain, student) + losses(plain, student)
    of_sampler = parts.asked()[1] - 2 * rows  # the labels of synthetic examples
    with cache_of(parts, tmp_path) as cache:
        objective = tgt.TGTObjective(parts.teacher, sampler_of(parts.teacher, mode), cache=cache)
        first = losses(objective, student)
        assert parts.asked() == (rows, rows + of_sampler // 2)
        second = losses(objective, student)
        assert parts.asked() == (0, of_sampler // 2)
    assert all(torch.equal(a, b) for a, b in zip(first + second, expected, strict=True))
    assert not torch.equal(expected[0], expected[BATCHES])  # the noise of another step


def test_without_latents_or_a_sampler_labels_alone_are_kept(tmp_path: Path) -> None:
    parts, student, rows = Parts(), make_student(batch_norm=False), 4 * BATCHES
    with cache_of(parts, tmp_path / "a", latents=False) as cache:
        objective = tgt.TGTObjective(parts.teacher, sampler_of(parts.teacher), cache=cache)
        losses(objective, student)
        parts.asked()
        losses(objective, student)
        assert parts.asked() == (rows, rows)
        objective.sampler = None
        losses(objective, student)
        assert parts.asked() == (0, 0)
        objective.cache = None  # which counts from the next call on
        losses(objective, student)
        assert parts.asked() == (0, rows)
    with tgt.TeacherCache.open(tmp_path / "a") as opened:
        losses(tgt.TGTObjective(parts.teacher, cache=opened), student)
    assert parts.asked() == (0, 0)


def test_records_are_what_the_loss_sees(tmp_path: Path) -> None:
    parts, student = Parts(), make_student(batch_norm=False, dropout=0.0)
    ids, x, y = batches()[0]
    with cache_of(parts, tmp_path, k=2, temperature=2.0) as cache:
        objective = tgt.TGTObjective(parts.teacher, sampler_of(parts.teacher), cache=cache)
        made = objective(student, x, y, sample_ids=ids)
        record = tgt.topk_teacher(parts.teacher.label(x), 2, 2.0)
        soft = tgt.DistillationLoss(temperature=2.0)(student(x), record)
        torch.testing.assert_close(made["parts"]["soft"], soft.detach())
        objective.loss.temperature = 3.0
        with pytest.raises(ArgumentError, match="temperature"):
            objective(student, x, y, sample_ids=ids)


@pytest.mark.parametrize("combine", ["probabilities", "per_teacher"])
def test_an_ensembles_cache(combine: str, tmp_path: Path) -> None:
    one, two = Parts(), Parts(seed=5)
    both = tgt.TeacherEnsemble({"one": one.teacher, "two": two.teacher}, combine=combine, generator="two")
    student = make_student(batch_norm=False)
    plain = tgt.TGTObjective(both, sampler_of(both))
    expected = losses(plain, student) + losses(plain, student)
    with tgt.cache.EnsembleCache(tmp_path, both, latents=True, version="1") as cache:
        objective = tgt.TGTObjective(both, sampler_of(both), cache=cache)
        found = losses(objective, student)
        one.asked(), two.asked()
        found += losses(objective, student)
    assert (one.asked()[0], two.asked()[0]) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if combine == "per_teacher":
        with (
            tgt.TeacherCache(tmp_path / "whole", both, version="1") as whole,
            pytest.raises(ArgumentError, match="Ens"),
        ):
            tgt.TGTObjective(both, cache=whole)


def test_what_cannot_come_from_a_cache_is_refused(tmp_path: Path) -> None:
    parts, student = Parts(), make_student(batch_norm=False)
    ids, x, y = batches()[0]
    with cache_of(parts, tmp_path / "a") as cache:
        objective = tgt.TGTObjective(parts.teacher, sampler_of(parts.teacher), cache=cache)
        with pytest.raises(ArgumentError, match="sample ids"):
            objective(student, x, y)
        objective(student, x, y, sample_ids=ids)
        with pytest.raises(ArgumentError, match="sample 2 is other data"):
            objective(student, x + (ids == 2)[:, None] * 0.1, y, sample_ids=ids)
        with pytest.raises(ArgumentError, match="other weights"):
            tgt.TGTObjective(Parts(seed=7).teacher, cache=cache)
        assert tgt.TGTObjective(Parts().teacher, cache=cache)(student, x, y, sample_ids=ids)  # another object, the same
    with pytest.raises(ArgumentError, match="cache must be a"):
        tgt.TGTObjective(parts.teacher, cache=str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="synthetic must be"):
        objective(student, x, y, synthetic=x)  # type: ignore[arg-type]


def test_fit_and_calibration_go_by_the_cache(tmp_path: Path) -> None:
    """Weights after several epochs are the same, and rows are on the disk when a checkpoint is."""
    found = []
    for cached in (False, True):
        parts = Parts()
        run = make_run(None, loader=[batches()[0], batches()[1]])
        cache = cache_of(parts, tmp_path / "cache") if cached else None
        sampler = sampler_of(parts.teacher, units="std", anchors="balanced")
        unlabeled = [(ids, x) for ids, x, _ in batches()[:2]]
        sampler.calibrate(unlabeled, cache=cache, columns=(0, 1, None))
        run["objective"] = tgt.TGTObjective(parts.teacher, sampler, cache=cache)
        parts.asked()
        tgt.fit(**run, steps=6, checkpoint_dir=tmp_path / f"run{cached}")
        if cached:
            assert parts.asked() == (0, 24)
            assert len(tgt.TeacherCache.open(tmp_path / "cache")) == 8
            sampler_of(parts.teacher).calibrate(unlabeled, cache=cache, columns=(0, 1, None))
            assert parts.asked() == (0, 0)
            with pytest.raises(ArgumentError, match="sample ids"):
                sampler.calibrate([x for _, x in unlabeled], cache=cache)
        found.append(run["student"].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))


def test_augmented_data_stop_a_fit(tmp_path: Path) -> None:
    parts = Parts()
    with cache_of(parts, tmp_path) as cache:
        run = make_run(None, loader=torch.utils.data.DataLoader(Augmented(), batch_size=11))
        run["objective"] = tgt.TGTObjective(parts.teacher, sampler_of(parts.teacher), cache=cache)
        with pytest.raises(ArgumentError, match="augmented"):
            tgt.fit(**run, steps=3)


def test_ready_examples_take_the_samplers_place() -> None:
    parts, student = Parts(), make_student(batch_norm=False, dropout=0.0)
    ids, x, y = batches()[0]
    sampler = sampler_of(parts.teacher)
    made = sampler(x, sample_ids=ids, step=3, latents=parts.teacher.encode(x))
    parts.asked()
    ready = tgt.TGTObjective(parts.teacher)(student, x, y, synthetic=made)
    assert parts.asked() == (0, 4)
    whole = tgt.TGTObjective(parts.teacher, sampler)(student, x, y, sample_ids=ids, step=3)
    assert torch.equal(ready["loss"], whole["loss"])
    assert ready["parts"]["synthetic"] > 0
    off = tgt.TGTObjective(parts.teacher, synthetic_weight=0.0)(student, x, y, synthetic=made)
    assert off["parts"]["synthetic"] == 0


def test_latents_of_a_call_are_checked() -> None:
    parts = Parts()
    x, _ = make_data(4)
    sampler = sampler_of(parts.teacher)
    z = parts.teacher.encode(x).z
    assert torch.equal(sampler(x, step=0, latents=z).x, sampler(x, step=0, sample_ids=torch.arange(4)).x)
    with pytest.raises(ShapeError, match="batch=4"):
        sampler(x, latents=Latents(z[:3]))
    with pytest.raises(DTypeError, match="Latents"):
        sampler(x, latents=z.tolist())  # type: ignore[arg-type]


def test_a_cache_keeps_what_latents_were_encoded_from(tmp_path: Path) -> None:
    x = torch.randn(3, FEATURES)
    mask, source = torch.ones(3, 2, dtype=torch.bool), torch.arange(6).reshape(3, 2)
    given = Latents(torch.randn(3, 2, LATENT), mask, source)
    with tgt.TeacherCache(tmp_path, version="1", k=None, latents=True) as cache:
        cache.add([1, 2, 3], torch.randn(3, CLASSES), given)
        found = cache.encode(x, [1, 2, 3])
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(given), strict=True))
