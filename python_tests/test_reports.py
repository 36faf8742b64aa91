"""A report on tests of minutes holds for the same sources alone, and is written when asked for and all went well."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from reports import report


@pytest.fixture
def results(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of benchmarks/results."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(importlib.import_module("compiled"), "RESULTS", folder)
    return folder


def run(sources: Path, failures: int = 0, by: str = "a compiler") -> None:
    session: Any = SimpleNamespace(testsfailed=3)
    with report(session, "races", by, sources.iterdir(), sources, ["test_reports.py"]) as names:
        names.append("a kernel")
        session.testsfailed += failures


def test_only_what_went_well_with_the_same_sources_skips(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "kernel.cu").write_text("one")
    run(sources)
    assert list(results.iterdir()) == []
    monkeypatch.setenv("TGT_FAST_SAVE_REPORTS", "1")
    run(sources, failures=1)
    assert list(results.iterdir()) == []
    run(sources)
    run(sources)  # to write it is to run them
    monkeypatch.delenv("TGT_FAST_SAVE_REPORTS")
    with pytest.raises(pytest.skip.Exception, match="unchanged since the report on 1 kernels by a compiler"):
        run(sources)
    run(sources, by="another compiler")
    (sources / "kernel.cu").write_text("two")
    run(sources)
