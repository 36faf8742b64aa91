"""Is a wheel fit to be shipped? Its files, its library, and an installation in an environment without a compiler.

    python tools/check_wheel.py WHEEL [--wheelhouse DIR] [--borrow PYTHON] [--core-to FILE]

Opens the wheel: files and their digests, py.typed, size, what the library needs and exports, the glibc and libstdc++
that its tag promises, machine code for the architectures that it names. Then installs it with --no-deps --no-index
into a new environment, with an empty PATH but for that environment, and runs tools/wheel_smoke.py there: every op,
the sampler's modes, a cache, fit, tgt-fast doctor. Exits with 1 and says what is wrong.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import elf
from cuda_report import find_tool

SMOKE = Path(__file__).with_name("wheel_smoke.py")
MIB = 2**20
LIMITS = {"cpu": 10 * MIB, "cuda": 40 * MIB}
NEEDED = re.compile(r"libstdc\+\+\.so\.6|libm\.so\.6|libgcc_s\.so\.1|libc\.so\.6|ld-linux.*|lib(pthread|dl|rt)\.so\.\d")
NAME = re.compile(r"tgt_fast-(?P<version>[^-]+)-cp(?P<python>\d+)-(?P<abi>cp\d+t?)-(?P<platform>[^-]+)\.whl")
# libstdc++ of the oldest distribution that a glibc of manylinux stands for: auditwheel's policies.
LIBSTDCXX = {(2, 17): (3, 4, 19), (2, 27): (3, 4, 24), (2, 28): (3, 4, 24), (2, 31): (3, 4, 28), (2, 34): (3, 4, 29),
             (2, 35): (3, 4, 30), (2, 36): (3, 4, 30), (2, 38): (3, 4, 32), (2, 39): (3, 4, 33)}  # fmt: skip


class UnfitError(Exception):
    """What is wrong with a wheel."""


@dataclass(frozen=True)
class Opened:
    """A wheel whose files are right."""

    path: Path
    version: str
    platform: str
    core: str  # the library's name in it
    library: elf.Library
    data: bytes  # the library

    @property
    def label(self) -> str:
        """The local part of the version: "cpu", "cu130", or nothing."""
        return self.version.partition("+")[2]


def check(condition: bool, message: str) -> None:
    if not condition:
        raise UnfitError(message)


def open_wheel(path: Path) -> Opened:
    """Looks at the files."""
    name = NAME.fullmatch(path.name)
    check(name is not None, f"{path.name} is no name of a wheel of one CPython")
    assert name is not None
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        info = f"tgt_fast-{name['version']}.dist-info"
        outside = sorted(n for n in names if not n.startswith(("tgt_fast/", f"{info}/")))
        check(not outside, f"files outside the package: {outside[:3]}")
        odd = [n for n in names if n.endswith((".pyc", ".a", ".o", ".cpp", ".cu", ".h")) or "/csrc/" in n]
        check(not odd, f"sources or products of a build: {odd[:3]}")
        for wanted in ("tgt_fast/py.typed", "tgt_fast/_core.pyi", "tgt_fast/cli.py", f"{info}/METADATA"):
            check(wanted in names, f"{wanted} is missing")
        check(any(n.startswith(info) and n.endswith("LICENSE") for n in names), "the licence is missing")
        cores = [n for n in names if re.fullmatch(r"tgt_fast/_core\..*\.(so|pyd)", n)]
        check(len(cores) == 1, f"one compiled core is expected, found {cores}")
        check(f"cpython-{name['python']}" in cores[0], f"{cores[0]} is not of the Python in the wheel's name")
        _check_record(wheel, info)
        metadata = wheel.read(f"{info}/METADATA").decode()
        version = re.search(r"^Version: (.*)$", metadata, re.M)
        check(version is not None and version[1] == name["version"], "name and metadata give two versions")
        check("Requires-Python: >=3.10\n" in metadata, "METADATA does not ask for Python 3.10")
        data = wheel.read(cores[0])
    try:
        library = elf.read(data)
    except ValueError as error:
        raise UnfitError(f"{cores[0]}: {error}") from None
    return Opened(path, name["version"], name["platform"], cores[0], library, data)


def _check_record(wheel: zipfile.ZipFile, info: str) -> None:
    rows = list(csv.reader(wheel.read(f"{info}/RECORD").decode().splitlines()))
    listed = {row[0] for row in rows}
    files = {name for name in wheel.namelist() if not name.endswith("/")}
    check(listed == files, f"RECORD and the files differ in {sorted(listed ^ files)[:3]}")
    for name, digest, _ in rows:
        if digest:
            found = base64.urlsafe_b64encode(hashlib.sha256(wheel.read(name)).digest()).rstrip(b"=").decode()
            check(digest == f"sha256={found}", f"{name} is not what RECORD says")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version)) or "none"


def check_library(wheel: Opened) -> str:
    """What it needs, exports and asks of the system; said in a line."""
    library = wheel.library
    check(wheel.platform.endswith(library.machine), f"the library is for {library.machine}")
    strange = [name for name in library.needed if not NEEDED.fullmatch(name)]
    check(not strange, f"the core needs {strange}")  # libtorch, libc10, libcudart, libcuda, libgomp, libpython
    check(not library.paths, f"the core looks for libraries in {library.paths}")
    check(library.exports == ["PyInit__core"], f"the core exports {library.exports[:5]}")
    glibc, libstdcxx = library.floor("GLIBC"), library.floor("GLIBCXX")
    tags = [tuple(map(int, found)) for found in re.findall(r"manylinux_(\d+)_(\d+)_", wheel.platform)]
    if tags:
        promised = max(tags)
        check(glibc <= promised, f"the core needs glibc {_dotted(glibc)}, its tag promises {_dotted(promised)}")
        highest = max((value for key, value in LIBSTDCXX.items() if key <= promised), default=())
        check(libstdcxx <= highest, f"the core needs GLIBCXX_{_dotted(libstdcxx)}, its tag promises {_dotted(highest)}")
    return f"glibc {_dotted(glibc)}, libstdc++ {_dotted(libstdcxx)}{'' if tags else ', no manylinux tag'}"


def check_device_code(wheel: Opened, info: dict[str, Any], library: Path) -> str:
    """That the label, the size and the machine code are those of what the core says it was built for."""
    kind = "cuda" if info["cuda"] else "cpu"
    size = wheel.path.stat().st_size
    check(
        size < LIMITS[kind],
        f"the wheel has {size / MIB:.1f} MiB; one of kind {kind} must stay under {LIMITS[kind] // MIB}",
    )
    expected = "cu" + "".join(info["cuda"].split(".")[:2]) if info["cuda"] else "cpu"
    check(wheel.label in ("", expected), f"the wheel is labelled +{wheel.label}, its core is +{expected}")
    if kind == "cpu":
        return "no CUDA"
    said = f"CUDA {info['cuda']} for {info['cuda_architectures']}"
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        return f"{said} (skipped: no cuobjdump to look at the machine code)"
    entries = [entry.partition("-") for entry in info["cuda_architectures"].split(";")]
    for option, absent in (("--list-elf", "virtual"), ("--list-ptx", "real")):
        listed = subprocess.run([cuobjdump, option, str(library)], capture_output=True, text=True).stdout
        found = set(re.findall(r"\.sm_(\w+)\.", listed))
        wanted = {number for number, _, only in entries if only != absent}
        check(found == wanted, f"{option} finds {sorted(found)}, the core was built for {sorted(wanted)}")
    return said


def install(wheel: Path, folder: Path, wheelhouse: Path | None, borrow: str) -> Path:
    """The Python of a new environment that has the wheel; dependencies from a wheelhouse, or from another Python."""
    subprocess.run([borrow, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-index", "--no-compile"]
    try:
        subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
        if wheelhouse is not None:
            subprocess.run([*pip, "--find-links", str(wheelhouse), str(wheel)], check=True)
    except subprocess.CalledProcessError:
        raise UnfitError("pip does not install it without an index") from None
    if wheelhouse is None:
        ask = "import sys, json; print(json.dumps([p for p in sys.path if p.endswith('-packages')]))"
        lent = json.loads(subprocess.run([borrow, "-c", ask], capture_output=True, text=True, check=True).stdout)
        (site,) = folder.glob("lib/python3*/site-packages")
        (site / "borrowed.pth").write_text("\n".join(lent) + "\n")  # behind what is installed here
    return python


def smoke(python: Path, scratch: Path) -> dict[str, Any]:
    """Runs wheel_smoke.py in that environment, with nothing else of this one; what it says."""
    home = scratch / "home"
    home.mkdir()
    environment = {"PATH": str(python.parent), "HOME": str(home), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    site = next(python.parents[1].glob("lib/python3*/site-packages"))
    done = subprocess.run(
        [str(python), "-I", str(SMOKE), str(site)], cwd=home, env=environment, capture_output=True, text=True
    )
    check(done.returncode == 0, f"the smoke test failed:\n{done.stdout}{done.stderr}")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:
        return os.environ.get("TGT_FAST_COMMIT", "unknown")


def note(file: Path, wheel: Path, said: dict[str, Any], system: str) -> None:
    """Puts what ran into a result file, in the place of the row of the same wheel and versions."""
    record = json.loads(file.read_text()) if file.exists() else {}
    size = wheel.stat().st_size
    row = {"wheel": wheel.name, "bytes": size, "needs": system, "versions": said["versions"], "ran": said["ran"]}
    row["commit"] = _commit()
    row["hardware"] = said["hardware"]
    rows = record.get("rows", [])
    old = next((r for r in rows if (r["wheel"], r["versions"]) == (row["wheel"], row["versions"])), {})
    rows = [r for r in rows if r is not old]
    rows.append({**row, **({"tests": old["tests"]} if "tests" in old else {})})
    made = {
        "command": "python tools/check_wheel.py WHEEL --note benchmarks/results/wheels.json",
        "seeds": [0],
        **record,
    }
    made["rows"] = sorted(rows, key=lambda r: (r["wheel"], sorted(r["versions"].items())))
    file.write_text(json.dumps(made, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, metavar="WHEEL")
    parser.add_argument("--wheelhouse", type=Path, metavar="DIR", help="install the dependencies from here, offline")
    parser.add_argument(
        "--borrow", default=sys.executable, metavar="PYTHON", help="or take them from this Python (default: this one)"
    )
    parser.add_argument(
        "--note", type=Path, metavar="FILE", help="keep what ran in this result file, a row a combination"
    )
    parser.add_argument("--core-to", type=Path, metavar="FILE", help="leave a copy of the library here")
    given = parser.parse_args(arguments)
    try:
        wheel = open_wheel(given.wheel)
        system = check_library(wheel)
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            library = given.core_to or scratch / Path(wheel.core).name
            library.write_bytes(wheel.data)
            python = install(given.wheel.resolve(), scratch / "env", given.wheelhouse, given.borrow)
            said = smoke(python, scratch)
            device = check_device_code(wheel, said["core"], library)
    except (UnfitError, OSError, zipfile.BadZipFile) as error:
        print(f"{given.wheel.name}: {error}", file=sys.stderr)
        return 1
    if given.note:
        note(given.note, given.wheel, said, system)
    size = f"{given.wheel.stat().st_size / 2**10:.0f} KiB"
    print(f"{given.wheel.name}: {size}, {system}, device code: {device}; ran {said['ran']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
