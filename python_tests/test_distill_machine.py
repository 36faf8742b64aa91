"""The loss and the machine: memory, threads, and processes that fork."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from numerics import evaluate, logits, targets, threads
from programs import ran
from strategies import DTYPES

from tgt_fast.kernels.options import DIVERGENCES

MIB = 1 << 20


def child(source: str, environment: dict[str, str], timeout: float = 120.0) -> Any:
    """Runs a program in a process of its own and returns what it prints, as JSON."""
    done = ran(source, environment=environment, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


# Determinism


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(
    backend: str, divergence: str, dtype: torch.dtype
) -> None:
    """97 rows of 4099: enough work that every thread gets some, and an odd share of it."""
    rows, classes = {"native": (97, 4099), "emulated": (3, 200)}.get(backend, (5, 500))
    student, teacher = logits(rows, classes, 0, dtype=dtype), logits(rows, classes, 1, dtype=dtype)
    target = targets(rows, classes, 2)
    options: dict[str, Any] = {
        "divergence": divergence, "hard_weight": 0.5, "temperature": 2.0, "return_stats": True,
    }  # fmt: skip
    results = []
    for count in (1, 2, 2, 3) if backend == "native" else (1, 2):
        with threads(count):
            results.append(evaluate(student, teacher, target, backend=backend, **options))
    first = results[0]
    assert first.stats is not None
    assert first.d_student is not None
    assert first.d_teacher is not None
    for other in results[1:]:
        assert other.stats is not None
        assert other.d_student is not None
        assert other.d_teacher is not None
        assert torch.equal(other.loss, first.loss)
        assert torch.equal(other.d_student, first.d_student)
        assert torch.equal(other.d_teacher, first.d_teacher)
        assert all(torch.equal(a, b) for a, b in zip(first.stats, other.stats, strict=True))


def test_a_row_does_not_depend_on_its_place_in_the_batch(backend: str) -> None:
    student, teacher = logits(9, 1000, 0), logits(9, 1000, 1)
    options: dict[str, Any] = {"backend": backend, "reduction": "none", "temperature": 2.0}
    whole = evaluate(student, teacher, **options)
    flipped = evaluate(student.flip(0), teacher.flip(0), **options)
    assert whole.d_student is not None
    assert flipped.d_student is not None
    assert torch.equal(flipped.loss.flip(0), whole.loss)
    assert torch.equal(flipped.d_student.flip(0), whole.d_student)


# Instruction sets

EVERYWHERE = """
    import itertools, json, sys
    sys.path.insert(0, {tests!r})
    import tgt_fast._core, tgt_fast as tgt
    from numerics import check, logits, targets
    from strategies import DTYPES
    from test_latent import assert_like_truth, expected, latents
    from test_latent_ascend import expected as ascended
    from tgt_fast.kernels.options import DIVERGENCES

    for divergence, dtype, classes in itertools.product(DIVERGENCES, DTYPES, (2, 10, 17, 1000, 4099)):
        student, teacher = logits(6, classes, 0, dtype=dtype), logits(6, classes, 1, dtype=dtype)
        student[3, classes // 2 :], teacher[3, classes // 2 :] = -float("inf"), -float("inf")
        check(student, teacher, targets(6, classes, 2), backend="native", divergence=divergence, reduction="none",
              hard_weight=0.5, label_smoothing=0.1, temperature=2.0)
    for size, dtype in itertools.product((1, 17, 257, 4099), DTYPES):
        z, grad, anchor = (latents((5, size), seed, dtype) for seed in range(3))
        for options in ({{}}, {{"truncation": 1.5}}, {{"sphere_radius": "keep"}}):
            out = tgt.perturb_latents(z, 0.5, seed=1, backend="native", **options)
            assert_like_truth(out, expected(z, 0.5, seed=1, **options))
        options = {{"step_size": 2.0, "anchor": anchor, "radius": 0.5, "sigma": 0.2}}
        assert_like_truth(tgt.ascend_latents(z, grad, backend="native", **options), ascended(z, grad, **options))
    print(json.dumps(tgt_fast._core.build_info()["isa"]))
"""


@pytest.mark.parametrize("instructions", ["baseline", "x86_v3"])
def test_narrower_instruction_sets_keep_the_bars(
    native: str, child_environment: dict[str, str], instructions: str
) -> None:
    """A machine of today takes the widest: what the others get is tested by holding it back."""
    environment = {**child_environment, "TGT_FAST_ISA": instructions}
    used = child(EVERYWHERE.format(tests=os.path.dirname(__file__)), environment)
    assert used in (instructions, "baseline")


# Memory

PEAK = """
    import json, torch, tgt_fast as tgt

    def peak():  # bytes; VmHWM counts this program alone, ru_maxrss would begin with its parent's
        with open("/proc/self/status") as lines:
            return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    def run(rows):
        root = torch.zeros(1, dtype={dtype}, requires_grad={student})
        student = torch.empty(rows, 32000, dtype={dtype}).uniform_()
        if {inplace}:
            student.add_(root)
        else:
            student.requires_grad_({student})
        teacher = torch.empty(rows, 32000, dtype={dtype}).uniform_().requires_grad_({teacher})
        before = peak()
        loss, _ = tgt.distillation_loss(
            student, teacher, torch.arange(rows), temperature=2.0, hard_weight=0.5, divergence="{divergence}",
            inplace={inplace}, return_stats=True, backend="native",
        )
        if loss.requires_grad:
            loss.backward()
        return peak() - before

    run(4)  # what is loaded at first use is no part of a call
    print(json.dumps(run({rows})))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak of resident memory there")
@pytest.mark.parametrize(
    ("buffers", "changes"),
    [
        (1, {}),
        (1, {"dtype": "torch.bfloat16", "rows": 1024, "divergence": "jsd"}),
        (1, {"dtype": "torch.float16", "rows": 1024}),
        (2, {"teacher": True}),
        (0, {"student": False}),
        (0, {"inplace": True}),
    ],
    ids=["student", "bf16 jsd", "fp16", "student and teacher", "no gradient", "inplace"],
)
def test_peak_memory_is_one_buffer_a_gradient(
    native: str, child_environment: dict[str, str], buffers: int, changes: dict[str, Any]
) -> None:
    """Beside the logits, 62.5 MiB each, nothing of their size lives but the gradients that were asked for."""
    settings = {
        "rows": 512, "dtype": "torch.float32", "divergence": "forward_kl", "student": True, "teacher": False,
        "inplace": False, **changes,
    }  # fmt: skip
    extra, wanted = child(PEAK.format(**settings), child_environment) / MIB, buffers * 62.5
    assert wanted - 12 <= extra <= wanted + 12


# Forks. torch's own parallel loops hang in a forked child, so the children use them with one thread only.

FORK = """
    import json, os, signal, torch, tgt_fast as tgt

    student, teacher = torch.randn(512, 4099), torch.randn(512, 4099)
    z = torch.zeros(4096, 512)

    def compute(threads):
        torch.set_num_threads(threads)
        loss, _ = tgt.distillation_loss(student, teacher, return_stats=True, reduction="none", backend="native")
        noisy = tgt.perturb_latents(z, 1.0, backend="native")
        moved = tgt.ascend_latents(z, noisy, step_size=1.0, anchor=z, radius=0.5, backend="native")
        torch.set_num_threads(1)
        return loss, noisy, moved

    def same(results):
        return all(torch.equal(a, b) for a, b in zip(results, expected))

    def child():
        signal.alarm(30)  # a hang ends here
        if not same(compute(2)):
            os._exit(1)
        grandchild = os.fork()
        if grandchild == 0:
            signal.alarm(15)
            os._exit(0 if same(compute(2)) else 1)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))

    expected = compute({parent_threads})
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            child()
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print(json.dumps([codes, same(compute(2))]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("parent_threads", [1, 2])
def test_a_forked_child_computes_the_same_and_does_not_hang(
    native: str, child_environment: dict[str, str], parent_threads: int
) -> None:
    """The parent has used its threads; none of them lives in the child, nor in the child's child."""
    assert child(FORK.format(parent_threads=parent_threads), child_environment) == [[0, 0, 0], True]


WORKERS = """
    import json, torch, tgt_fast as tgt
    from torch.utils.data import DataLoader, Dataset

    class Perturbed(Dataset):
        def __init__(self):
            self.z = torch.zeros(64, 4099)

        def __len__(self):
            return 16

        def __getitem__(self, index):
            torch.set_num_threads(2)
            noisy = tgt.perturb_latents(self.z, 1.0, seed=index, backend="native")
            loss = tgt.distillation_loss(noisy, self.z, backend="native", reduction="none")
            torch.set_num_threads(1)
            return loss

    data = Perturbed()
    expected = torch.stack([data[i] for i in range(16)])
    loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60)
    print(json.dumps([torch.equal(torch.cat(list(loader)), expected) for epoch in range(2)]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_data_loader_workers_may_call_it(native: str, child_environment: dict[str, str]) -> None:
    assert child(WORKERS, child_environment) == [True, True]


def test_threads_may_call_it_at_the_same_time(native: str) -> None:
    """One caller has the pool, the others work alone: same bits, no deadlock."""
    from concurrent.futures import ThreadPoolExecutor

    student, teacher = logits(256, 1000, 0), logits(256, 1000, 1)

    def run(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        result = evaluate(student, teacher, backend=native, needs=(True, False))
        assert result.d_student is not None
        return result.loss, result.d_student

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(24), timeout=60))
    assert all(torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1]) for loss, grad in results)
