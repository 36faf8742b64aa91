"""Results of compiling the Triton kernels: registers, shared memory and spills, a row a kernel and configuration.

    python benchmarks/triton_report.py                     # sm_90
    python benchmarks/triton_report.py --full              # sm_80, sm_90, sm_100 and gfx942
    python benchmarks/triton_report.py --json report.json
    python benchmarks/triton_report.py --if-changed --save # unless results/triton-kernels.json is of the same

Needs Triton, no GPU: everything is compiled ahead of time. Exits with 1 when a hot kernel spills, or when one asks for
more shared memory than the chip has.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import compiled
import torch

import tgt_fast
from tgt_fast.kernels.options import DIVERGENCES
from tgt_fast.kernels.triton.distill import grain_of
from tgt_fast.kernels.triton.tuning import (
    LATENT_REGISTERS,
    LISTWISE_BLOCK,
    LISTWISE_WARPS,
    SOFT_REGISTERS,
    SoftPlan,
    adjusted_plan,
    adjusted_registers,
    elementwise_plan,
    latent_plan,
    shipped_plan,
    slope_width,
    soft_plan,
    streaming_of,
)

NAME = "triton-kernels"
DEFAULT = ("sm_90",)
FULL = ("sm_80", "sm_90", "sm_100", "gfx942")
# Bytes of shared memory that a block may ask for; the LDS of a workgroup.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
CLASSES = (10, 4096, 128256)  # a row of every kind of plan
POINTERS = {"target": "i64", "weight": "fp64", "divisor_at": "fp64", "ids": "i64", "seed_at": "i64", "step_at": "i64"}
POINTERS |= dict.fromkeys(("margin", "student_temperature", "teacher_temperature"), "fp64")
INTEGERS = re.compile(
    r"rows|classes|digits|tiles|samples|size|replica|positions|splits|width|op_step|seed_(low|high)|\w+_index|\w*stride"
)
ALIGNED = re.compile(r"classes|size|width|\w*stride")


@dataclass(frozen=True)
class Job:
    """A kernel with its constants."""

    module: str
    kernel: str
    architecture: str
    label: str
    types: dict[str, str]  # of what is not in POINTERS
    constants: dict[str, Any]
    warps: int
    hot: bool = True
    registers: int | None = None  # a thread may have


@dataclass(frozen=True)
class Row:
    """The report of one kernel."""

    architecture: str
    kernel: str
    label: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    hot: bool
    problems: list[str] = field(default_factory=list)


def distill_jobs(architecture: str) -> Iterator[Job]:
    """The least and the most that a forward and a backward do, for every divergence and kind of plan."""
    for classes in CLASSES:
        for number, divergence in enumerate((*DIVERGENCES, "none")):
            for kind in ("bf16", "fp32", "fp64"):
                is_fp64 = kind == "fp64"
                if is_fp64 and number % 4:
                    continue  # it is for checking, not for speed
                for whole in (False, True):
                    yield from _distill(architecture, classes, divergence, kind, is_fp64, whole)


def _distill(architecture: str, classes: int, divergence: str, kind: str, is_fp64: bool, whole: bool) -> Iterator[Job]:
    plan, real = shipped_plan(classes, is_fp64), "fp64" if is_fp64 else "fp32"
    pointers = dict.fromkeys(("student", "teacher", "d_student", "d_teacher"), kind)
    pointers |= dict.fromkeys(("row_loss", "row_state", "upstream"), real)
    constants: dict[str, Any] = {
        "DIVERGENCE": divergence, "SMOOTHED": whole, "POWER": 0 if whole or divergence in ("mse", "none") else 2,
        "IS_FP64": is_fp64, "GRAIN": grain_of(classes), "weight": None,
    }  # fmt: skip
    if divergence == "none":
        constants["teacher"] = None
    if not whole:
        constants |= {"target": None, "divisor_at": None, "d_teacher": None}
    cut = {"ROWS": plan.rows, "BLOCK": plan.block}
    registers = None
    name, label = "distill_fwd_kernel", f"{divergence} {kind} {classes}" + (", all options" if whole else "")
    if plan.kernel == "stream":
        name = "distill_fwd_stream_kernel"
        cut["STAGES"], registers = streaming_of(divergence)
    yield Job(
        "distill_kernels", name, architecture, label, pointers, constants | cut, plan.warps, not is_fp64, registers
    )
    tile = elementwise_plan(plan)
    cut = {"ROWS": tile.rows, "BLOCK": tile.block, "UPSTREAM_PER_ROW": whole, "WHOLE": classes <= tile.block}
    yield Job(
        "distill_finish", "distill_bwd_kernel", architecture, label, pointers, constants | cut, tile.warps, not is_fp64
    )


# (form, divergence): one of each way that the adjusted kernel has through a row
ADJUSTED = (
    ("plain", "forward_kl"), ("plain", "reverse_kl"), ("plain", "symmetric"), ("plain", "jsd"), ("plain", "tvd"),
    ("plain", "cross_entropy"), ("plain", "mse"), ("plain", "none"), ("decoupled", "forward_kl"),
    ("corrected", "forward_kl"), ("skewed", "jsd"), ("mirrored", "jsd"),
)  # fmt: skip


def adjusted_jobs(architecture: str) -> Iterator[Job]:
    """The least and the most that the adjusted kernel does, for every form and divergence."""
    for classes in CLASSES:
        for number, (form, divergence) in enumerate(ADJUSTED):
            for kind in ("bf16", "fp32", "fp64"):
                is_fp64 = kind == "fp64"
                if (is_fp64 and number % 4) or (kind == "fp32" and classes == 4096):
                    continue
                for whole in (False, True):
                    yield from _adjusted(architecture, classes, form, divergence, kind, whole)


def _adjusted(
    architecture: str, classes: int, form: str, divergence: str, kind: str, whole: bool
) -> Iterator[Job]:  # fmt: skip
    is_fp64 = kind == "fp64"
    real, plan = "fp64" if is_fp64 else "fp32", adjusted_plan(128, classes, is_fp64, torch.device("cuda"))
    cut = {"IS_FP64": is_fp64, "GRAIN": grain_of(classes), "ROWS": plan.rows, "BLOCK": plan.block}
    pointers = dict.fromkeys(("student", "teacher", "d_student", "d_teacher"), kind)
    pointers |= {"student_bias": real, "teacher_bias": real, "row_loss": real, "row_state": "fp64"}
    constants: dict[str, Any] = {
        "DIVERGENCE": divergence, "FORM": form, "STANDARDIZED": whole and divergence != "none",
        "HARD": whole or divergence == "none", "SMOOTHED": whole, **cut,
    }  # fmt: skip
    if divergence == "none":
        constants["teacher"] = None
    if not whole:
        constants |= dict.fromkeys(("margin", "student_temperature", "teacher_temperature", "d_teacher"))
        if form not in ("decoupled", "corrected") and divergence != "none":
            constants["target"] = None
        constants["weight"] = constants["divisor_at"] = None
    label = f"{form if form != 'plain' else divergence} {kind} {classes}" + (", all options" if whole else "")
    yield Job(
        "adjusted_kernels", "distill_adjusted_kernel", architecture, label, pointers, constants, plan.warps,
        not is_fp64, adjusted_registers(divergence, is_fp64),
    )  # fmt: skip
    if form == "plain" and divergence == "forward_kl":
        constants = {"STANDARDIZED": whole, **cut}
        yield Job(
            "adjusted_statistics", "distill_adjusted_stats_kernel", architecture, label, pointers | {"stats": real},
            constants, plan.warps, not is_fp64,
            adjusted_registers(divergence, is_fp64),
        )  # fmt: skip


def small_jobs(architecture: str) -> Iterator[Job]:
    """The kernels round the rows."""
    tile = elementwise_plan(shipped_plan(128256, False))
    pointers = {"student": "bf16", "teacher": "bf16", "stats": "fp32", "row_loss": "fp32", "loss": "fp32"}
    constants: dict[str, Any] = {"IS_FP64": False, "GRAIN": 8, "BLOCK": tile.block}
    yield Job("distill_kernels", "distill_stats_kernel", architecture, "bf16", pointers, constants, tile.warps)
    pointers["divisor"] = "fp64"
    for name in ("distill_count_kernel", "distill_reduce_kernel"):
        yield Job("distill_kernels", name, architecture, "", pointers, {"BLOCK": 2048}, 8)
    constants = {"PER_ROW": False, "GRAIN": 8, "ROWS": 1, "BLOCK": tile.block}
    pointers = {"grad": "bf16", "factor": "fp32"}
    yield Job("distill_finish", "distill_scale_kernel", architecture, "bf16", pointers, constants, tile.warps)


def latent_jobs(architecture: str) -> Iterator[Job]:
    """Every phase of perturb and ascend, with and without what can be left out."""
    device = torch.device("cuda")  # only tells the GPU's table from the interpreter's
    names = ("z", "out", "grad", "anchor", "scale", "sigma_at", "step_at_", "radius_at")
    pointers = {**dict.fromkeys(names, "fp32"), **dict.fromkeys(("before", "after", "squares", "distances"), "fp64")}
    for size, phases in ((64, ("whole",)), (4096, ("whole",)), (1 << 20, ("measure", "write"))):
        plan = latent_plan(128, size, alone=False, device=device)
        cut = {"IS_FP64": False, "ROWS": plan.rows, "BLOCK": plan.block}
        for phase in phases:
            for truncated in (False, True):
                constants = {"PHASE": phase, "SPHERE": "keep", "TRUNCATED": truncated, **cut}
                label = f"{phase} {size}" + (" truncated" if truncated else "")
                yield Job(
                    "latent_kernels", "latent_perturb_kernel", architecture, label, pointers, constants, plan.warps,
                    not truncated, LATENT_REGISTERS,
                )  # fmt: skip
        for phase in ("norm", "distance", "write") if len(phases) > 1 else phases:
            for norm, radius_norm in (("l2", "l2"), ("linf", "linf"), ("raw", "l2")):
                constants = {"PHASE": phase, "NORM": norm, "RADIUS_NORM": radius_norm, "NOISE": True, **cut}
                yield Job(
                    "latent_kernels", "latent_ascend_kernel", architecture, f"{phase} {norm} {size}", pointers,
                    constants, plan.warps, registers=LATENT_REGISTERS,
                )  # fmt: skip
    plan = latent_plan(128, 1 << 20, alone=True, device=device)
    constants = {"PHASE": "whole", "SPHERE": "none", "TRUNCATED": False, "IS_FP64": False}
    constants |= {"ROWS": plan.rows, "BLOCK": plan.block}
    yield Job(
        "latent_kernels",
        "latent_perturb_kernel",
        architecture,
        "no sphere",
        pointers,
        constants,
        plan.warps,
        registers=LATENT_REGISTERS,
    )


def soft_cut(plan: SoftPlan) -> dict[str, int]:
    """A plan as constants of a kernel."""
    return {"ROWS": plan.rows, "CLASSES": plan.classes, "WIDTH": plan.width}


def soft_jobs(architecture: str) -> Iterator[Job]:
    """The soft embedding, forward and both gradients, with and without noise, by the type of the table."""
    device = torch.device("cuda")  # only tells the GPU's table from the interpreter's
    precision = "tf32x3" if architecture.startswith("sm_") else "ieee"
    state = dict.fromkeys(("sums", "largest", "total", "highest", "centre", "mean", "share"), "fp32") | {
        "chosen": "i64"
    }
    for kind, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        plan = soft_plan(512, 30522, 384, dtype, device)
        cut = soft_cut(plan)
        pointers = state | dict.fromkeys(("logits", "table", "d_out", "d_logits", "d_table"), kind)
        for noise in (False, True):
            constants: dict[str, Any] = {"GUMBEL": noise, "PRECISION": precision, **cut}
            if not noise:
                constants |= {"ids": None}
            label = kind + (" gumbel" if noise else "")
            for name in ("soft_fwd_kernel", "soft_mean_kernel", "soft_bwd_logits_kernel", "soft_bwd_table_kernel"):
                own: dict[str, Any] = {}
                if name == "soft_fwd_kernel":
                    own = {"HARD": False, "chosen": None, **soft_cut(plan.forward(noise))}
                if name in ("soft_mean_kernel", "soft_bwd_logits_kernel"):
                    own["WIDTH"] = slope_width(plan, dtype)
                yield Job(
                    "tokens_kernels", name, architecture, label, pointers, constants | own, plan.warps,
                    registers=SOFT_REGISTERS,
                )  # fmt: skip
    constants = {"GUMBEL": True, "PRECISION": precision, "HARD": True, "sums": None, **soft_cut(plan.forward(True))}
    pointers = state | {"logits": "bf16", "table": "bf16"}
    yield Job(
        "tokens_kernels", "soft_fwd_kernel", architecture, "hard bf16", pointers, constants, plan.warps,
        registers=SOFT_REGISTERS,
    )  # fmt: skip


def listwise_jobs(architecture: str) -> Iterator[Job]:
    """With the gradient, by the student's type."""
    names = ("weights", "suffix")
    for kind in ("fp32", "bf16"):
        pointers = dict.fromkeys(names, "fp32") | dict.fromkeys(("student", "d_student"), kind)
        pointers |= {"order": "i64", "factor": "fp64", "loss": "fp64"}
        constants = {"WANT_D": True, "IS_FP64": False, "BLOCK": LISTWISE_BLOCK}
        yield Job("listwise_kernels", "listwise_kernel", architecture, kind, pointers, constants, LISTWISE_WARPS)


