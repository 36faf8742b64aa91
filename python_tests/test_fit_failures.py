"""A process of a run that raises ends all of them, with its own error, and none hangs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from process_kit import Raised, in_processes, needs_processes
from programs import ran
from test_fit_parallel import trained

from tgt_fast.errors import ProcessError

pytestmark = needs_processes
WORLD, FAILS = 2, 1


class BrokenError(Exception):
    """Raised by one process."""


def fails_at(event: str, rank: int) -> Any:
    def callback(happened: str, run: Any) -> None:
        if happened == event and rank == FAILS:
            raise BrokenError(f"at {event}")

    return [callback]


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
@pytest.mark.parametrize("event", ["step", "checkpoint"])
def test_one_that_raises_ends_all(kind: str, event: str, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        options: dict[str, Any] = {"callbacks": fails_at(event, rank), "checkpoint_dir": tmp_path / "run"}
        start = time.monotonic()
        try:
            trained(kind, WORLD, rank, 1, steps=50, checkpoint_every=1, **options)
        except (BrokenError, ProcessError) as error:
            made = type(error).__name__, str(error), time.monotonic() - start
        if rank == FAILS:
            return os._exit(7) if event == "checkpoint" else made
        return made

    found = in_processes(WORLD, tmp_path / "results", work, seconds=60)
    if found[1 - FAILS] is not None:
        kind_of_error, text, seconds = found[1 - FAILS]
        assert (kind_of_error, text) == ("ProcessError", f"in process {FAILS} of {WORLD}: BrokenError: at {event}")
        assert seconds < 30
    if event == "step":
        assert not isinstance(found[FAILS], Raised)
        assert found[FAILS][:2] == ("BrokenError", "at step")


SCRIPT = """
import signal, sys, time
signal.alarm(150)  # whatever becomes of the test, this process ends
sys.path.insert(0, {tests!r})
import torch
from test_fit_parallel import trained

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()

def callback(event, run):
    if event == "step" and run.steps == 2 and rank == {fails}:
        raise ValueError('mine')

try:
    trained("replicated", 2, rank, 1, steps=50, callbacks=[callback], evaluate=None)
except ValueError:
    time.sleep(120)
"""


def test_under_torchrun(tmp_path: Path) -> None:
    """One that raised and lives on keeps its connections: the other cannot leave the collective by itself."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), fails=FAILS))
    start = time.monotonic()
    launch = "import torch.distributed.run as run; run.main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = ran(launch, "--standalone", "--nproc-per-node=2", str(script), environment=environment)
    assert ended.returncode != 0
    assert "fit: in process 1 of 2: ValueError: mine" in ended.stderr
    assert time.monotonic() - start < 90  # with the start, on a machine that does other things beside


def test_all_that_raise_keep_their_own_error(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        def callback(event: str, run: Any) -> None:
            raise KeyError(rank)

        start = time.monotonic()
        with pytest.raises(KeyError, match=str(rank)):
            trained("replicated", WORLD, rank, 1, callbacks=[callback])
        assert time.monotonic() - start < 10
        return torch.distributed.all_reduce(torch.ones(1))  # the processes are there still

    assert in_processes(WORLD, tmp_path, work) == [None, None]
