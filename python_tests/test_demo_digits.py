"""The digits demo: its data, its parts, and a tiny run from end to end."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from tgt_fast.demos import networks
from tgt_fast.demos.digits import (
    data,
    diagnostics,
    findings,
    methods,
    models,
    page,
    results,
    run,
    teachers,
    tune,
)
from tgt_fast.demos.digits.augment import Augmentation, shifted, warped
from tgt_fast.demos.digits.methods import StudentResult
from tgt_fast.demos.digits.results import DemoResult
from tgt_fast.demos.digits.settings import METHODS, Settings, quick
from tgt_fast.errors import ArgumentError, ShapeError

TINY = Settings(vae_steps=3, labeler_steps=3, steps=4, evaluations=2, vae_hidden=16, labeler_width=2)


@pytest.fixture(scope="module")
def split() -> tuple[data.Images, data.Images]:
    return data.load_digits()


@pytest.fixture(scope="module")
def tiny() -> DemoResult:
    return run.run_demo((1, 0), TINY, workers=0)


def rows(images: data.Images) -> set[bytes]:
    return {row.numpy().tobytes() for row in images.x}


def test_the_split_is_900_to_897_even_and_disjoint(split: tuple[data.Images, data.Images]) -> None:
    pool, test = split
    assert (len(pool), len(test)) == (900, 897)
    assert pool.y.bincount().tolist() == [90] * 10
    assert not rows(pool) & rows(test)
    assert pool.x.min() == 0
    assert pool.x.max() == 1
    again = data.load_digits()
    assert torch.equal(pool.x, again[0].x)
    assert torch.equal(test.y, again[1].y)


def test_the_validation_split_holds_no_test_image(split: tuple[data.Images, data.Images]) -> None:
    pool, test = split
    fit, validation = data.validation_split(pool)
    assert fit.y.bincount().tolist() == [60] * 10
    assert validation.y.bincount().tolist() == [30] * 10
    assert not rows(fit) & rows(validation)
    assert rows(fit) | rows(validation) == rows(pool)
    assert not (rows(fit) | rows(validation)) & rows(test)


def test_labels_are_long_tailed_and_nested(split: tuple[data.Images, data.Images]) -> None:
    pool, _ = split
    counts = data.class_counts()
    assert counts == [40, 27, 18, 12, 8, 5, 3, 2, 2, 1]
    few, some, everything = (data.long_tailed(pool, data.class_counts(f), seed=3) for f in (0.5, 1.0, 1000.0))
    assert some.y.bincount().tolist() == counts
    assert sum(counts) == len(some) == 118
    assert rows(few) < rows(some) < rows(everything) == rows(pool)
    assert rows(some) != rows(data.long_tailed(pool, counts, seed=4))


@pytest.mark.parametrize(("size", "total"), [(64, 118), (118, 118), (128, 118), (64, 20)])
def test_batches_show_each_example_as_equally_often_as_can_be(
    split: tuple[data.Images, data.Images], size: int, total: int
) -> None:
    images = split[0].take(torch.arange(total))
    batches = list(data.Batches(images, size, count=3, seed=0))
    assert len(batches) == 3
    for ids, x, y in batches:
        assert len(ids) == len(x) == len(y) == size
        assert len(set(ids.tolist())) == size  # a copy has an id, and so noise, of its own
        times = (ids % total).bincount(minlength=total)
        assert int(times.max() - times.min()) <= 1
        assert torch.equal(x, images.x[ids % total])
        assert torch.equal(y, images.y[ids % total])
    assert not torch.equal(batches[0][0], batches[1][0])
    again = list(data.Batches(images, size, count=3, seed=0))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))


def test_shifts_move_by_at_most_a_pixel() -> None:
    image = torch.zeros(200, 8, 8)
    image[:, 3, 4] = 1.0
    moved = shifted(image.reshape(200, 64), models.seeded(0)).view(200, 8, 8)
    places = moved.nonzero()[:, 1:]
    assert len(places) == 200
    assert {(r - 3, c - 4) for r, c in places.tolist()} == {(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)}


def test_warps_keep_the_rest_and_the_range(split: tuple[data.Images, data.Images]) -> None:
    x = split[0].x[:200]
    none, half = warped(x, models.seeded(0), share=0.0), warped(x, models.seeded(0), share=0.5)
    assert torch.equal(none, x)
    kept = (half == x).all(1).sum().item()
    assert 70 < kept < 130
    assert half.min() >= 0
    assert half.max() <= 1


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(shift=True), Augmentation(warp=True, mixup=True), Augmentation(mixup=True, noise=0.3, clip=True)],
    ids=str,
)
def test_augmentations_are_images_and_repeatable(
    split: tuple[data.Images, data.Images], augmentation: Augmentation
) -> None:
    x = split[0].x[:50]
    made = augmentation(x, models.seeded(0))
    assert made.shape == x.shape
    assert not torch.equal(made, x)
    assert made.min() >= 0
    assert made.max() <= 1
    assert torch.equal(made, augmentation(x, models.seeded(0)))


def test_mixup_lies_between_two_images_of_the_batch() -> None:
    x = torch.cat([torch.zeros(32, 64), torch.ones(32, 64)])
    made = Augmentation(mixup=True)(x, models.seeded(0))
    assert torch.equal(made.amin(1), made.amax(1))  # one ratio an image
    assert ((made > 0) & (made < 1)).any()


def test_noise_has_its_strength() -> None:
    made = Augmentation(noise=0.3)(torch.zeros(500, 64), models.seeded(0))
    assert made.std().item() == pytest.approx(0.3, rel=0.03)
    assert str(Augmentation(shift=True, mixup=True, noise=0.3, clip=True)) == "shift + mixup + noise 0.3 clipped"


def test_the_student_is_the_one_described() -> None:
    assert networks.parameter_count(models.student()) == 64 * 24 + 24 + 24 * 10 + 10


def test_folding_batchnorm_keeps_the_function() -> None:
    torch.manual_seed(0)
    network = models.labeler(4).double()
    x = torch.rand(32, 64, dtype=torch.float64)
    network(x)  # moves the running statistics
    network.eval()
    before = network(x)
    folded = models.folded(network)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), before, rtol=1e-10, atol=1e-10)


def test_sliced_wasserstein_of_known_sets() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(40, 5), torch.randn(77, 5) + 1
    distance = diagnostics.sliced_wasserstein
    assert distance(a, a) == 0
    assert distance(a, a[torch.randperm(40)]) == pytest.approx(0, abs=1e-12)
    assert distance(a, a.repeat(3, 1)) == pytest.approx(0, abs=1e-12)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)
    assert distance(a, a + 2) == pytest.approx(2 * distance(a, a + 1), rel=1e-6)
    # On a line there is one direction up to its sign, and W_1 of equal counts matches the sorted points.
    left, right = torch.randn(30, 1), torch.randn(30, 1)
    expected = (left.sort(0).values - right.sort(0).values).abs().mean().item()
    assert distance(left, right) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ShapeError):
        distance(a, torch.randn(4, 6))


def test_a_tiny_run_has_everything(tiny: DemoResult) -> None:
    assert [(s.method, s.seed) for s in tiny.students] == [(m, seed) for m in METHODS for seed in (1, 0)]
    assert [t.seed for t in tiny.teachers] == [d.seed for d in tiny.diagnostics] == [1, 0]
    for student in tiny.students:
        assert 0 <= student.accuracy <= 100
        assert student.labels == 118
        assert [step for step, _ in student.curve] == [2, 4]
        assert student.curve[-1][1] == pytest.approx(student.accuracy)
        assert len(student.per_class) == 10
    for found in tiny.diagnostics:
        assert [row.source for row in found.sources][:2] == ["real, test", "real, labelled"]
        assert found.sources[0].wasserstein == 0
        assert all(len(path) == diagnostics.ASCENT_STEPS + 1 for path in found.ascent.values())
        assert all(len(pictures) == 10 for pictures in found.grid.values())


def numbers(result: DemoResult) -> list[object]:
    """Everything but the times."""
    students = [{k: v for k, v in vars(s).items() if k not in ("seconds", "weights")} for s in result.students]
    weights = [[v.tobytes() for v in s.weights.values()] for s in result.students]
    return [students, weights, [d.sources for d in result.diagnostics], [d.ascent for d in result.diagnostics]]


def test_the_numbers_do_not_depend_on_what_ran_before(tiny: DemoResult) -> None:
    """Nor on processes: test_demo_lm.py."""
    torch.manual_seed(12345)
    again = run.run_demo((0,), TINY, workers=0)
    alone = replace(
        tiny,
        students=tuple(s for s in tiny.students if s.seed == 0),
        diagnostics=tuple(d for d in tiny.diagnostics if d.seed == 0),
    )
    assert numbers(again) == numbers(alone)


def test_json_has_the_promised_form(tiny: DemoResult) -> None:
    content = results.as_json(tiny)
    assert set(content) >= {"methods", "versions", "seeds", "commit"}
    assert list(content["methods"]) == [
        "one-hot", "distillation", "distillation-augmented",
        "tgt-prior", "tgt-random", "tgt-gradient", "tgt-persistent",
    ]  # fmt: skip
    for method, entry in content["methods"].items():
        assert set(entry) >= {"accuracy", "head", "middle", "tail", "agreement", "mean_kl", "seconds"}
        assert set(entry["accuracy"]) == {"mean", "std", "per_seed"}
        a, b = entry["accuracy"]["per_seed"]
        assert (a, b) == tuple(s.accuracy for s in tiny.of(method)[:2])
        assert entry["accuracy"]["mean"] == pytest.approx((a + b) / 2)
        assert entry["accuracy"]["std"] == pytest.approx(abs(a - b) / math.sqrt(2))
    assert content["seeds"] == [1, 0]
    assert content["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|tgt-fast .+", content["commit"])


def test_the_page_shows_every_plot(tiny: DemoResult, tmp_path: Path) -> None:
    html = page.write_page(tiny, tmp_path).read_text(encoding="utf-8")
    names = ["accuracy", "learning", "classes", "exploration", "ascent", "diagnostics"]
    assert sorted(p.stem for p in tmp_path.glob("*.png")) == sorted(names)
    assert html.count("data:image/png;base64,") == len(names)
    for label in findings.LABELS.values():
        assert label in html


def test_the_curve_adds_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CURVE_FACTORS", (0.1, 1000.0))
    result = run.run_demo((0,), TINY, curve=True, workers=0)
    assert [labels for labels, _ in results.learning_curve(result, "one-hot")] == [
        sum(data.class_counts(0.1)),
        118,
        900,
    ]
    assert "sample_size_factors" in results.as_json(result)
    assert "labels" in page.write_page(result, tmp_path).read_text(encoding="utf-8")
    assert (tmp_path / "labels.png").exists()


def student(method: str, seed: int, accuracy: float, labels: int = 118) -> StudentResult:
    return StudentResult(
        method, seed, labels, accuracy, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, (0.0,) * 10, ((1, accuracy),), {}
    )


def result_of(accuracies: dict[str, Sequence[float]], curve: Sequence[StudentResult] = ()) -> DemoResult:
    seeds = tuple(range(len(next(iter(accuracies.values())))))
    students = tuple(student(m, s, values[s]) for m, values in accuracies.items() for s in seeds)
    return DemoResult(
        settings=Settings(), seeds=seeds, counts=tuple(data.class_counts()), teachers=(), students=students,
        diagnostics=(), curve=tuple(curve), seconds=1.0,
    )  # fmt: skip


def test_findings_say_what_helped_and_what_did_not() -> None:
    accuracies: dict[str, Sequence[float]] = dict.fromkeys(METHODS, (80.0, 81.0))
    accuracies |= {"tgt-gradient": (90.0, 92.0), "tgt-random": (91.0, 91.5), "tgt-persistent": (85.0, 85.0)}
    result = result_of(accuracies)
    assert result.lead("tgt-gradient", "distillation").mean == pytest.approx(10.5)
    said = findings.findings(result)
    assert "gained 10.5 points, in each of 2 seeds" in said[0]
    by_start = {sentence.split(",")[0]: sentence for sentence in said}
    assert "made no clear difference: -0.2 points" in by_start["The gradient step"]
    assert "lost 6.0 points, in each of 2 seeds: it did not help" in by_start["Persistent chains"]
    alone = findings.findings(result_of({m: (v[0],) for m, v in accuracies.items()}))
    assert all("decides nothing" in sentence for sentence in alone)
    assert "ahead of the prior" in findings.caption_of_prior(result)


def test_sample_factors_interpolate_over_log_labels() -> None:
    accuracies: dict[str, Sequence[float]] = dict.fromkeys(METHODS, (80.0,))
    accuracies["tgt-gradient"] = (90.0,)
    curve = [student("one-hot", 0, 85.0, 200), student("one-hot", 0, 95.0, 800), student("tgt-gradient", 0, 99.0, 800)]
    curve += [student("distillation", 0, 88.0, 800)]
    factors = {f.method: f for f in results.sample_factors(result_of(accuracies, curve))}
    assert factors["one-hot"].factor == pytest.approx(400 / 118)  # half way from 200 to 800 on a logarithmic axis
    assert not factors["one-hot"].beyond
    assert factors["distillation"].factor == pytest.approx(800 / 118)
    assert factors["distillation"].beyond


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,)])
def test_seeds_that_make_no_run_are_refused(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="seeds"):
        run.run_demo(seeds, TINY, workers=0)


def test_tuning_ranks_choices_on_the_validation_split() -> None:
    base = replace(TINY, steps=2)
    found = tune.tune(["prior"], [5, 6], workers=0, base=base)
    assert [len(row["per_seed"]) for row in found["prior"]] == [2] * 3
    ranked = [row["accuracy"] for row in found["prior"]]
    assert ranked == sorted(ranked, reverse=True)


def test_every_group_of_tuning_contains_the_chosen_settings() -> None:
    base = Settings()
    for group in tune.GROUPS:
        assert any(trial.settings == base for trial in tune.trials(group, base)), group
    assert len(tune.trials("augmentation", base)) == 77


def test_quick_settings_differ_in_steps_alone() -> None:
    full, short = vars(Settings()), vars(quick(Settings()))
    changed = {name for name in full if full[name] != short[name]}
    assert changed == {"vae_steps", "labeler_steps", "steps", "evaluations"}


def test_the_teacher_learns(split: tuple[data.Images, data.Images]) -> None:
    """A quarter of the steps makes a labeler that is right and a decoder that draws."""
    settings = replace(Settings(), vae_steps=300, labeler_steps=100)
    pool, test = split
    weights = teachers.TeacherWeights(*teachers.train_vae(pool, settings, 0), teachers.train_labeler(pool, settings, 0))
    teacher = weights.build(settings)
    quality = teachers.quality(teacher, test, 0)
    assert quality.labeler_accuracy > 90
    assert quality.reconstruction_error < 0.2
    images = data.long_tailed(pool, data.class_counts(), 0)
    explorer = methods.sampler("tgt-gradient", teacher, settings, 0).calibrate([images.x])
    made = explorer(images.x, student=models.student())
    assert made.x.shape == images.x.shape
    assert made.teacher_logits.shape == (118, 10)
