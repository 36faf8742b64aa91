"""A look at what a sampler makes: it changes nothing, and shows images, texts or why it cannot."""

from __future__ import annotations

import base64
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from torch import nn
from training_kit import assert_same_weights, make_run, score

import tgt_fast as tgt
from tgt_fast import report
from tgt_fast._png import grid, png
from tgt_fast.teacher.batches import Batch
from tgt_fast.train import probe as probing
from tgt_fast.train.pictures import images_of
from tgt_fast.train.probe import probe


def pixels(file: bytes) -> np.ndarray:
    """The contents of a PNG file of ours."""
    width, height = (int.from_bytes(file[at : at + 4], "big") for at in (16, 20))
    channels = {0: 1, 2: 3}[file[25]]
    at = file.index(b"IDAT")
    data = zlib.decompress(file[at + 4 : at + 4 + int.from_bytes(file[at - 4 : at], "big")])
    return np.frombuffer(data, np.uint8).reshape(height, -1)[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_its_pixels(channels: int) -> None:
    made = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    file = png(made)
    assert np.array_equal(pixels(file), made)
    Image = pytest.importorskip("PIL.Image")
    import io

    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))).reshape(made.shape), made)


def test_a_grid_has_every_tile_in_its_place() -> None:
    tiles = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(2, 1).repeat(3, 2)
    made = grid(tiles, columns=3, gap=1)
    assert made.shape == (2 * 3 + 1, 3 * 4 + 1, 1)
    assert made[1:3, 1:4].max() == 0
    assert (made[4:6, 5:8] == 4).all()
    assert (made[4:6, 9:] == 255).all()


def test_which_batches_are_images() -> None:
    of = images_of
    wide = torch.tensor([[-3.0, 5.0], [1.0, 1.0]])[None, None]
    assert [image.shape for image in of(torch.rand(2, 3, 4, 5))] == [(4, 5, 3)] * 2
    assert of(torch.rand(2, 6, 5, 3))[0].shape == (6, 5, 3)
    assert of(torch.rand(2, 4, 6, 5))[0].shape == (6, 5, 3)
    assert of(torch.rand(2, 6, 5))[0].shape == (6, 5, 1)
    assert of({"pixel_values": torch.rand(1, 1, 4, 4)}) is not None
    assert of(torch.rand(2, 64))[0].shape == (8, 8, 1)
    assert of(torch.full((1, 1, 2, 2), 0.5))[0].max() == 128
    assert of(torch.full((1, 1, 2, 2), -0.5))[0].max() == 64  # -1..1
    assert [of(wide)[0].min(), of(wide)[0].max()] == [0, 255]
    assert of(wide, like=torch.rand(1, 1, 2, 2))[0].max() == 255
    assert of(torch.full((1, 1, 2, 2), 7, dtype=torch.uint8))[0].max() == 7
    assert of(torch.rand(1, 3, 300, 200), most=96)[0].shape == (96, 64, 3)
    for other in (torch.randn(2, 64), torch.rand(2, 60), torch.rand(2, 4), torch.rand(2, 7, 4, 6), {}, None,
                  torch.randint(0, 9, (2, 64)), {"a": torch.rand(1, 4, 4), "b": torch.rand(1)}):  # fmt: skip
        assert of(other) is None


def classes(count: int) -> torch.Tensor:
    return torch.arange(count) % toys.CLASSES


