"""Worker processes of this machine: batch ``i`` is made by worker ``i`` modulo their number."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Final, NamedTuple

from tgt_fast._processes import end_with_parent
from tgt_fast.errors import ProcessError
from tgt_fast.synthesis.interruption import interrupt, interruptible
from tgt_fast.synthesis.job import Job
from tgt_fast.synthesis.summary import SynthesisSummary

_PATIENCE: Final = 30.0  # seconds, for a worker to write what it has


class _Worker(NamedTuple):
    process: BaseProcess
    told: Connection


class _Result(NamedTuple):
    summary: SynthesisSummary | None
    error: str = ""
    kind: str = ""  # of the error


def run(job: Job, workers: int, *, progress: bool) -> SynthesisSummary:
    """
    Raises:
        ProcessError: a worker failed, with its own error, or was killed. The others have written what they had.
    """
    with interruptible():
        if workers == 1:
            with visible_gpus(0, job.gpus):
                return job.work((0, 1), progress=progress)
        return _of_several(job, workers, progress)


def _of_several(job: Job, workers: int, progress: bool) -> SynthesisSummary:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of whatever this process has run
    begun: list[_Worker] = []
    found: dict[int, SynthesisSummary] = {}
    try:
        for number in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(job, number, workers, progress, theirs), name=f"tgt-fast synthesize {number}"
            )
            with visible_gpus(number, job.gpus):
                process.start()
            theirs.close()
            begun.append(_Worker(process, ours))
        while len(found) < workers:
            waiting = [begun[number].told for number in range(workers) if number not in found]
            for told in wait(waiting):
                number = next(i for i, worker in enumerate(begun) if worker.told is told)
                found[number] = _result(number, begun[number])
    except BaseException:
        for worker in begun:
            if worker.process.is_alive():
                worker.process.terminate()  # which lets it write what it has
        raise
    finally:
        _end(begun)
    return SynthesisSummary.of_all(found[number] for number in range(workers))


def _result(number: int, worker: _Worker) -> SynthesisSummary:
    try:
        result: _Result = worker.told.recv()
    except (EOFError, OSError):  # it ended without a word
        worker.process.join(_PATIENCE)
        code = worker.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        raise ProcessError(
            f"synthesize: worker {number} {how} (out of memory?); what was written is kept: run it again to go on"
        ) from None
    if result.summary is None:
        raise ProcessError(f"synthesize: worker {number} failed: {result.kind}: {result.error}")
    return result.summary


def _end(begun: list[_Worker]) -> None:
    for worker in begun:
        worker.process.join(_PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.told.close()


def _work(job: Job, number: int, workers: int, progress: bool, told: Connection) -> None:
    """In a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and asks this process to end
    signal.signal(signal.SIGTERM, interrupt)
    end_with_parent()
    try:
        try:
            result = _Result(job.work((number, workers), progress=progress))
        except Exception as error:
            result = _Result(None, str(error), type(error).__name__)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # all is written
        told.send(result)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGTERM)


@contextmanager
def visible_gpus(number: int, gpus: float) -> Iterator[None]:
    """Inside, a process that is started sees the GPUs of worker ``number`` alone."""
    if not gpus:
        yield
        return
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    all_of_them = before.split(",") if before else [str(i) for i in range(1024)]
    first = int(number * gpus)
    os.environ[name] = ",".join(all_of_them[first : max(first + 1, int((number + 1) * gpus))])
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
