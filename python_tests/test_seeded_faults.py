"""The table of seeded_faults.py: the default part of each grid has found every fault that it tells of."""

from __future__ import annotations

import json

import pytest
from seeded_faults import FAULTS, HERE, PAGE, ROOT, TABLE, entry, page

pytestmark = pytest.mark.skipif(not TABLE.exists(), reason="the tests run outside a checkout")


def test_there_are_many_of_every_kind_of_source() -> None:
    assert len({(fault.file, fault.old) for fault in FAULTS}) == len(FAULTS) >= 40
    assert all((ROOT / fault.file).exists() and fault.old != fault.new for fault in FAULTS)
    assert all((HERE / f"test_{name}.py").exists() for fault in FAULTS for name in fault.tests.split())
    sources = [fault.backend for fault in FAULTS]
    assert all(sources.count(each) >= 8 for each in (None, "native", "emulated", "triton"))


def test_the_table_has_no_hole() -> None:
    rows = json.loads(TABLE.read_text())
    assert [row["file"] for row in rows if row["small"] is None] == []
    known = [entry(fault) for fault in FAULTS]
    assert all({name: row[name] for name in ("kind", "file", "old", "new")} in known for row in rows)
    assert PAGE.read_text() == page(rows)
