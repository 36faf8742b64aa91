"""The recipes of ``tgt-fast demo digits --with``: each trains, and the demo shows it beside its own methods."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from tgt_fast.demos.digits import data, page, results, run, teachers
from tgt_fast.demos.digits.cooking import train_recipe
from tgt_fast.demos.digits.recipes import RECIPES
from tgt_fast.demos.digits.settings import METHODS, Settings
from tgt_fast.demos.digits.tail_recipes import tail_options
from tgt_fast.errors import ArgumentError
from tgt_fast.teacher import Teacher

ROOT = Path(__file__).parent.parent
TINY = Settings(vae_steps=3, labeler_steps=3, steps=3, evaluations=1, vae_hidden=16, labeler_width=2, real=8)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    pool, _ = data.load_digits()
    return teachers.TeacherWeights(*teachers.train_vae(pool, TINY, 0), teachers.train_labeler(pool, TINY, 0)).build(
        TINY
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(name: str, teacher: Teacher) -> None:
    pool, test = data.load_digits()
    images = data.long_tailed(pool, data.class_counts(), 0)
    found = train_recipe(name, teacher, images, test, data.class_counts(), TINY, 0)
    assert found.method == name
    assert math.isfinite(found.mean_kl)
    assert 0 <= found.accuracy <= 100


def test_numbers_that_are_said_to_be_chosen_did_best_on_the_validation_split() -> None:
    folder = ROOT / "benchmarks" / "results"
    made, tried = (
        json.loads((folder / f"{name}.json").read_text())["students"]
        for name in ("methods-digits", "methods-digits-tuning")
    )
    assert list(made) == list(RECIPES)
    for name, recipe in RECIPES.items():
        number = recipe.number
        assert made[name]["number"] == (None if number is None else [number.name, number.value]), name
        if made[name]["chosen"]:
            assert number is not None
            means = [one["mean"] for one in tried[name]["accuracy"]]
            assert number.value == tried[name]["best"] == number.tried[means.index(max(means))], name


def test_tail_options_grow_towards_the_tail() -> None:
    found = tail_options(torch.tensor([40, 4, 1]), 1.0, power=0.5, most=2.0)
    assert found["sigma"].tolist() == pytest.approx([1.0, 2 ** (math.log(10) / math.log(40)), 2.0])
    assert found["anchors"].tolist() == pytest.approx([40**-0.5, 0.5, 1.0])


def test_the_demo_takes_recipes(tmp_path: Path) -> None:
    chosen = ("tau-norm", "logit-adjustment")
    result = run.run_demo((0,), TINY, recipes=chosen, workers=0)
    assert list(results.as_json(result)["methods"]) == [*METHODS, *chosen]
    html = page.write_page(result, tmp_path).read_text(encoding="utf-8")
    assert all(RECIPES[name].label in html for name in chosen)
    assert run.checked_recipes(["all"]) == tuple(RECIPES)
    with pytest.raises(ArgumentError, match="there is no recipe 'x'; there are plain, "):
        run.run_demo((0,), TINY, recipes=["x"])
