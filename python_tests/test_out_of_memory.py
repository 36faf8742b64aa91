"""Memory that runs out inside a kernel, on whichever thread: a MemoryError, and the process goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, resource, sys
import torch
import tgt_fast as tgt

sys.path.insert(0, sys.argv[1])
from forked import said_by_child

CLASSES = 1 << 21
x = torch.randn(2, CLASSES, dtype=torch.bfloat16)
logits = torch.randn(2, CLASSES)
record = tgt.topk_teacher(logits, k=CLASSES - 1)


def few(record, n):
    return tgt.topk_teacher(logits[:, :n].contiguous(), k=n // 2) if n < CLASSES else record


CALLS = {
    "sample_tokens": lambda n: tgt.sample_tokens(x[:, :n].contiguous(), top_p=0.9, seed=1, backend="native"),
    "perturb_latents": lambda n: tgt.perturb_latents(x[:, :n], 0.5, seed=1, sphere_radius="keep", backend="native"),
    "ascend_latents": lambda n: tgt.ascend_latents(
        x[:, :n], x[:, :n], step_size=1.0, anchor=x[:, :n], radius=0.5, backend="native"),
    "distillation_loss": lambda n: tgt.distillation_loss(
        logits[:, :n].contiguous(), few(record, n), backend="native"),
}
SPARE = {"sample_tokens": 8, "perturb_latents": 12, "ascend_latents": 12, "distillation_loss": 24}  # MiB


def limited(name):
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (SPARE[name] << 20), -1))
    try:
        CALLS[name](CLASSES)
    except MemoryError:
        return "MemoryError"
    except BaseException as error:
        return repr(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    return "enough"


found = {}
for name, call in CALLS.items():
    for threads in (1, 2):
        torch.set_num_threads(threads)
        call(1 << 16)
        found[f"{name}, {threads}"] = [limited(name), said_by_child(lambda: limited(name))]
        call(1 << 16)
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_memory_that_runs_out_in_a_kernel(native: str, child_environment: dict[str, str]) -> None:
    """In this process, where OpenMP's threads do the work, and in a forked child, where those of the core do."""
    glibc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}  # it has no memory put by
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent)],
        env={**child_environment, **glibc},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert set(map(tuple, found.values())) == {("MemoryError", "MemoryError")}, found
    assert len(found) == 8