@pytest.mark.parametrize("mode", ["random", "gradient", "persistent", "prior"])
def test_a_look_at_images_leaves_sampler_and_student_alone(mode: str) -> None:
    teacher = toys.image_teacher(prior="normal")
    student = toys.seeded(lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 3)), 3)
    sampler = tgt.LatentSampler(teacher, mode=mode, sigma=0.5, seed=3)
    batch = Batch(None, torch.rand(20, 1, 8, 8), classes(20))
    before, state, numbers = toys.snapshot(student), sampler.state_dict(), torch.get_rng_state()
    found = probe(sampler, student, batch)
    assert toys.same(toys.snapshot(student), before)
    assert toys.same(sampler.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert probe(sampler, student, batch) == found
    assert found["examples"] == 20
    rows = dict(found["pictures"]["rows"])
    assert list(rows) == ["anchor", "reconstruction", f"synthetic, {mode}"]
    assert all(len(tiles) == 8 for tiles in rows.values())
    anchors = [pixels(base64.b64decode(tile["image"])) for tile in rows["anchor"]]
    assert np.array_equal(anchors[1], images_of(batch.x)[1])  # one of each class comes first
    opinion = teacher.label(batch.x[:8]).argmax(1)
    assert [tile["opinion"] for tile in rows["anchor"]] == opinion.tolist()
    assert [tile["differs"] for tile in rows["anchor"]] == (opinion != batch.y[:8]).tolist()
    assert len(found["ascent"]["values"]) == probing.ASCENT_STEPS + 1
    assert found["ascent"]["values"][-1] > found["ascent"]["values"][0]
    sources = {row["source"]: row for row in found["sources"]}
    assert set(sources) >= {"real", "reconstruction", f"synthetic, {mode}"}
    assert sources["real"]["wasserstein"] == 0 < sources["reconstruction"]["wasserstein"]
    assert sources["real"]["labeler_error"] is not None
    assert sources["reconstruction"]["labeler_error"] is None
    again = teacher.decode(teacher.encode(batch.x))
    assert sources["real"]["reconstruction_error"] == pytest.approx((again - batch.x).square().mean().sqrt().item())
    json.dumps(found, allow_nan=False)


def test_a_look_at_texts() -> None:
    pytest.importorskip("transformers")
    import text_kit

    teacher, student = text_kit.text_teacher()
    x = teacher.tokenize(text_kit.TEXTS)
    found = probe(tgt.LatentSampler(teacher, sigma=0.1), student, Batch(None, x, None))
    rows = dict(found["pictures"]["rows"])
    assert found["pictures"]["kind"] == "texts"
    assert [tile["text"] for tile in rows["anchor"]] == list(text_kit.TEXTS)
    assert {row["wasserstein"] for row in found["sources"]} == {None}
    assert len(found["ascent"]["values"]) == probing.ASCENT_STEPS + 1


def test_a_look_at_a_student_that_returns_more_than_logits(tmp_path: Path) -> None:
    class Wordy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toys.student()

        def forward(self, x: Any) -> Any:
            return {"features": x[:, :3], "scores": self.inner(x)}

    teacher, student = toys.vector_teacher(), Wordy()
    batch = Batch(None, toys.normal(6, toys.FEATURES), classes(6))
    sampler = tgt.LatentSampler(teacher, "gradient", units="absolute")
    plain = probe(sampler, student.inner, batch)
    assert probe(sampler, student, batch, logits_of="scores") == plain
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    tgt.fit(
        student, tgt.TGTObjective(teacher, sampler), [batch[1:]], steps=1, optimizer=optimizer, progress=False,
        log=tmp_path, logits_of="scores",
    )  # fmt: skip
    assert "error" not in json.loads((tmp_path / probing.NAME).read_text())["ascent"]


def test_what_cannot_be_shown_says_why() -> None:
    def broken(x: Any) -> Any:
        raise RuntimeError("no <decoder>")

    teacher = toys.vector_teacher()
    batch = Batch(None, toys.normal(6, toys.FEATURES), None)
    found = probe(tgt.LatentSampler(teacher), toys.student(), batch)
    assert "neither images nor texts" in found["pictures"]["error"]
    assert found["sources"][0]["source"] == "real"
    teacher = tgt.Teacher(teacher.encoder, broken, teacher.labeler)
    found = probe(tgt.LatentSampler(teacher), toys.student(), batch)
    assert [found[part]["error"] for part in ("pictures", "ascent", "sources")] == ["RuntimeError: no <decoder>"] * 3


@pytest.mark.parametrize("kind", ["persistent", "replay-random"])
def test_a_run_with_a_log_keeps_a_look_and_its_bits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged, silent = make_run(kind), make_run(kind)
    options = {"steps": 4, "evaluate": score, "eval_every": 2}
    result = tgt.fit(**logged, **options, log=tmp_path)
    assert tgt.fit(**silent, **options).history == result.history
    assert_same_weights(silent["student"], logged["student"])
    found = json.loads((tmp_path / probing.NAME).read_text())
    assert (found["step"], found["mode"], found["examples"]) == (4, kind.removeprefix("replay-"), 5)
    if kind != found["mode"]:
        assert found["replay"] == logged["objective"].sampler.statistics(logged["student"])
        assert found["replay"]["served"] == 4 * 5
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # tables alone
        told = report.run(result, logged["objective"].sampler, logged["loader"], out=tmp_path / "page.html")
        assert "fresh disagreement" in told.read_text()
    assert len(found["ascent"]["values"]) == probing.ASCENT_STEPS + 1
