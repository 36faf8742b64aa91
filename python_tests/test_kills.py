"""A few of the kills that ``kills.py`` and ``synthesis_kills.py`` do by the hundred."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import synthesis_kills
from programs import ran_file


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize(("what", "kills"), [("fit", 3), ("cache", 5)])
def test_kills_at_random_leave_no_stray_file_and_no_wrong_bit(
    what: str, kills: int, child_environment: dict[str, str]
) -> None:
    script = Path(__file__).with_name("kills.py")
    done = ran_file(script, what, "--kills", str(kills), environment=child_environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["kills"] == kills


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_synthesis_that_is_killed_at_random_loses_nothing_and_holds_nothing_twice(one_thread: None) -> None:
    assert synthesis_kills.run("forked", 2, "safetensors", seed=0)["kills"] >= 2  # of three tries a folder
