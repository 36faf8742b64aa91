"""Results of compiling the CUDA kernels: registers, shared memory, stack frames and spills, a row a kernel.

    python benchmarks/cuda_report.py LIBRARY.so            # of a library that is built: nothing is compiled
    python benchmarks/cuda_report.py                       # compiles for sm_90
    python benchmarks/cuda_report.py --full                # compiles for sm_80, sm_90, sm_100, sm_120
    python benchmarks/cuda_report.py --json report.json
    python benchmarks/cuda_report.py --known               # 0 where benchmarks/results/cuda-kernels.json is of the same
    python benchmarks/cuda_report.py LIBRARY.so --save     # writes that file
    python benchmarks/cuda_report.py --model [LIBRARY.so]  # what its machine code allows, and bars

Needs cuobjdump or nvcc, no GPU. Exits with 1 when a hot kernel has a stack frame or spills, with 2 where a tool is
missing, with 3 when the library holds no device code. ``--model`` (cuda_model.py) also needs nvdisasm, reads sm_90
alone and exits with 1 when a bound misses its bar; its report is benchmarks/results/cuda-model.json.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
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

import compiled
import cuda_cases
import cuda_model
import sass

NAME, MODEL = "cuda-kernels", "cuda-model"
ROOT = Path(__file__).parents[1]
DEFAULT = ("90",)
FULL = ("80", "90", "100", "120")

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# float64 is for checking, not for speed: its kernels are reported and may spill.
_COLD = re.compile(r"<double|kernel<double")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    architecture: str
    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int  # spilled registers lie there too
    spill_bytes: int  # stored and loaded, by the compiler's own count; 0 when the kernel was read from a library
    hot: bool

    @property
    def bad(self) -> bool:
        return self.hot and (self.stack_bytes > 0 or self.spill_bytes > 0)


def flags() -> list[str]:
    """The flags of the build."""
    lines = (ROOT / "cmake" / "cuda_flags.txt").read_text().splitlines()
    return ["-std=c++17", "-O3", *(line for line in lines if line.startswith("-"))]


def compile_report(nvcc: str, source: Path, architecture: str) -> str:
    """The assembler's report on a source file."""
    with tempfile.TemporaryDirectory() as folder:
        target = f"arch=compute_{architecture},code=sm_{architecture}"
        command = [nvcc, *flags(), f"-gencode={target}", "-Xptxas=-v", "-cubin", str(source), "-o", f"{folder}/out"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stderr + done.stdout


def parse(report: str) -> Iterator[Kernel]:
    """The kernels of a compiler's report."""
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


def parse_usage(usage: str) -> Iterator[Kernel]:
    """The kernels of ``cuobjdump --dump-resource-usage``, which prints an ``arch =`` line a device file."""
    for part in re.split(r"\n(?=Fatbin elf code:)", usage):
        architecture = re.search(r"arch = (\S+)", part)
        found = [match.groups() for match in _USAGE.finditer(part)]
        for (_, *numbers), name in zip(found, demangle([each[0] for each in found]), strict=True):
            registers, stack, shared, local = map(int, numbers)
            yield Kernel(
                architecture=architecture[1] if architecture else "",
                name=name,
                registers=registers,
                shared_bytes=shared,
                stack_bytes=max(stack, local),
                spill_bytes=0,
                hot=_COLD.search(name) is None,
            )


def demangle(names: list[str]) -> list[str]:
    """Readable names, without namespaces and arguments; as they are where no demangler is installed."""
    tool = find_tool("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    said = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = (re.sub(r"\w+::|\(anonymous namespace\)::|<unnamed>::|\(int\)", "", name) for name in said)
    plain = (re.sub(r"\(\w+\)(?=-?\d)", "", name) for name in short)  # an enumerator is a cast of a number
    return [re.sub(r"^void ", "", name).split("(")[0] for name in plain]


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: on the PATH, where toolkits are installed, or in Triton's package."""
    folders = ["/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name) or next(filter(None, (shutil.which(name, path=folder) for folder in folders)), None)


def of_library(library: Path, jobs: int) -> list[Kernel]:
    """The kernels of a built library."""
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        print("no cuobjdump: the sources are compiled instead", file=sys.stderr)
        return of_sources(DEFAULT, jobs)
    done = subprocess.run([cuobjdump, "--dump-resource-usage", str(library)], capture_output=True, text=True)
    return list(parse_usage(done.stdout))


def of_sources(architectures: tuple[str, ...], jobs: int) -> list[Kernel]:
    """The kernels of csrc/cuda, compiled for each architecture."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise SystemExit(_missing("nvcc"))
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    work = [(source, architecture) for architecture in architectures for source in sources]
    with ThreadPoolExecutor(jobs) as pool:
        reports = pool.map(lambda one: compile_report(nvcc, *one), work)
        return [kernel for report in reports for kernel in parse(report)]


def cubins(library: Path | None, jobs: int, folder: Path) -> list[Path]:
    """The device code of a library for sm_90, or of the units that the model looks at, in files of a folder."""
    if library is not None:
        cuobjdump = find_tool("cuobjdump")
        if cuobjdump is None:
            raise SystemExit(_missing("cuobjdump"))
        subprocess.run([cuobjdump, "-xelf", "all", str(library.resolve())], cwd=folder, capture_output=True, check=True)
        return sorted(folder.glob("*sm_90*.cubin"))
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise SystemExit(_missing("nvcc"))

    def compile_one(unit: str) -> Path:
        made = folder / f"{unit}.cubin"
        source = ROOT / "csrc" / "cuda" / f"{unit}.cu"
        command = [nvcc, *flags(), "-gencode=arch=compute_90,code=sm_90", "-cubin", str(source), "-o", str(made)]
        subprocess.run(command, check=True)
        return made

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(compile_one, cuda_cases.UNITS))


def modelled(library: Path | None, jobs: int) -> list[cuda_model.Found]:
    """What the model says of each of its cases."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        raise SystemExit(_missing("cuobjdump" if cuobjdump is None else "nvdisasm"))
    cases = cuda_cases.cases(ROOT)
    wanted = re.compile("|".join(f"(?:{case.kernel})" for case in cases))
    kernels: dict[str, tuple[sass.Kernel, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        for cubin in cubins(library, jobs, Path(name)):
            usage = subprocess.run([cuobjdump, "--dump-resource-usage", str(cubin)], capture_output=True, text=True)
            registers = {found[0]: int(found[1]) for found in _USAGE.findall(usage.stdout)}
            called = dict(zip(registers, demangle(list(registers)), strict=True))
            chosen = {mangled for mangled, plain in called.items() if wanted.search(plain)}
            if not chosen:
                continue
            code = subprocess.run([nvdisasm, "-c", "-gi", str(cubin)], capture_output=True, text=True, check=True)
            for kernel in sass.parse(code.stdout, chosen.__contains__):
                mangled, kernel.name = kernel.name, called[kernel.name]
                kernels[kernel.name] = (kernel, registers[mangled])
    sources = sass.Sources(ROOT)
    found = []
    for case in cases:
        of_case = [each for plain, each in kernels.items() if re.search(case.kernel, plain)]
        if not of_case:
            raise SystemExit(f"no code for sm_90 of a kernel like {case.kernel}: is a demangler installed?")
        try:
            found.append(cuda_model.judge(case, *of_case[0], sources))
        except cuda_model.UnknownCodeError as error:
            raise SystemExit(str(error)) from None
    return found


def report_model(library: Path | None, jobs: int, save: bool, target: Path | None) -> int:
    """Prints a line a case and a summary."""
    found = modelled(library, jobs)
    for line in cuda_model.lines(found):
        print(line)
    missed = [one.title for one in found if one.missed]
    print(f"{len(found)} cases, {len(missed)} of them below their bars" + "".join(f"; {title}" for title in missed))
    rows = [asdict(one) for one in found]
    if target:
        target.write_text(json.dumps(rows, indent=1) + "\n")
    if save:
        nvcc = find_tool("nvcc")
        if nvcc is None:
            return _missing("nvcc")
        compiled.save(MODEL, made_of(nvcc, True), f"nvcc, {version(nvcc)}", rows, len(missed))
    return 1 if missed else 0


def version(nvcc: str) -> str:
    """The release of a compiler."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release [^\n]*", said)
    return found[0] if found else said


def made_of(nvcc: str, model: bool = False) -> str:
    """A hash of the sources and of the compiler; of the model's too."""
    sources = [path for folder in ("common", "cuda") for path in (ROOT / "csrc" / folder).iterdir()]
    settings = [ROOT / "cmake" / "cuda_flags.txt", ROOT / "cmake" / "cuda_architectures.cmake"]
    here = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    scripts = [hashlib.sha256(Path(one.__file__).read_bytes()).hexdigest() for one in (sass, cuda_model, cuda_cases)]
    return compiled.digest(ROOT, [*sources, *settings], here, *(scripts if model else ()), version(nvcc))


def _missing(tool: str) -> int:
    print(f"no {tool} on the PATH", file=sys.stderr)
    return 2


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("library", type=Path, nargs="?", help="read this library instead of compiling")
    parser.add_argument("--full", action="store_true", help=f"sm_{', sm_'.join(FULL)} instead of sm_{DEFAULT[0]}")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    parser.add_argument("--quiet", action="store_true", help="only the bad rows and the counts")
    parser.add_argument("--known", action="store_true", help="say whether the committed report is of the same kernels")
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{NAME}.json, or {MODEL}.json")
    parser.add_argument("--model", action="store_true", help="the bounds of the hot kernels, from their machine code")
    args = parser.parse_args()
    nvcc = find_tool("nvcc")
    if args.model and not args.known:
        return report_model(args.library, args.jobs, args.save, args.json)
    if (args.known or args.save) and nvcc is None:
        return _missing("nvcc")
    if args.known:
        assert nvcc is not None
        before = compiled.known(MODEL if args.model else NAME, made_of(nvcc, args.model), bad=args.model)
        print("no report is of these kernels" if before is None else compiled.words(before))
        return 0 if before is not None else 1
    rows = (
        of_library(args.library, args.jobs) if args.library else of_sources(FULL if args.full else DEFAULT, args.jobs)
    )
    rows.sort(key=lambda k: (k.architecture, k.name))
    if not rows:
        print(f"{args.library or 'csrc/cuda'} holds no device code", file=sys.stderr)
        return 3
    print(f"{'arch':7} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6}  kernel")
    for row in rows:
        mark = " <-- " if row.bad else ""
        if row.bad or not args.quiet:
            print(
                f"{row.architecture:7} {row.registers:9} {row.shared_bytes:7} {row.stack_bytes:6} {row.spill_bytes:6}"
                f"  {row.name}{mark}"
            )
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    bad = [row for row in rows if row.bad]
    for architecture in sorted({row.architecture for row in rows}):
        hot = [row.registers for row in rows if row.architecture == architecture and row.hot]
        print(f"{architecture}: {len(hot)} hot kernels, at most {max(hot, default=0)} registers")
    print(f"{len(rows)} kernels, {len(bad)} hot ones with a stack frame or spills")
    if args.save:
        assert nvcc is not None
        compiled.save(NAME, made_of(nvcc), f"nvcc, {version(nvcc)}", [asdict(row) for row in rows], len(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
