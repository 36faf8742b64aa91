"""The runnable examples, each with a few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the tests run outside a checkout")


@pytest.fixture(autouse=True)
def quick_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that begins collects garbage, of all objects that the tests before have left: here it does not."""
    if importlib.util.find_spec("accelerate") is not None:
        monkeypatch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: 0))


def forget_accelerator() -> None:
    """Drop what a trainer of another test has left."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


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


def test_accelerate() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    forget_accelerator()
    main = example("distill_accelerate", "transformers", "accelerate").main
    history, weights = main(size=16, accumulate=1, epochs=1)
    split, others = main(size=4, accumulate=4, epochs=1)
    assert history[-1] < history[0]
    assert split == pytest.approx(history, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_on_policy(divergence: str) -> None:
    made = example("on_policy", "transformers")
    losses = made.main(steps=10, divergence=divergence)
    assert losses["after"] < losses["before"]
    prompts = torch.randint(3, 60, (6, 4))
    ids, labels = made.write(made.model(8, sharpness=30.0), prompts, 8)
    for row, said in zip(ids.tolist(), labels.tolist(), strict=True):
        written = row[4:]
        own = written[: written.index(made.END) + 1] if made.END in written else written
        assert [token for token in said if token != -100] == own
        assert said[3 : 3 + len(own)] == own


def test_other_context() -> None:
    made = example("other_context", "transformers")
    losses = made.main(steps=15)
    assert losses["after"] < losses["before"]
    contexts, answers = [torch.tensor([5, 6]), torch.tensor([7])], [torch.tensor([8]), torch.tensor([9, 10])]
    ids, rows = made.behind(contexts, answers)
    assert ids.flatten()[rows + 1].tolist() == torch.cat(answers).tolist()
