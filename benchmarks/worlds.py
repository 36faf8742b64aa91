"""Several processes of a benchmark on this machine."""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def found_by(worker: Callable[[int, int, str], None], world: int) -> Any:
    """The findings of the first of ``world`` processes, each of which runs ``worker(rank, world, folder)``, in
    ``folder/found.json``. Ends the script where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        workers = [multiprocessing.Process(target=worker, args=(rank, world, folder)) for rank in range(world)]
        for process in workers:
            process.start()
        for process in workers:
            process.join()
        if any(process.exitcode for process in workers):
            sys.exit("a process failed")
        return json.loads(Path(folder, "found.json").read_text())
