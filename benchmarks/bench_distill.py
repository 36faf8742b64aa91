"""Times the distillation loss, forward and backward, against its rivals on this CPU.

    python benchmarks/bench_distill.py [--seconds 6] [--save]

Every row is checked against the float64 reference before it is timed. Rivals: eager PyTorch, torch.compile, and Liger's
kernels where they run (they need a GPU). Bytes: each logit read once and each student gradient written once,
3 * N * C * element size; `copy` moves as many bytes by plain tensor copies in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

import tgt_fast as tgt

TEMPERATURE = 2.0
SHAPES = [
    (1024, 32000, torch.float32, "forward_kl"),
    (1024, 32000, torch.bfloat16, "forward_kl"),
    (1024, 32000, torch.float32, "reverse_kl"),
    (1024, 32000, torch.float32, "jsd"),
    (1024, 32000, torch.float32, "tvd"),
    (1024, 1000, torch.float32, "forward_kl"),
    (128, 10, torch.float32, "forward_kl"),
]


def plain_loss(student: Tensor, teacher: Tensor, target: Tensor, divergence: str) -> Tensor:
    """The loss as a PyTorch user writes it, in the dtype of the logits."""
    log_q = F.log_softmax(student / TEMPERATURE, dim=-1)
    log_p = F.log_softmax(teacher / TEMPERATURE, dim=-1)
    if divergence == "forward_kl":
        soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    elif divergence == "reverse_kl":
        soft = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    elif divergence == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
        soft = (
            F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
            + F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
        ) / 2
    else:
        soft = (log_p.exp() - log_q.exp()).abs().sum(dim=-1).mean() / 2
    return soft * TEMPERATURE**2 + F.cross_entropy(student, target)


def our_loss(student: Tensor, teacher: Tensor, target: Tensor, divergence: str, backend: str = "native") -> Tensor:
    return tgt.distillation_loss(
        student, teacher, target, divergence=divergence, temperature=TEMPERATURE, hard_weight=1.0, backend=backend
    )


def inputs(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = (2 * torch.randn(rows, classes, generator=generator)).to(dtype).requires_grad_()
    teacher = (2 * torch.randn(rows, classes, generator=generator)).to(dtype)
    return student, teacher, torch.randint(0, classes, (rows,), generator=generator)


def check(rows: int, classes: int, dtype: torch.dtype, divergence: str) -> float:
    """Relative error of the student's gradient against the float64 reference, on a slice of the rows."""
    student, teacher, target = inputs(min(rows, 32), classes, dtype)
    (ours,) = torch.autograd.grad(our_loss(student, teacher, target, divergence), student)
    truth_in = student.detach().double().requires_grad_()
    loss = our_loss(truth_in, teacher.double(), target, divergence, "reference")
    (truth,) = torch.autograd.grad(loss, truth_in)
    error = harness.relative_error(ours, truth, 1e-2 * TEMPERATURE / len(target) ** 0.5)
    if not error < (1e-5 if dtype == torch.float32 else 5e-3):
        sys.exit(f"{divergence} {rows} x {classes} {dtype}: gradient error {error:.2e}; nothing was timed")
    return error


def backward_of(loss: Callable[..., Tensor], student: Tensor, *rest: Any) -> Callable[[], None]:
    def step() -> None:
        student.grad = None
        loss(student, *rest).backward()

    return step


def liger(rows: int, classes: int) -> str:
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        return "not installed"
    return "runs on a GPU alone" if not torch.cuda.is_available() else "see the GPU benchmark"


def bench(rows: int, classes: int, dtype: torch.dtype, divergence: str, seconds: float) -> dict[str, Any]:
    error = check(rows, classes, dtype, divergence)
    student, teacher, target = inputs(rows, classes, dtype)
    compiled = torch.compile(plain_loss)
    written = torch.empty_like(student)
    source = student.detach()

    def copy() -> None:  # as many bytes as the loss has to move: two matrices read, one written
        written.copy_(source)
        written[: rows // 2].copy_(teacher[: rows // 2])

    calls = {
        "ours": backward_of(our_loss, student, teacher, target, divergence),
        "eager": backward_of(plain_loss, student, teacher, target, divergence),
        "compile": backward_of(compiled, student, teacher, target, divergence),
        "copy": copy,
    }
    milliseconds = harness.interleave(calls, seconds=seconds)
    return {
        "rows": rows,
        "classes": classes,
        "dtype": str(dtype).removeprefix("torch."),
        "divergence": divergence,
        "milliseconds": milliseconds,
        "over_eager": milliseconds["eager"] / milliseconds["ours"],
        "over_compile": milliseconds["compile"] / milliseconds["ours"],
        "gradient_error": error,
        "liger": liger(rows, classes),
    }


def peak(which: str, rows: int, classes: int) -> float:
    """Peak extra memory of a forward and a backward, in units of the student's logits."""
    loss = our_loss if which == "ours" else plain_loss
    loss(*inputs(2, 4, torch.float32), "forward_kl").backward()  # what is loaded at first use is no part of a call
    student = torch.empty(rows, classes).uniform_().requires_grad_()  # in place: the peak is still to come
    teacher = torch.empty(rows, classes).uniform_()
    target = torch.arange(rows)
    before = harness.peak_mib()
    loss(student, teacher, target, "forward_kl").backward()
    return (harness.peak_mib() - before) / (rows * classes * 4 / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="time a row may take")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/distill-cpu.json")
    parser.add_argument("--peak", choices=("ours", "eager"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(arguments.peak, 1024, 32000))
        return
    rows = []
    for shape in SHAPES:
        row = bench(*shape, seconds=arguments.seconds)
        if shape[:2] == (1024, 32000) and shape[2:] == (torch.float32, "forward_kl"):
            row["peak_extra"] = {who: harness.in_fresh_process(__file__, "--peak", who) for who in ("ours", "eager")}
        ms = row["milliseconds"]
        print(
            f"{row['divergence']:>11} {row['rows']:>5} x {row['classes']:<6} {row['dtype']:<9} "
            f"ours {ms['ours']:9.3f} ms   eager {row['over_eager']:5.1f}x   compile {row['over_compile']:5.1f}x   "
            f"copy {ms['copy'] / ms['ours']:6.1%}   error {row['gradient_error']:.1e}",
            flush=True,
        )
        if "peak_extra" in row:
            print("            peak extra memory, in gradient buffers:", row["peak_extra"])
        rows.append(row)
    if arguments.save:
        print(harness.save("distill-cpu", rows, "python benchmarks/bench_distill.py --save"))


if __name__ == "__main__":
    main()
