"""Pages of a training run: complete, in one file, escaped, also while it runs; grids of images; TensorBoard."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from test_probe import pixels
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_kit import make_run

import tgt_fast as tgt
from tgt_fast import cli
from tgt_fast.errors import ArgumentError
from tgt_fast.report import story
from tgt_fast.train import evaluate, log

BAD = "<script>alert('$x_{')</script>"


class Reader(HTMLParser):
    """Headings, rows of tables, and whether every tag that needs it is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.found.setdefault(self.open[-1], []).append(data)
            if self.open[-1] in ("td", "th"):
                self.rows[-1].append(data)

    @property
    def table(self) -> dict[str, list[str]]:
        return {row[0]: row[1:] for row in self.rows if row}


def image_run() -> dict[str, Any]:
    teacher = toys.image_teacher()
    student = toys.seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 3)
    sampler = tgt.LatentSampler(teacher, "gradient", sigma=0.5, units="absolute")
    data = TensorDataset(torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3)
    return {
        "student": student,
        "objective": tgt.TGTObjective(teacher, sampler),
        "loader": DataLoader(data, batch_size=10),
        "optimizer": torch.optim.Adam(student.parameters(), 0.01),
        "progress": False,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any, Path]:
    folder = tmp_path_factory.mktemp("runs") / "a <b> & c"
    run = image_run()
    teacher = run["objective"].teacher

    def measured(student: nn.Module) -> dict[str, float]:
        return {**evaluate(student, teacher, run["loader"], class_counts=[9, 5, 2]), BAD: 2.0, "never": float("nan")}

    result = tgt.fit(**run, steps=6, evaluate=measured, eval_every=2, log=folder)
    return run, result, folder


def assert_whole(file: Path) -> Reader:
    text = file.read_text(encoding="utf-8")
    assert file.stat().st_size < 3_000_000
    assert not re.search(r"(?:src|href)=\"(?!data:image/png)|url\(|@import|https?://", text)
    assert text.count("<script") == 1
    return Reader(text)


