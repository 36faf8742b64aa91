"""The glyphs demo: fonts as packages, characters as pictures, its parts, and a tiny run from end to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from tgt_fast.demos.catalog import DEMOS
from tgt_fast.demos.digits.data import Images, long_tailed
from tgt_fast.demos.digits.methods import StudentResult
from tgt_fast.demos.glyphs import data, findings, fonts, methods, page, render, results, run, tune
from tgt_fast.demos.glyphs.augment import Augmentation, reweighted
from tgt_fast.demos.glyphs.fonts import Face, Family
from tgt_fast.demos.glyphs.results import DemoResult, Pictures
from tgt_fast.demos.glyphs.settings import BASELINES, BEST_TGT, METHODS, TGT_METHODS, Settings, quick
from tgt_fast.errors import ArgumentError

FILES = (
    Path(str(find_spec("matplotlib").origin)).parent / "mpl-data" / "fonts" / "ttf"
)  # they stand for packages of fonts
OWN = {
    "Dejavu Sans": ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
    "Dejavu Serif": ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
    "Mono": ("DejaVuSansMono.ttf",),
    "Stix": ("STIXGeneral.ttf", "STIXGeneralBol.ttf"),
    "Sizes": ("STIXSizOneSymReg.ttf",),  # lacks letters
}
TINY = Settings(vae_steps=2, labeler_steps=2, steps=3, evaluations=1, vae_width=2, labeler_width=2, real=40)


@pytest.fixture(scope="module")
def split() -> data.Split:
    return data.load_glyphs([Family(n, "1", tuple(Face(str(FILES / f)) for f in fs)) for n, fs in OWN.items()])


@pytest.fixture(scope="module")
def tiny(split: data.Split) -> DemoResult:
    patch = pytest.MonkeyPatch()
    patch.setattr(run, "CURVE", {"one-hot": (0.1, run.ALL), "distillation": (run.ALL,), BEST_TGT: (0.1,)})
    result = run.run_demo((3,), TINY, workers=0, split=split, curve=True)
    patch.undo()
    return result


def package(folder: Path, name: str, described: object, files: Sequence[str]) -> None:
    """An installed font package, as such packages are."""
    module = f"fontpkg_{name.lower()}"
    (folder / module / "files").mkdir(parents=True)
    (folder / module / "__init__.py").write_text("raise RuntimeError('nothing of it need run')")
    (folder / module / "metadata.json").write_text(json.dumps(described))
    for file in files:
        shutil.copy(FILES / file, folder / module / "files")
    info = folder / f"{module}-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fontpkg-{name.lower()}\nVersion: 2.5\n")
    (info / "entry_points.txt").write_text(f"[fontpkg.family]\n{name.lower()} = {module}\n")


def described(
    name: str, files: Sequence[tuple[str, str, int | None]], axes: Sequence[object] = ()
) -> dict[str, object]:
    rows = [{"path": f"files/{f}", "style": s, "weight": w, "variable": w is None} for f, s, w in files]
    return {"family": name, "axes": list(axes), "files": rows}


def test_families_are_found_by_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")
    rows = [(names[1], "normal", 700), (names[0], "normal", 400), ("x.ttf", "italic", 400)]
    package(tmp_path, "Zwei", described("Zwei", rows), names)
    weight = {"tag": "wght", "min": 100.0, "max": 700.0}
    package(tmp_path, "Axis", described("Axis", [("a.ttf", "normal", None)], [weight]), ())
    package(tmp_path, "Slanted", described("Slanted", [("a.ttf", "italic", 400)]), ())
    package(tmp_path, "Broken", ["not", "described"], ())
    monkeypatch.setattr(fonts.metadata, "entry_points", lambda group: fonts_in(tmp_path, group))
    monkeypatch.syspath_prepend(str(tmp_path))
    found = fonts.installed()
    assert [(family.name, family.version) for family in found] == [("Axis", "2.5"), ("Zwei", "2.5")]
    assert [face.weight for face in found[0].faces] == [100, 300, 500, 700]
    assert [Path(face.file).name for face in found[1].faces] == list(names)  # from light to bold, upright alone


def fonts_in(folder: Path, group: str) -> list[object]:
    from importlib import metadata

    return [e for d in metadata.distributions(path=[str(folder)]) for e in d.entry_points if e.group == group]


def test_without_font_packages_their_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts.metadata, "entry_points", lambda group: [])
    with pytest.raises(ArgumentError, match=r"found 0: pip install 'tgt-fast\[glyphs\]'"):
        fonts.installed()


def test_weights_are_spread_from_first_to_last() -> None:
    assert fonts.spread_over([1, 2, 3], 4) == [1, 2, 3]
    assert fonts.spread_over(list(range(100, 1000, 100)), 4) == [100, 400, 600, 900]


def test_characters_are_centred_cropped_and_at_full_contrast() -> None:
    made = render.pictures(Face(str(FILES / "DejaVuSans.ttf")))
    assert made is not None
    assert made.shape == (36, 28, 28)
    assert (made.reshape(36, -1).max(1) == 255).all()
    for picture in made:
        rows, columns = (np.flatnonzero(picture.any(axis)) for axis in (1, 0))
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == render.INSIDE
        assert abs(rows[0] - (27 - rows[-1])) <= 1
        assert abs(columns[0] - (27 - columns[-1])) <= 1


@pytest.mark.parametrize("lacking", ["AB\ue123", "AB ", "ABA"], ids=["no glyph", "no ink", "twice the same"])
def test_a_face_that_lacks_a_character_makes_none(lacking: str) -> None:
    face = Face(str(FILES / "DejaVuSans.ttf"))
    assert render.pictures(face, "AB") is not None
    assert render.pictures(face, lacking) is None


def test_what_is_no_font_makes_none(tmp_path: Path) -> None:
    (tmp_path / "a.ttf").write_bytes(b"\0" * 100)
    assert render.pictures(Face(str(tmp_path / "a.ttf"))) is None
    assert render.pictures(Face(str(tmp_path / "b.ttf"))) is None
    assert render.pictures(Face(str(FILES / "DejaVuSans.ttf"), weight=700)) is None  # it has no such axis


def test_families_are_whole_and_relatives_together(split: data.Split) -> None:
    assert split.left_out == ("Sizes",)
    pool, test = set(split.pool.names), set(split.test.names)
    assert pool | test == set(OWN) - {"Sizes"}
    assert not pool & test
    assert len(pool & {"Dejavu Sans", "Dejavu Serif"}) in (0, 2)
    for part in (split.pool, split.test):
        assert part.images.x.shape[1:] == (1, 28, 28)
        counts = [int((part.family == place).sum()) for place in range(len(part.names))]
        assert counts == [36 * len(OWN[name]) for name in part.names]
        assert len(part.images) == sum(counts)
    whole = data.Typefaces(*together(split))
    again = whole.of(split.test.names)
    assert torch.equal(again.images.x, split.test.images.x)
    assert torch.equal(again.family, split.test.family)


def together(split: data.Split) -> tuple[Images, torch.Tensor, tuple[str, ...]]:
    first, second = split.pool, split.test
    images = Images(torch.cat([first.images.x, second.images.x]), torch.cat([first.images.y, second.images.y]))
    return images, torch.cat([first.family, second.family + len(first.names)]), first.names + second.names


def test_a_new_family_moves_few(split: data.Split) -> None:
    names = tuple(f"Family{n}" for n in range(110))
    one = Images(torch.zeros(110, 1, 1, 1), torch.zeros(110, dtype=torch.long))
    first, second = data.split(data.Typefaces(one, torch.arange(110), names), data.POOL_SHARE, "test")
    assert (len(first.names), len(second.names)) == (70, 40)
    fewer, _ = data.split(
        data.Typefaces(one.take(torch.arange(109)), torch.arange(109), names[:-1]), data.POOL_SHARE, "test"
    )
    assert len(set(fewer.names) - set(first.names)) <= 1
    with pytest.raises(ArgumentError, match="not relatives"):
        data.split(data.Typefaces(one, torch.zeros(110, dtype=torch.long), ("A B", "A C")), 0.5, "test")


def test_labels_are_312_and_long_tailed() -> None:
    counts = data.class_counts()
    assert (sum(counts), counts[0], counts[-1]) == (312, 30, 1)
    assert counts == sorted(counts, reverse=True)
    assert data.class_counts(1e6, 7) == [7] * 36


def test_balanced_rows_meet_each_class_alike(split: data.Split) -> None:
    images = long_tailed(split.pool.images, data.class_counts(0.1), seed=0)
    rows = data.Balanced(images, 0)(36_000)
    drawn = images.y[rows].bincount(minlength=36)
    assert drawn.min() > 850
    assert drawn.max() < 1150
    a, b = (list(data.BalancedBatches(images, 8, 2, seed=3)) for _ in range(2))
    assert all(torch.equal(x[1], y[1]) and torch.equal(x[2], images.y[x[0]]) for x, y in zip(a, b, strict=True))


def test_rare_classes_are_explored_more_often_and_further(split: data.Split) -> None:
    images = long_tailed(split.pool.images, [4, *[1] * 35], seed=0)
    options = methods.by_class(images, Settings(tail_weight=0.5, tail_sigma=0.3, sigma=2.0))
    assert options["anchors"].tolist() == pytest.approx([0.5, *[1.0] * 35])
    assert options["sigma"].tolist() == pytest.approx([2.0, *[2.6] * 35])


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(warp=1.0), Augmentation(elastic=0.1, weight=0.8), Augmentation(warp=0.5, mixup=True, noise=0.1)],
    ids=str,
)
def test_augmentations_are_images_and_repeatable(split: data.Split, augmentation: Augmentation) -> None:
    x = split.pool.images.x[:36]
    made = augmentation(x, torch.Generator().manual_seed(0))
    assert made.shape == x.shape
    assert not torch.equal(made, x)
    assert torch.equal(made, augmentation(x, torch.Generator().manual_seed(0)))
    if not augmentation.noise:
        assert made.min() >= 0
        assert made.max() <= 1 + 1e-6
    assert str(Augmentation()) == "none"


def test_strokes_get_bolder_and_thinner() -> None:
    x = torch.zeros(64, 1, 9, 9)
    x[:, :, 3:6] = 1.0
    ink = reweighted(x, torch.Generator().manual_seed(0), 1.0).sum((1, 2, 3)) / x[0].sum()
    assert 0.3 < ink.min() < 0.7
    assert 1.3 < ink.max() < 1.7


def test_a_tiny_run_has_everything(tiny: DemoResult, split: data.Split) -> None:
    assert [(s.method, s.seed) for s in tiny.students] == [(m, 3) for m in METHODS]
    assert [t.seed for t in tiny.teachers] == [d.seed for d in tiny.diagnostics] == [3]
    for student in tiny.students:
        assert 0 <= student.accuracy <= 100
        assert [step for step, _ in student.curve] == [3]
        assert student.curve[-1][1] == pytest.approx(student.accuracy)
    assert tiny.pictures.left_out == ("Sizes",)
    assert tiny.pictures.test_images == len(split.test.images)
    assert all(len(pictures) == 12 for found in tiny.diagnostics for pictures in found.grid.values())
    content = json.loads(json.dumps(results.as_json(tiny)))
    assert list(content["methods"]) == list(METHODS)
    assert content["methods"][BEST_TGT]["accuracy"]["per_seed"] == [tiny.of(BEST_TGT)[0].accuracy]
    assert content["leads"]["accuracy"]["over"] in BASELINES
    assert len(content["sample_size_factors"]) >= 1
    assert content["seeds"] == [3]


def test_the_numbers_do_not_depend_on_what_ran_before(tiny: DemoResult, split: data.Split) -> None:
    torch.manual_seed(12345)
    teacher = run.TeacherWeights(
        *run.teachers.train_vae(split.pool.images, TINY, 3), run.teachers.train_labeler(split.pool.images, TINY, 3)
    )
    _, theirs = run.quality_task(teacher, split.test.images, TINY, 3)
    images = long_tailed(split.pool.images, data.class_counts(), 3)
    for method in ("distillation-augmented", BEST_TGT):
        again = run.student_task(method, teacher, images, split.test.images, theirs, data.class_counts(), TINY, 3)
        before = tiny.of(method)[0]
        assert all(np.array_equal(again.weights[name], before.weights[name]) for name in before.weights)


def test_the_page_shows_every_plot(tiny: DemoResult, tmp_path: Path) -> None:
    html = page.write_page(tiny, tmp_path).read_text(encoding="utf-8")
    names = ["accuracy", "rare", "learning", "classes", "exploration", "diagnostics", "labels"]
    assert sorted(p.stem for p in tmp_path.glob("*.png")) == sorted(names)
    for label in findings.LABELS.values():
        assert label in html
    assert "Sizes lacks one" in html


def result_of(accuracies: dict[str, Sequence[float]], curve: Sequence[StudentResult] = ()) -> DemoResult:
    seeds = tuple(range(len(next(iter(accuracies.values())))))
    students = tuple(student(m, s, values[s]) for m, values in accuracies.items() for s in seeds)
    return DemoResult(
        settings=Settings(), seeds=seeds, pictures=Pictures(2, (), 1, 1, 36, 36), counts=tuple(data.class_counts()),
        teachers=(), students=students, diagnostics=(), curve=tuple(curve), seconds=1.0, processor_seconds=1.0,
    )  # fmt: skip


def student(method: str, seed: int, accuracy: float, labels: int = 312) -> StudentResult:
    return StudentResult(
        method, seed, labels, accuracy, 0.0, 0.0, accuracy - 20, 0.0, 0.0, 1.0, (0.0,) * 36, ((1, accuracy),), {}
    )


def test_findings_name_the_best_rival_and_what_did_not_help() -> None:
    accuracies: dict[str, Sequence[float]] = dict.fromkeys(METHODS, (80.0, 81.0))
    accuracies |= {BEST_TGT: (90.0, 92.0), "distillation-mixup": (84.0, 85.0), "tgt-prior": (70.0, 71.0)}
    said = findings.findings(result_of(accuracies))
    assert "(distillation, mixup): gained 6.5 points, in each of 2 seeds" in said[0]
    assert "rarest third" in said[1]
    assert "gained 6.5 points" in said[1]
    assert any(s.startswith("Sampling the prior") and "did not help" in s for s in said)


def test_sample_factors_have_a_spread() -> None:
    accuracies: dict[str, Sequence[float]] = dict.fromkeys(METHODS, (80.0, 80.0))
    accuracies[BEST_TGT] = (90.0, 85.0)
    curve = [student("one-hot", s, 90.0, 1248) for s in (0, 1)]
    curve += [student("distillation", s, 88.0, 1248) for s in (0, 1)]
    factors = {f.method: f for f in results.sample_factors(result_of(accuracies, curve))}
    assert factors["one-hot"].factors == pytest.approx((4.0, 2.0))  # half way, on a logarithmic axis
    assert factors["one-hot"].beyond == (False, False)
    assert factors["distillation"].beyond == (True, False)
    assert findings.times(factors["one-hot"]) == "3.0 (2.0 to 4.0 by seed)"
    assert findings.times(factors["distillation"]).startswith("more than 3.2")


def test_every_group_of_tuning_contains_the_chosen_settings(split: data.Split) -> None:
    base = Settings()
    for group in tune.GROUPS:
        chosen = tune.trials(group, base)
        assert any(trial.settings == base for trial in chosen), group
        assert len(chosen) <= 12
    assert set(METHODS) == set(BASELINES + TGT_METHODS) == set(findings.LABELS) == set(page.COLORS)


def test_tuning_sees_families_of_the_pool_alone(split: data.Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tune.GROUPS, "prior", ("tgt-prior", tune.each(prior_sigma=(0.8, 1.0))))
    whole = data.Typefaces(*together(split))
    pool, test = whole.of(["Mono", "Dejavu Serif", "Dejavu Sans"]), whole.of(["Stix"])
    found = tune.tune(["prior"], [5], workers=0, base=replace(TINY, steps=2), split=data.Split(pool, test, ()))
    assert [len(row["per_seed"]) for row in found["prior"]] == [1, 1]


def test_quick_settings_differ_in_steps_alone() -> None:
    full, short = vars(Settings()), vars(quick(Settings()))
    assert {name for name in full if full[name] != short[name]} == {
        "vae_steps", "labeler_steps", "steps", "evaluations",
    }  # fmt: skip


def test_the_extra_names_its_packages() -> None:
    demo = DEMOS["glyphs"]
    assert (demo.extra, demo.with_curve) == ("glyphs", True)
    assert BASELINES[:2] == methods.ALONE