def compile_job(job: Job) -> Row:
    """Compiles it, in a process of its own pool, and reads the machine code's resources."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"tgt_fast.kernels.triton.{job.module}"), job.kernel)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, name in enumerate(function.arg_names):
        pointer = job.types.get(name) or POINTERS.get(name)
        if name in job.constants:
            signature[name], constants[(place,)] = "constexpr", job.constants[name]
        elif pointer is not None:
            signature[name] = f"*{pointer}"
        else:
            signature[name] = "i32" if INTEGERS.fullmatch(name) else "fp32"
        specialised = ALIGNED.fullmatch(name) and not function.params[place].do_not_specialize
        if signature[name].startswith("*") or (signature[name] == "i32" and specialised):
            attributes[(place,)] = [["tt.divisibility", 16]]
    nvidia = job.architecture.startswith("sm_")
    target = GPUTarget("cuda", int(job.architecture[3:]), 32) if nvidia else GPUTarget("hip", job.architecture, 64)
    options = {"num_warps": job.warps, "enable_fp_fusion": False}
    if nvidia and job.registers is not None:
        options["maxnreg"] = job.registers
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        made = triton.compile(ASTSource(function, signature, constants, attributes), target=target, options=options)
        registers, spills = _nvidia(made.asm["cubin"], folder) if nvidia else _amd(made.asm["amdgcn"])
    problems = []
    if job.hot and spills:
        problems.append("spills")
    if made.metadata.shared > SHARED[job.architecture]:
        problems.append(f"more than {SHARED[job.architecture]} bytes of shared memory")
    return Row(job.architecture, job.kernel, job.label, registers, made.metadata.shared, spills, job.hot, problems)


def _nvidia(cubin: bytes, folder: str) -> tuple[int, int]:
    """(registers, bytes of stack) of a cubin. These kernels hold no arrays: their stack is what the registers left."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = Path(folder) / "kernel.cubin"
    path.write_bytes(cubin)
    report = subprocess.run(
        [str(tool), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise SystemExit(f"cuobjdump reports no resources:\n{report}")
    return int(found[1]), int(found[2])


def _amd(assembly: str) -> tuple[int, int]:
    """(vector registers, bytes of them that were spilled). Scalar ones spill into vector registers, not to memory."""
    registers, spills = (
        int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # type: ignore[index]
        for name in ("vgpr_count", "vgpr_spill_count")
    )
    return registers, 4 * spills


def made_of() -> str:
    """A hash of the sources and of the compiler."""
    kernels = Path(tgt_fast.__file__).parent / "kernels"
    files = [*(kernels / "triton").glob("*.py"), kernels / "options.py"]
    here = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return compiled.digest(kernels, files, here, importlib.metadata.version("triton"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--full", action="store_true", help=f"{', '.join(FULL)} instead of {DEFAULT[0]}")
    parser.add_argument("--arch", action="append", choices=FULL, help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{NAME}.json")
    parser.add_argument("--if-changed", action="store_true", help="do nothing where that file is of the same kernels")
    args = parser.parse_args()
    if args.save and (args.full or args.arch):
        parser.error(f"--save is for {DEFAULT[0]}")
    before = compiled.known(NAME, made_of()) if args.if_changed else None
    if before is not None:
        print(compiled.words(before))
        return 0
    os.environ.pop("TRITON_INTERPRET", None)
    jobs = [
        job
        for architecture in args.arch or (FULL if args.full else DEFAULT)
        for source in (distill_jobs, adjusted_jobs, small_jobs, latent_jobs, soft_jobs, listwise_jobs)
        for job in source(architecture)
    ]
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(compile_job, jobs, chunksize=4))
    print(f"{'arch':7} {'registers':>9} {'shared':>7} {'spills':>6}  kernel")
    for row in rows:
        mark = f" <-- {', '.join(row.problems)}" if row.problems else ""
        print(
            f"{row.architecture:7} {row.registers:9} {row.shared_bytes:7} {row.spill_bytes:6}"
            f"  {row.kernel} {row.label}{mark}"
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    bad = [row for row in rows if row.problems]
    print(f"{len(rows)} kernels, {len(bad)} with spills or too much shared memory")
    if args.save:
        by = f"Triton {importlib.metadata.version('triton')}"
        compiled.save(NAME, made_of(), by, [asdict(row) for row in rows], len(bad))
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
