"""What long tests have found of the same sources before: a committed report, with a hash of all that decides.

Where benchmarks/results/NAME.json is of the same, the tests skip. ``TGT_FAST_SAVE_REPORTS=1`` runs them and, when none
of them has failed, writes it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@contextmanager
def report(
    session: pytest.Session, name: str, by: str, sources: Iterable[Path], root: Path, tests: Iterable[str]
) -> Iterator[list[str]]:
    """A list for the names of the kernels that went well, around the tests of a module.

    ``sources`` lie below ``root``, and ``tests`` beside this file; ``by`` names the tools and their versions.
    """
    folder, save = HERE.parent / "benchmarks", os.environ.get("TGT_FAST_SAVE_REPORTS") == "1"
    names: list[str] = []
    if not folder.is_dir():  # the tests run outside a checkout
        yield names
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        compiled = importlib.import_module("compiled")
    sources = list(sources)
    made_of = compiled.digest(
        root, sources, compiled.digest(HERE, [HERE / each for each in ("reports.py", *tests)]), by
    )
    known = None if save else compiled.known(name, made_of)
    if known is not None:
        pytest.skip(compiled.words(known))
    failed = session.testsfailed
    yield names
    if save and names and session.testsfailed == failed:
        compiled.save(name, made_of, by, [{"kernel": each} for each in names], 0)
