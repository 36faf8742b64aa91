"""That a program in a child which has PyTorch already is as one in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ran


def test_it_has_its_arguments_its_environment_and_its_folder() -> None:
    code = "import os, sys; print(sys.argv, os.environ['MINE'], os.getcwd()); print('told', file=sys.stderr)"
    done = ran(code, "a", "b", environment={**os.environ, "MINE": "yes"})
    assert done.stdout.split("\n") == [f"['-c', 'a', 'b'] yes {Path.cwd()}", ""]
    assert (done.stderr, done.returncode) == ("told\n", 0)


def test_it_finds_pytorch_alone_and_nothing_of_another_program() -> None:
    code = """
        import sys
        print("torch" in sys.modules, [m for m in sys.modules if m.startswith(("tgt_fast", "triton", "sympy"))],
              sorted(name for name in globals() if not name.startswith("__")))
        import tgt_fast
        mine = 1
    """
    assert {ran(code).stdout for _ in range(2)} == {"True [] ['sys']\n"}


@pytest.mark.parametrize(
    ("code", "status"),
    [("raise SystemExit(3)", 3), ("raise KeyError(1)", 1), ("import os; os.kill(os.getpid(), 9)", -9)],
)
def test_it_ends_as_it_would(code: str, status: int) -> None:
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    done = ran(code)
    assert done.returncode == fresh.returncode == status
    assert done.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_one_that_hangs_is_ended_and_the_next_one_runs() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        ran("import time; time.sleep(60)", timeout=0.3)
    assert ran("print(1)").stdout == "1\n"