def test_the_page_of_a_log_has_everything(
    trained: tuple[dict[str, Any], Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    _, result, folder = trained
    assert cli.main(["report", str(folder)]) == 0
    file = folder / "report.html"
    assert capsys.readouterr().out == f"Report: {file}\n"
    page = assert_whole(file)
    assert page.found["h1"] == ["a <b> & c"]
    assert page.found["h2"] == ["Losses", "Metrics", "Exploration", "Diagnostics", "Settings"]
    text = file.read_text()
    for name in ("losses", "accuracy", "thirds", "ascent", "diagnostics", "metric-0"):
        assert f'id="{name}"' in text, name
    assert BAD in page.table["step"]
    assert page.table["6"][0] == f"{result.history[-1]['loss']:.4g}"
    assert page.table["torch"] == [torch.__version__]
    assert page.table["sampler"] == [str(trained[0]["objective"].sampler)]
    assert len(page.table["real"]) == 7
    assert {"anchor", "reconstruction", "synthetic, gradient"} <= set(page.table)
    assert sorted(path.name for path in folder.iterdir()) == ["exploration.json", "log.jsonl", "report.html"]
    assert cli.main(["report", str(folder), "--out", str(folder / "other" / "x.html")]) == 0
    assert (folder / "other" / "x.html").read_text() == text
    shutil.rmtree(folder / "other")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("no_plots")
def test_the_page_of_a_result_has_everything_but_plots_without_matplotlib(
    trained: tuple[dict[str, Any], Any, Path], tmp_path: Path
) -> None:
    run, result, _ = trained
    sampler, student = run["objective"].sampler, run["student"]
    before, state, numbers = toys.snapshot(student), sampler.state_dict(), torch.get_rng_state()
    file = tgt.report.run(result, sampler, run["loader"], out=tmp_path)
    assert file == tmp_path / "report.html"
    assert toys.same(toys.snapshot(student), before)
    assert toys.same(sampler.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), numbers)
    page = assert_whole(file)
    assert page.found["h2"] == ["Losses", "Metrics", "Exploration", "Diagnostics", "Settings"]
    missing = [text for text in page.found["p"] if "There are no plots here" in text]
    assert len(missing) == 1
    assert "tgt-fast[demo]" in missing[0]
    assert page.table["6"][0] == f"{result.history[-1]['loss']:.4g}"
    assert "anchor" in page.table


def test_accuracy_by_thirds_is_measured_on_the_loader(
    trained: tuple[dict[str, Any], Any, Path], tmp_path: Path
) -> None:
    run, result, _ = trained
    told: list[Any] = []
    given = {"out": tmp_path / "x.html"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tgt_fast.report.training.write", lambda one, out: told.append(one))
        tgt.report.run(result, None, run["loader"], **given)
        tgt.report.run(result, None, run["loader"], **given, class_counts=[1, 2, 3])
        tgt.report.run(result, **given)
    found = evaluate(run["student"], None, run["loader"], class_counts=[7, 7, 6])
    assert told[0].thirds == {name: found[name] for name in ("head", "middle", "tail")}
    assert told[1].thirds["head"] == told[0].thirds["tail"]
    assert (told[2].thirds, told[2].exploration) == (None, None)


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("lines", [1, 2, 3, 7])
def test_a_page_can_be_made_at_any_moment(
    lines: int, trained: tuple[dict[str, Any], Any, Path], tmp_path: Path
) -> None:
    whole = (trained[2] / log.NAME).read_text().splitlines(keepends=True)
    (tmp_path / log.NAME).write_text("".join(whole[:lines]) + whole[lines][:20])
    page = assert_whole(tgt.report.of_folder(tmp_path))
    assert "so far" in page.found["p"][0]
    assert page.found["h2"][:2] == ["Losses", "Metrics"]


@pytest.mark.usefixtures("no_plots")
def test_what_stopped_a_run_and_what_is_broken_are_told_in_words(tmp_path: Path) -> None:
    start = {"event": "start", "time": 1.0, "step": 0, "total_steps": 9, "settings": {BAD: BAD}, "versions": {BAD: BAD}}
    error = {"event": "stopped", "time": 2.0, "step": 0, "error": BAD}
    (tmp_path / log.NAME).write_text(f"{json.dumps(start)}\n{json.dumps(error)}\n")
    seen = {"mode": BAD, "examples": 2, "pictures": {"error": BAD}, "ascent": {"error": BAD}, "sources": {"error": BAD}}
    (tmp_path / "exploration.json").write_text(json.dumps({"step": 3, **seen}))
    page = assert_whole(tgt.report.of_folder(tmp_path))
    assert f"It stopped: {BAD}, after 0 of 9 steps." in page.found["p"][0]
    assert page.table[BAD] == [BAD]
    (tmp_path / "exploration.json").write_text("nothing")
    assert_whole(tgt.report.of_folder(tmp_path))
    with pytest.raises(ArgumentError, match=r"no log\.jsonl"):
        tgt.report.of_folder(tmp_path / "none")


def test_what_a_report_cannot_be_made_of(trained: tuple[dict[str, Any], Any, Path], tmp_path: Path) -> None:
    run, result, _ = trained
    sampler = run["objective"].sampler
    for arguments, match in (
        ((None, sampler, run["loader"]), "the result of fit"),
        ((result, "sampler", run["loader"]), "must be a tgt_fast.LatentSampler"),
        ((result, sampler, []), "no batch"),
        ((tgt.train.FitResult(), sampler, run["loader"]), "pass student="),
    ):
        with pytest.raises(ArgumentError, match=match):
            tgt.report.run(*arguments, out=tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


def test_long_curves_are_thinned_to_means() -> None:
    curve = [(step, float(step % 2)) for step in range(1, 1002)]
    made = story.thinned(curve)
    assert made[0] == curve[0]
    assert made[-1][0] == 1001
    assert 200 < len(made) <= 250
    assert all(abs(value - 0.5) <= 0.3 for _, value in made[1:-1])
    assert story.thinned(curve[:100]) == curve[:100]


def test_a_grid_of_synthetic_images(tmp_path: Path) -> None:
    teacher = toys.image_teacher()
    made = tgt.LatentSampler(teacher, units="absolute")(torch.rand(5, 1, 8, 8))
    file = tgt.report.save_grid(made, tmp_path / "new" / "grid.png")
    shown = pixels(file.read_bytes())
    assert shown.shape == (2 * 66 + 2, 3 * 66 + 2, 1)  # enlarged to 64 pixels
    low, high = made.x.min(), made.x.max()
    expected = ((made.x[4, 0] - low) / (high - low) * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(shown[68 : 68 + 64 : 8, 68 : 68 + 64 : 8, 0], expected)
    color = pixels(
        tgt.report.save_grid(torch.rand(7, 3, 70, 80), str(tmp_path / "b.png"), columns=9, most=2).read_bytes()
    )
    assert color.shape == (74, 2 * 82 + 2, 3)
    with pytest.raises(ArgumentError, match="there are no images"):
        tgt.report.save_grid(torch.randn(3, 7), tmp_path / "c.png")
    with pytest.raises(ArgumentError, match="columns"):
        tgt.report.save_grid(made, tmp_path / "c.png", columns=0)
    assert not (tmp_path / "c.png").exists()


def test_tensorboard_hears_losses_and_records() -> None:
    class Writer:
        def __init__(self) -> None:
            self.scalars: dict[str, list[tuple[int, float]]] = {}
            self.flushed = False

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.setdefault(name, []).append((step, value))

        def flush(self) -> None:
            self.flushed = True

    writer = Writer()
    result = tgt.fit(
        **make_run(), steps=7, eval_every=4, callbacks=[tgt.report.tensorboard(writer, every=3)],
        evaluate=lambda s: {"accuracy": float("nan"), "kl": 1.0},
    )  # fmt: skip
    assert [step for step, _ in writer.scalars["step/loss"]] == [1, 3, 6]
    assert writer.scalars["record/loss"] == [(record["step"], record["loss"]) for record in result.history]
    assert "record/accuracy" not in writer.scalars
    assert writer.flushed
    with pytest.raises(ArgumentError, match="SummaryWriter"):
        tgt.report.tensorboard("runs/1")
