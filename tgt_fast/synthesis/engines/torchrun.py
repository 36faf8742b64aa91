"""The processes of ``torchrun``: batch ``i`` is made by rank ``i`` modulo their number. They never talk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from tgt_fast.errors import ArgumentError, ProcessError
from tgt_fast.synthesis.interruption import interruptible
from tgt_fast.synthesis.job import Job
from tgt_fast.synthesis.summary import SynthesisSummary

_PATIENCE = 60.0


def place_of_rank() -> tuple[int, int] | None:
    """Rank and number of processes, where torchrun has started this one."""
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None


def work(job: Job, share: tuple[int, int], *, progress: bool) -> SynthesisSummary:
    """In one of the processes."""
    with interruptible():
        if job.gpus:
            if job.gpus != 1:
                raise ArgumentError(f"synthesize: torchrun gives a process one GPU, not {job.gpus:g}")
            import torch

            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return job.work(share, progress=progress)


def launch(words: Sequence[str], workers: int) -> None:
    """Start torchrun on this machine with the command itself.

    Raises:
        ProcessError: it failed; what it wrote to stderr says why.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment.setdefault("OMP_NUM_THREADS", "1")
    with interruptible():
        process = subprocess.Popen([*command, "-m", "tgt_fast", *words], env=environment)
        try:
            code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    if code:
        raise ProcessError(
            f"synthesize: torchrun ended with status {code}; what was written is kept: run it again to go on"
        )
