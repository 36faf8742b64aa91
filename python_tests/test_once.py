"""Tests that run once for each state of the sources: a change of any source runs them, and only what passed skips."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import covering
import once
import pytest

TESTS = '''
from helper import something
import tgt_fast as tgt

def test_one(backend): tgt.distillation_loss()
def test_two(interpreted): ...
'''  # fmt: skip


@pytest.fixture
def tree(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of few files in the place of this one."""
    files = {
        "csrc/cuda/kernel.cu": "", "tests/conftest.py": "import covering\n", "tests/covering.py": "",
        "tests/helper.py": "import deeper\nSCRIPT = 'nothing'\n", "tests/deeper.py": 'RUNS = "script.py"\n',
        "tests/other.py": "", "tests/script.py": "", "tests/test_kernel.py": TESTS,
        "package/__init__.py": "", "package/explore/pool.py": "",
        "package/kernels/triton/distill.py": "from tgt_fast import errors, _forks\n", "package/_forks.py": "",
        "package/ops/distill.py": "from tgt_fast.losses.terms import (\n    Term,\n)\n", "package/errors.py": "",
        "package/losses/terms.py": "", "package/losses/other.py": "", "results/nothing": "",
        "tools/script.sh": "", "tools/parts/run.py": "from tgt_fast import bench\n", "package/bench.py": "",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    importlib.import_module("compiled")  # while it is found
    for name, folder in (("HERE", "tests"), ("ROOT", "."), ("PACKAGE", "package")):
        monkeypatch.setattr(once, name, tmp_path / folder)
    monkeypatch.delenv(covering.FULL, raising=False)
    monkeypatch.delenv(once.SAVE, raising=False)
    monkeypatch.setattr(once.torch.cuda, "is_available", lambda: False)
    return tmp_path


class Item:
    """A test as pytest collects it."""

    def __init__(self, tree: Path, name: str, *fixtures: str, **params: str) -> None:
        self.path, self.nodeid, self.fixturenames = (
            tree / "tests" / "test_kernel.py",
            f"test_kernel.py::{name}",
            fixtures,
        )
        self.callspec, self.user_properties = SimpleNamespace(params=params), []  # type: ignore[var-annotated]
        self.marks: dict[str, Any] = {}

    def get_closest_marker(self, name: str) -> Any:
        return self.marks.get(name)

    def add_marker(self, mark: Any) -> None:
        self.marks[mark.name] = mark


def collected(tree: Path) -> list[Any]:
    names = [("test_one[a]", (), "triton"), ("test_one[b]", (), "emulated"), ("test_one[c]", (), "reference")]
    items = [Item(tree, name, *fixtures, backend=backend) for name, fixtures, backend in names]
    return [*items, Item(tree, "test_two", "interpreted"), Item(tree, "test_three", "interpreted")]


def run(
    tree: Path, *, asked: str = "", named: str = "tests", outcomes: Sequence[str] = ("passed",), kept: int | None = None
) -> list[str]:
    """The names of the tests that a run ran. ``outcomes`` are their ends, by turns; ``kept``: not all were selected."""
    for cached in (once._in_a_test, once._in_a_part, once._of_part, once._kernels, once._tools):
        cached.cache_clear()
    plugin, items = once.Once(tree / "results"), collected(tree)
    config: Any = SimpleNamespace(option=SimpleNamespace(keyword=asked, markexpr=""), args=[named])
    left_out = plugin.unneeded(config, items)
    ran = [item for item in items if item not in left_out and "skip" not in item.marks][:kept]
    for place, item in enumerate(ran):
        outcome, _, when = outcomes[place % len(outcomes)].partition(" ")
        plain = {each: each == outcome for each in ("passed", "failed", "skipped")}
        report: Any = SimpleNamespace(
            when=when or "call", outcome=outcome, user_properties=item.user_properties, nodeid=item.nodeid, **plain
        )
        plugin.pytest_runtest_logreport(report)
    plugin.pytest_sessionfinish(SimpleNamespace(config=config))  # type: ignore[arg-type]
    return [item.nodeid.partition("::")[2] for item in ran]


EVERY = ["test_one[a]", "test_one[b]", "test_one[c]", "test_two", "test_three"]
ONCE = [name for name in EVERY if name != "test_one[c]"]


@pytest.fixture
def saved(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with a report on all."""
    monkeypatch.setenv(once.SAVE, "1")
    assert run(tree) == ONCE
    assert run(tree) == []  # it is known
    monkeypatch.delenv(once.SAVE)
    assert run(tree) == ["test_one[c]"]
    return tree


def test_nothing_skips_before_it_has_passed(tree: Path) -> None:
    assert run(tree) == EVERY
    assert not (tree / "results" / "passed-tests.json").exists()


@pytest.mark.parametrize(
    "name",
    [
        "csrc/cuda/kernel.cu", "package/__init__.py", "package/kernels/triton/distill.py", "package/ops/distill.py",
        "package/errors.py", "package/_forks.py", "package/losses/terms.py", "package/losses/other.py",
        "tests/test_kernel.py", "tests/conftest.py", "tests/covering.py", "tests/helper.py", "tests/deeper.py",
        "tests/script.py",
    ],
)  # fmt: skip
def test_a_change_of_any_source_that_they_use_runs_them(saved: Path, name: str) -> None:
    before = (saved / name).read_text()
    (saved / name).write_text(before + "\n# changed\n")
    assert run(saved) == EVERY
    (saved / name).write_text(before)
    assert run(saved) == ["test_one[c]"]


def test_a_change_of_what_they_do_not_use_runs_nothing(saved: Path) -> None:
    for name in ("tests/other.py", "package/explore/pool.py"):
        (saved / name).write_text("changed = True\n")
    assert run(saved) == ["test_one[c]"]


def test_new_sources_versions_and_tests_run_them(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(once, "_version", lambda name: "another")
        assert run(saved) == EVERY
    with monkeypatch.context() as patch:
        patch.setenv("TGT_FAST_ISA", "baseline")
        assert run(saved) == EVERY
    with monkeypatch.context() as patch:
        patch.setattr(once.torch.cuda, "is_available", lambda: True)
        assert run(saved) == EVERY
    every = collected
    with monkeypatch.context() as patch:  # the emulated one is as before
        patch.setitem(globals(), "collected", lambda tree: [*every(tree), Item(tree, "test_four", "interpreted")])
        assert run(saved) == [*(name for name in EVERY if name != "test_one[b]"), "test_four"]
    (saved / "csrc" / "cuda" / "new.cu").touch()
    assert run(saved) == EVERY


def test_who_asks_for_them_gets_them(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(saved, asked="one") == run(saved, named="tests/test_kernel.py::test_one") == EVERY
    monkeypatch.setenv(covering.FULL, "1")
    assert run(saved) == EVERY


def test_the_reason_says_that_they_passed_and_how_to_run_them(saved: Path) -> None:
    items = collected(saved)
    config: Any = SimpleNamespace(option=SimpleNamespace(keyword="", markexpr=""), args=[])
    assert once.Once(saved / "results").unneeded(config, items) == items[3:]
    reasons = [item.marks["skip"].kwargs["reason"] for item in items if "skip" in item.marks]
    assert len(reasons) == 2
    assert "triton: 3 of test_kernel.py have passed with exactly these sources" in reasons[0]
    assert all(f"{covering.FULL}=1" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("outcomes", "kept", "known"),
    [
        (["passed"], None, {"triton", "emulated"}),
        (["passed", "passed", "passed", "skipped call", "passed"], None, {"triton", "emulated"}),
        (["failed", "passed", "passed", "passed", "passed"], None, {"emulated"}),
        (["passed", "skipped setup", "passed", "passed", "passed"], None, {"triton"}),
        (["passed", "skipped call", "passed", "passed", "passed"], None, {"triton"}),
        (["passed", "passed", "passed", "failed teardown"], None, {"emulated"}),
        (["passed"], 3, {"emulated"}),
    ],
)
def test_only_what_passed_as_a_whole_is_saved(
    tree: Path, monkeypatch: pytest.MonkeyPatch, outcomes: list[str], kept: int | None, known: set[str]
) -> None:
    monkeypatch.setenv(once.SAVE, "1")
    run(tree, outcomes=outcomes, kept=kept)
    rows = json.loads((tree / "results" / "passed-tests.json").read_text())["rows"]
    assert {row["kind"] for row in rows} == known


def test_every_file_finds_its_helpers_and_the_parts_that_they_use() -> None:
    tests, parts = once.uses(once.HERE / "test_compile.py")
    assert {"test_compile.py", "conftest.py", "covering.py", "emulated_gpu.py"} <= {path.name for path in tests}
    assert {"ops", "kernels", "errors", "explore", "teacher", "_forks"} <= parts
    tests, parts = once.uses(once.HERE / "test_triton_launch.py")
    assert {"dry_forms.py", "dry_gpu.py", "dry_gpu_tests.py", "kernel_calls.py"} <= {path.name for path in tests}
    assert "bench" not in once.uses(once.HERE / "test_distill.py")[1]


def test_what_else_a_test_names_runs_it_too(tree: Path) -> None:
    def made() -> str:
        return once.digest(tree / "tests" / "test_kernel.py", ["test_one"], ["tools/script.sh", "tools/parts"])

    def changed(name: str) -> bool:
        before = made()
        (tree / name).write_text("changed = True\n")
        for cached in (once._in_a_test, once._of_part):
            cached.cache_clear()
        return made() != before

    assert changed("tools/script.sh")
    assert changed("package/bench.py")
    assert changed("tools/parts/run.py")
    (tree / "tools" / "parts" / "__pycache__").mkdir()
    assert not changed("tools/parts/__pycache__/run.pyc")
    assert not changed("package/bench.py")  # which nothing uses any more
