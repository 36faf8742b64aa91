"""Stand-ins for a GPU's part in benchmarks/gpu.sh: a worker and tests that hang, fault or fail."""

from __future__ import annotations

WORKER = """
import json, os, signal, sys, time

CASES = [("distill", 0, 10), ("distill", 1, 128256), ("distill", 2, 50), ("latent", 0, 0), ("linear", 0, 7)]
HANGS, FAULTS = set(sys.argv[1:2]), set(sys.argv[2:3])


def answer(**fields):
    print(json.dumps(fields), flush=True)


def misbehave(name):
    print("working on", name, file=sys.stderr, flush=True)
    if name in HANGS:
        time.sleep(600)
    if name in FAULTS:
        os.kill(os.getpid(), signal.SIGKILL)


answer(status="ok")
for line in sys.stdin:
    task = json.loads(line)
    kind = task["task"]
    if kind == "names":
        answer(status="ok", value=["native distill: warp", "native latent: 5", "triton latent: 7"])
    elif kind == "call":
        misbehave(task["name"])
        lost = task["name"] == "sticky"
        answer(status="failed" if lost or task["name"] == "nan" else "ok", reason="an illegal access" * lost, lost=lost)
    elif kind == "cases":
        answer(status="ok", value=[
            {"noun": noun, "number": number, "op": noun, "shape": str(number), "dtype": "float32", "classes": classes}
            for noun, number, classes in CASES
        ])
    elif kind == "origin":
        answer(status="ok", value={
            "command": task["command"], "hardware": "a stand-in", "driver": "1.2", "commit": "abc", "date": "today",
            "versions": {"torch": "2"}, "copy_bytes_per_second": 1e12,
        })
    elif kind == "case":
        misbehave(f"{task['noun']} {task['number']}")
        rivals = {"eager": {}} if task["rivals"] == ["available"] else {}
        answer(status="ok", value=[{
            "op": task["noun"], "shape": str(task["number"]), "dtype": "float32", "backend": "native", "status": "ok",
            "reason": "", "milliseconds": {"ours": 1.0}, "of_copy": 0.9, "rivals": rivals,
        }])
"""

# Tests for a device that may hang. With a torch of their own, whose device is lost for good after one of them.
TORCH = """
class cuda:
    lost = False

    @staticmethod
    def is_initialized():
        return True

    @classmethod
    def synchronize(cls):
        if cls.lost:
            raise RuntimeError("an illegal memory access was encountered")
"""
TESTS = """
import os, signal, time
import pytest, torch

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("n", range(4))
def test_good(n):
    pass

def test_hangs():
    time.sleep(60)

def test_faults():
    os.kill(os.getpid(), signal.SIGKILL)

def test_loses_the_device():
    torch.cuda.lost = True
    assert False, "wrong numbers"

def test_fails():
    assert False, "another sum"

def test_skips():
    pytest.skip("no second device")

def test_kernel_that_hung():
    time.sleep(60)

@pytest.mark.parametrize("n", range(4))
def test_good_too(n):
    assert not torch.cuda.lost
"""
