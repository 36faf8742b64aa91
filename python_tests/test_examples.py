"""The runnable examples, each with a few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the tests run outside a checkout")


def example(name: str, *packages: str) -> Any:
    """The module of an example, if the packages that it needs are there."""
    for package in packages:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_transformers() -> None:
    losses = example("distill_transformers", "transformers", "accelerate").main(steps=8)
    assert losses["after"] < losses["before"]


def test_guided_transformers() -> None:
    losses = example("guided_transformers", "transformers", "accelerate").main(steps=12)
    assert losses["after"] < losses["before"]


def test_lightning() -> None:
    accuracy = example("guided_lightning", "lightning").main(epochs=12)
    assert accuracy["after"] > accuracy["before"] + 0.2


def test_long_tail_images(tmp_path: Path) -> None:
    images = example("long_tail_images", "PIL")
    found = images.main(tmp_path, *images.drawn_images(tmp_path), steps=40, workers=1)
    assert found.keys() == {"all", "many", "medium", "few"}
    assert found["all"] > 0.4  # of five classes
