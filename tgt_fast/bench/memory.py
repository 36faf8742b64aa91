"""Memory that a call takes at its peak, and memory that there is.

On a GPU the allocator of PyTorch knows. A CPU's process knows the most that it ever held, so a call there is measured
in a process of its own: ``python -m tgt_fast.bench.memory NOUN NUMBER CONTENDER``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tgt_fast.bench.case import Call, Case, Work


def free_bytes(device: torch.device) -> int | None:
    """Bytes that could be allocated now; None where nobody tells."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("MemAvailable")), None)
    return None if found is None else int(found.split()[1]) * 1024


def peak_on_device(work: Work, call: Call, device: torch.device) -> int:
    """The most that a call adds to what is allocated, in bytes, what it returns included."""
    work.forget()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    after = torch.cuda.max_memory_allocated(device)
    del result
    return after - before


def peak_in_fresh_process(case: Case, contender: str, *, quick: bool, number: int) -> int | None:
    """The same on a CPU; None where the system does not tell. Peak memory never falls again within one process."""
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, "-m", __name__, case.noun, str(number), contender, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return int(done.stdout.split()[-1])


def resident_peak() -> int:
    """Bytes. Of this program alone: ru_maxrss begins with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def _call(work: Work, contender: str) -> Call:
    backend = contender.removeprefix("ours:")
    return work.ours(backend) if backend != contender else work.rival(contender)


def _main(noun: str, number: int, contender: str, quick: bool) -> int:
    from tgt_fast.bench.ops import OPS

    cases = OPS[noun](torch.device("cpu"), quick)
    smallest = min((case for case in cases if contender.startswith("ours:") or contender in case.rivals),
                   key=lambda case: case.bytes_moved)  # fmt: skip
    _call(smallest.build(), contender)()  # what is loaded at first use is no part of a call
    work = cases[number].build()
    call = _call(work, contender)
    before = resident_peak()
    result = call()
    after = resident_peak()
    del result
    return after - before


if __name__ == "__main__":
    print(_main(sys.argv[1], int(sys.argv[2]), sys.argv[3], "--quick" in sys.argv))
