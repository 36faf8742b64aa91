"""The worker processes of the demos: errors that arrive, and ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_kit import forked

from tgt_fast.demos import workers
from tgt_fast.errors import ShapeError


@pytest.fixture(autouse=True)
def workers_by_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are there at once, and need no second import of everything."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this platform")
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda kind: context)


def fail(text: str) -> None:
    raise ShapeError(text)


def run_alone(count: int, task: Callable[..., None], argument: object) -> None:
    with workers.crew(count) as crew:
        crew.submit(task, argument, then=lambda _: pytest.fail("went on"))
        crew.finish()


@pytest.mark.parametrize("count", [0, 1])
def test_what_a_task_raises_arrives(count: int) -> None:
    with pytest.raises(ShapeError, match="oh"):
        run_alone(count, fail, "oh")


def test_a_dead_worker_is_reported() -> None:
    with pytest.raises(workers.WorkerError, match="worker process died"):
        run_alone(1, os._exit, 3)


def stay(told: str) -> None:
    Path(told).write_text(str(os.getpid()))
    time.sleep(60)


def is_alive(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return words.rpartition(")")[2].split()[0] != "Z"  # ended, and nobody asked for its status


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc on this platform")
def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    parent = forked(run_alone, 1, stay, str(tmp_path / "worker"))
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        time.sleep(0.01)
    worker = int((tmp_path / "worker").read_text())
    try:
        os.kill(parent.pid or 0, signal.SIGKILL)
        parent.join()
        for _ in range(3000):
            if not is_alive(worker):
                break
            time.sleep(0.01)
        assert not is_alive(worker)
    finally:
        if is_alive(worker):
            os.kill(worker, signal.SIGKILL)
