"""A few of the calls that ``fuzz.py`` makes by the ten thousand: no crash, no hang, no error that is not typed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from programs import ran_file


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_odd_arguments_give_results_or_typed_errors(child_environment: dict[str, str]) -> None:
    script = Path(__file__).with_name("fuzz.py")
    done = ran_file(script, "--calls", "240", environment=child_environment, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout)
    assert min(told["results"], told["errors"]) > 70  # neither is all that happens
