"""A Ray Data pipeline: tasks that read batches, actors with a teacher each that make rows, and tasks that write them.

Ray keeps as much on its way as its object store takes, starts actors that die again and does again what they were at.
What is done twice is stored once, for rows have keys: an actor passes over batches whose rows the folder holds, and a
writer keeps the rows that it lacks.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tgt_fast._optional import optional
from tgt_fast._rng import isolated_rng
from tgt_fast._threads import threads
from tgt_fast.cache.arguments import as_loader
from tgt_fast.cache.command import factory
from tgt_fast.cache.fingerprint import Fingerprint
from tgt_fast.cache.query import as_ids
from tgt_fast.errors import ProcessError, TgtError
from tgt_fast.synthesis.interruption import interruptible
from tgt_fast.synthesis.job import Job
from tgt_fast.synthesis.maker import OP, Batch
from tgt_fast.synthesis.parquet import is_address
from tgt_fast.synthesis.summary import SynthesisSummary
from tgt_fast.teacher.batches import Columns

_WORKERS_A_READER = 4  # who reads passes over the whole loader
_SPARE = 2  # CPUs of a Ray of our own, for those that read and write


def run(job: Job, workers: int, *, progress: bool) -> SynthesisSummary:
    """Run the pipeline on the cluster that RAY_ADDRESS names, or that this process knows, else on a Ray of its own.

    Raises:
        DependencyError: Ray is not installed.
        ProcessError: a task or an actor failed; what was written is kept.
    """
    ray, data = optional("ray", "ray", OP), optional("ray.data", "ray", OP)
    job = replace(job, folder=job.folder if is_address(job.folder) else str(Path(job.folder).absolute()))
    own = not ray.is_initialized()
    try:
        with interruptible():
            if own:
                cluster = "RAY_ADDRESS" in os.environ
                cpus = {} if cluster else {"num_cpus": 2 * workers + _SPARE, "include_dashboard": False}
                os.environ.setdefault("RAY_worker_niceness", "0")  # the workers are what the command is for
                ray.init(logging_level="error", log_to_driver=False, **cpus)
            return _pipeline(ray, data, job, workers, progress)
    finally:
        if own:
            ray.shutdown()


def _pipeline(ray: Any, data: Any, job: Job, workers: int, progress: bool) -> SynthesisSummary:
    context = data.DataContext.get_current()
    ours = {"enable_progress_bars": progress, "print_on_execution_start": False, "target_max_block_size": 1}
    before = {name: getattr(context, name) for name in ours}  # a block of its own for each batch: each goes its own way
    quiet = logging.getLogger("ray.data")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    for name, value in ours.items():
        setattr(context, name, value)
    readers = -(-workers // _WORKERS_A_READER)
    sink = _sink(data, job)
    gpus = {"num_gpus": job.gpus} if job.gpus else {}
    try:
        (
            data.from_items([{"id": reader} for reader in range(readers)], override_num_blocks=readers)
            .map_batches(_Reader(job, readers, os.getcwd()), batch_size=1, num_cpus=0.5)
            .map_batches(
                _Actor, fn_constructor_args=(job, os.getcwd()), batch_size=1, num_cpus=1, **gpus,
                compute=data.ActorPoolStrategy(size=workers),
            )
            .write_datasink(sink, ray_remote_args={"num_cpus": 0.5})
        )  # fmt: skip
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        told = str(cause).strip().splitlines() or [""]
        shown = str(cause) if isinstance(cause, TgtError) else told[-1]
        raise ProcessError(
            f"{OP}: a task of Ray failed: {type(cause).__name__}: {shown}; what was written is kept: run it again to "
            "go on"
        ) from error
    finally:
        quiet.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)
    summary: SynthesisSummary = sink.summary
    return summary


def _at_home(folder: str) -> None:
    """Where the user's modules are, and relative paths of theirs lead, if this machine has that folder."""
    if os.path.isdir(folder):
        os.chdir(folder)
        if folder not in sys.path:
            sys.path.insert(0, folder)


def _row(thing: Any) -> dict[str, Any]:
    held = np.empty(1, object)
    held[0] = pickle.dumps(thing)
    return {"held": held}


class _Reader:
    """The batches of some part of the loader, one after the other."""

    def __init__(self, job: Job, readers: int, home: str) -> None:
        self._job, self._readers, self._home = job, readers, home

    def __call__(self, part: dict[str, Any]) -> Iterator[dict[str, Any]]:
        _at_home(self._home)
        reader, columns = int(part["id"][0]), Columns(OP, None, needs_ids=True)
        with threads(self._job.threads), isolated_rng(0):
            loader = as_loader("--data", factory("--data", self._job.data)())
            for number, raw in enumerate(loader):
                if number % self._readers == reader:
                    ids, x, _ = columns.split(raw)
                    assert ids is not None
                    yield _row((as_ids(ids), x))


class _Actor:
    """A teacher of its own. What it gives is stored by others."""

    def __init__(self, job: Job, home: str) -> None:
        _at_home(home)
        torch.set_num_threads(job.threads)
        self._maker = job.parts().maker
        self._target = job.target(self._maker.fingerprint)

    def __call__(self, given: dict[str, Any]) -> dict[str, Any]:
        ids, x = pickle.loads(given["held"][0])
        keys = self._maker.keys(ids)
        if not self._target.lacks(keys):
            return _row((self._maker.fingerprint, len(set(keys.tolist()))))
        with isolated_rng(0):
            return _row((self._maker.fingerprint, self._maker.make(ids, x).to_store()))


def _sink(data: Any, job: Job) -> Any:
    class Sink(data.Datasink):  # type: ignore[misc]
        """Rows to the folder, in shards of about the size that was asked for."""

        summary = SynthesisSummary()

        @property
        def min_bytes_per_write(self) -> int:
            return job.shard_bytes

        def write(self, blocks: Iterable[Any], ctx: Any) -> SynthesisSummary:
            return _store(job, blocks)

        def on_write_complete(self, write_result: Any) -> None:
            self.summary = SynthesisSummary.of_all(write_result.write_returns)

    return Sink()


def _store(job: Job, blocks: Iterable[Any]) -> SynthesisSummary:
    summary = SynthesisSummary()
    target = None
    try:
        for block in blocks:
            for held in block["held"]:
                made: tuple[Fingerprint, Batch | int] = pickle.loads(held if isinstance(held, bytes) else held.as_py())
                fingerprint, batch = made
                if isinstance(batch, int):
                    summary.found += batch
                    continue
                target = target or job.target(fingerprint).__enter__()
                target.take(batch, summary)
    finally:
        if target is not None:
            target.__exit__()
    return summary
