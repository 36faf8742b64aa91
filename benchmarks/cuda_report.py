"""What the compiler made of the CUDA kernels: registers, shared memory, stack frames and spills, a row a kernel.

    python benchmarks/cuda_report.py                       # sm_90
    python benchmarks/cuda_report.py --full                # sm_80, sm_90, sm_100, sm_120
    python benchmarks/cuda_report.py --json report.json

Needs nvcc, no GPU. Exits with 1 when a hot kernel has a stack frame or spills.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEFAULT = ("90",)
FULL = ("80", "90", "100", "120")
# As in CMakeLists.txt.
FLAGS = ("-std=c++17", "-O3", "-DTGT_ISA=device", "--fmad=false", "--prec-sqrt=false", f"-I{ROOT / 'csrc'}")

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
# float64 is for checking, not for speed: its kernels are reported and may spill.
_COLD = re.compile(r"<double|kernel<double")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    architecture: str
    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    hot: bool

    @property
    def bad(self) -> bool:
        return self.hot and (self.stack_bytes > 0 or self.spill_bytes > 0)


def compile_report(source: Path, architecture: str) -> str:
    """The assembler's report on a source file."""
    with tempfile.TemporaryDirectory() as folder:
        target = f"arch=compute_{architecture},code=sm_{architecture}"
        command = ["nvcc", *FLAGS, f"-gencode={target}", "-Xptxas=-v", "-cubin", str(source), "-o", f"{folder}/out"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stderr + done.stdout


def parse(report: str) -> Iterator[Kernel]:
    """The kernels of a report."""
    found = list(_ENTRY.finditer(report))
    for match, name in zip(found, demangle([m["name"] for m in found]), strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        yield Kernel(
            architecture=match["arch"],
            name=name,
            registers=int(match["registers"]),
            shared_bytes=int(shared[1]) if shared else 0,
            stack_bytes=int(match["stack"]),
            spill_bytes=int(match["stores"]) + int(match["loads"]),
            hot=_COLD.search(name) is None,
        )


def demangle(names: list[str]) -> list[str]:
    """Readable names, without namespaces and arguments; as they are where no demangler is installed."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    plain = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = (re.sub(r"\w+::|\(anonymous namespace\)::|<unnamed>::|\(int\)", "", name) for name in plain)
    return [re.sub(r"^void ", "", name).split("(")[0] for name in short]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--full", action="store_true", help=f"sm_{', sm_'.join(FULL)} instead of sm_{DEFAULT[0]}")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("no nvcc on the PATH", file=sys.stderr)
        return 2
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    work = [(source, architecture) for architecture in (FULL if args.full else DEFAULT) for source in sources]
    with ThreadPoolExecutor(args.jobs) as pool:
        reports = pool.map(lambda one: compile_report(*one), work)
        rows = sorted((k for report in reports for k in parse(report)), key=lambda k: (k.architecture, k.name))
    print(f"{'arch':7} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6}  kernel")
    for row in rows:
        mark = " <-- " if row.bad else ""
        print(
            f"{row.architecture:7} {row.registers:9} {row.shared_bytes:7} {row.stack_bytes:6} {row.spill_bytes:6}"
            f"  {row.name}{mark}"
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    bad = [row for row in rows if row.bad]
    print(f"{len(rows)} kernels, {len(bad)} hot ones with a stack frame or spills")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
