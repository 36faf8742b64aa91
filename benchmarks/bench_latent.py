"""Times perturb and ascend against eager PyTorch and torch.compile on this CPU.

    python benchmarks/bench_latent.py [--seconds 6] [--save]

Each op is checked against the float64 reference before it is timed. 16 MiB of float32 latents: 1024 samples of 4,096
numbers, and 128 of 32,768. `copy` reads and writes as many bytes as the op has to: each input once, the output once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor

import tgt_fast as tgt

SHAPES = [(1024, 4096), (128, 32768)]
STEP, RADIUS, SIGMA = 0.5, 1.0, 0.3


def plain_perturb(z: Tensor, grad: Tensor, anchor: Tensor) -> Tensor:
    return z + SIGMA * torch.randn_like(z)


def plain_ascend(z: Tensor, grad: Tensor, anchor: Tensor) -> Tensor:
    length = grad.norm(dim=1, keepdim=True)
    moved = z + STEP * torch.where(length > 0, grad / length, 0.0)
    away = moved - anchor
    distance = away.norm(dim=1, keepdim=True)
    return anchor + away * (RADIUS / distance).clamp(max=1.0)


def plain_noisy_ascend(z: Tensor, grad: Tensor, anchor: Tensor) -> Tensor:
    return plain_ascend(z + SIGMA * torch.randn_like(z), grad, anchor)


def our_perturb(z: Tensor, grad: Tensor, anchor: Tensor, backend: str = "native") -> Tensor:
    return tgt.perturb_latents(z, SIGMA, seed=1, backend=backend)


def our_ascend(z: Tensor, grad: Tensor, anchor: Tensor, backend: str = "native") -> Tensor:
    return tgt.ascend_latents(z, grad, step_size=STEP, anchor=anchor, radius=RADIUS, backend=backend)


def our_noisy_ascend(z: Tensor, grad: Tensor, anchor: Tensor, backend: str = "native") -> Tensor:
    return tgt.ascend_latents(
        z, grad, step_size=STEP, anchor=anchor, radius=RADIUS, sigma=SIGMA, seed=1, backend=backend
    )


OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {  # ours, plain, matrices read and written
    "perturb": (our_perturb, plain_perturb, 2),
    "ascend": (our_ascend, plain_ascend, 4),
    "ascend with noise": (our_noisy_ascend, plain_noisy_ascend, 4),
}


def bench(op: str, samples: int, size: int, seconds: float) -> dict[str, Any]:
    ours, plain, matrices = OPS[op]
    generator = torch.Generator().manual_seed(0)
    z, grad, other = (torch.randn(samples, size, generator=generator) for _ in range(3))
    anchor = z + 0.02 * other
    error = float((ours(z, grad, anchor)[:8] - ours(z, grad, anchor, backend="reference")[:8]).abs().max())
    if not error < 2e-6:
        sys.exit(f"{op} {samples} x {size}: error {error:.2e}; nothing was timed")
    compiled = torch.compile(plain)
    written = torch.empty_like(z)

    def copy() -> None:  # a copy moves two matrices' worth
        for _ in range(matrices // 2):
            written.copy_(z)

    calls = {
        "ours": lambda: ours(z, grad, anchor),
        "eager": lambda: plain(z, grad, anchor),
        "compile": lambda: compiled(z, grad, anchor),
        "copy": copy,
    }
    milliseconds = harness.interleave(calls, seconds=seconds)
    return {
        "op": op,
        "samples": samples,
        "size": size,
        "milliseconds": milliseconds,
        "over_eager": milliseconds["eager"] / milliseconds["ours"],
        "over_compile": milliseconds["compile"] / milliseconds["ours"],
        "error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="time a row may take")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/latent-cpu.json")
    arguments = parser.parse_args()
    rows = []
    for op in OPS:
        for samples, size in SHAPES:
            row = bench(op, samples, size, arguments.seconds)
            ms = row["milliseconds"]
            print(
                f"{op:>17} {samples:>5} x {size:<6} ours {ms['ours']:8.3f} ms   eager {row['over_eager']:5.1f}x   "
                f"compile {row['over_compile']:5.1f}x   copy {ms['copy'] / ms['ours']:6.1%}   error {row['error']:.1e}",
                flush=True,
            )
            rows.append(row)
    if arguments.save:
        print(harness.save("latent-cpu", rows, "python benchmarks/bench_latent.py --save"))


if __name__ == "__main__":
    main()
