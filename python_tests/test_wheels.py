"""Wheels of a release: what is in them, what their names say, and which Python-free objects they share."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import tgt_fast

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"

pytestmark = pytest.mark.skipif(not TOOLS.is_dir() or sys.platform != "linux", reason="no sources here, or no ELF")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(TOOLS))
    return __import__


@pytest.fixture(scope="module")
def core() -> bytes:
    package = Path(tgt_fast.__file__).parent
    found = [*package.glob("_core*.so")]
    if not found:
        pytest.skip("no compiled core")
    return found[0].read_bytes()


TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"
INFO = "tgt_fast-0.1.0.dist-info"


def files_of(core: bytes) -> dict[str, bytes]:
    return {
        "tgt_fast/py.typed": b"",
        "tgt_fast/cli.py": b"",
        "tgt_fast/_core.pyi": b"",
        f"tgt_fast/_core.cpython-{TAG[2:]}-x86_64-linux-gnu.so": core,
        f"{INFO}/METADATA": b"Metadata-Version: 2.2\nName: tgt-fast\nVersion: 0.1.0\nRequires-Python: >=3.10\n",
        f"{INFO}/licenses/LICENSE": b"",
    }


def wheel_of(folder: Path, files: dict[str, bytes], platform: str = "linux_x86_64") -> Path:
    path = folder / f"tgt_fast-0.1.0-{TAG}-{TAG}-{platform}.whl"
    rows = []
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append((name, f"sha256={digest}", len(data)))
        written = io.StringIO()
        csv.writer(written).writerows([*rows, (f"{INFO}/RECORD", "", "")])
        wheel.writestr(f"{INFO}/RECORD", written.getvalue())
    return path


def test_the_core_needs_and_exports_little(tool: Callable[[str], ModuleType], core: bytes) -> None:
    library = tool("elf").read(core)
    assert library.exports == ["PyInit__core"]
    assert "libstdc++.so.6" in library.needed
    assert not [name for name in library.needed if name.startswith(("libtorch", "libc10", "libcuda", "libgomp"))]
    assert library.floor("GLIBC") >= (2, 2)
    assert library.floor("GLIBCXX") >= (3, 4)
    assert library.floor("NOTHING") == ()
    listed = shutil.which("readelf")
    if listed:
        (found,) = Path(tgt_fast.__file__).parent.glob("_core*.so")
        said = subprocess.run([listed, "-dW", str(found)], capture_output=True, text=True, check=True).stdout
        assert library.needed == [line.split("[")[1][:-1] for line in said.splitlines() if "(NEEDED)" in line]


def test_faults_of_a_wheel_are_named(tool: Callable[[str], ModuleType], core: bytes, tmp_path: Path) -> None:
    check = tool("check_wheel")
    whole = files_of(core)
    name = next(name for name in whole if name.endswith(".so"))
    opened = check.open_wheel(wheel_of(tmp_path, whole))
    assert (opened.version, opened.label, opened.core) == ("0.1.0", "", name)
    assert "no manylinux tag" in check.check_library(opened)
    for faulty, message in (
        ({k: v for k, v in whole.items() if k != "tgt_fast/py.typed"}, "py.typed is missing"),
        ({**whole, "python_tests/test_x.py": b""}, "files outside the package"),
        ({**whole, "tgt_fast/csrc/x.h": b""}, "sources or products"),
        ({k: v for k, v in whole.items() if k != name}, "one compiled core"),
        ({**whole, name: b"no library"}, "not a 64-bit"),
        ({**whole, f"{INFO}/METADATA": b"Version: 0.2.0\n"}, "two versions"),
    ):
        with pytest.raises(check.UnfitError, match=message):
            check.open_wheel(wheel_of(tmp_path, faulty))
    for exports, message in (
        (core.replace(b"PyInit__core\0", b"PyInit__cor3\0"), "exports"),
        (core.replace(b"libstdc++.so.6\0", b"libtorch.so.66\0"), "needs .*libtorch"),
    ):
        with pytest.raises(check.UnfitError, match=message):
            check.check_library(check.open_wheel(wheel_of(tmp_path, {**whole, name: exports})))
    old = check.open_wheel(wheel_of(tmp_path, whole, "manylinux_2_5_x86_64"))
    with pytest.raises(check.UnfitError, match=r"needs glibc .* its tag promises 2\.5"):
        check.check_library(old)
    info = {"cuda": "13.0.88", "cuda_architectures": "90"}
    labelled = tool("label_wheel").relabel(wheel_of(tmp_path, whole), "cpu")
    with pytest.raises(check.UnfitError, match=r"labelled \+cpu, its core is \+cu130"):
        check.check_device_code(check.open_wheel(labelled), info, tmp_path)
    assert check.check_device_code(check.open_wheel(labelled), {"cuda": ""}, tmp_path) == "no CUDA"


def test_a_label_is_part_of_the_version(tool: Callable[[str], ModuleType], core: bytes, tmp_path: Path) -> None:
    from packaging.version import Version

    label = tool("label_wheel")
    plain = wheel_of(tmp_path, files_of(core))
    with zipfile.ZipFile(plain, "a") as wheel:
        wheel.writestr("tgt_fast/", b"")  # auditwheel lists folders
    made = label.relabel(plain, "cu130")
    assert made.name == f"tgt_fast-0.1.0+cu130-{TAG}-{TAG}-linux_x86_64.whl"
    assert [*tmp_path.iterdir()] == [made]
    opened = tool("check_wheel").open_wheel(made)  # name, metadata and record agree
    assert (opened.version, opened.label) == ("0.1.0+cu130", "cu130")
    assert Version("0.1.0+cu130") > Version("0.1.0+cpu") > Version("0.1.0")
    for bad, message in ((made, "label already"), (wheel_of(tmp_path, files_of(core)), "letters and digits")):
        with pytest.raises(ValueError, match=message):
            label.relabel(bad, "cu-13")


def test_prebuilt_objects_must_be_of_these_sources(tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    objects = tmp_path / "objects"
    objects.mkdir()

    def read(cuda: str, *more: str) -> str:
        ask = (
            f"set(TGT_SOURCES here)\nset(TGT_CUDA {cuda})\n"
            f'include("{ROOT}/cmake/prebuilt.cmake")\ntgt_read_prebuilt()\n'
        )
        (tmp_path / "ask.cmake").write_text(ask)
        command = [cmake, f"-DTGT_PREBUILT={objects}", *more, "-P", str(tmp_path / "ask.cmake")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        return " ".join(done.stderr.split())

    assert "holds no tgt_objects.cmake" in read("AUTO")
    (objects / "libtgt_objects.a").touch()
    said = "set(TGT_HAVE_CUDA [==[{}]==])\nset(TGT_SOURCES [==[{}]==])\nset(TGT_CUDA_VERSION [==[13.0.88]==])\n"
    (objects / "tgt_objects.cmake").write_text(said.format("FALSE", "there"))
    assert "was built of other sources" in read("AUTO")
    (objects / "tgt_objects.cmake").write_text(said.format("FALSE", "here"))
    assert "TGT_CUDA=ON, but" in read("ON")
    assert tool("label_wheel").label_of(objects) == "cpu"
    (objects / "tgt_objects.cmake").write_text(said.format("TRUE", "here"))
    assert "TGT_CUDA=OFF, but" in read("OFF")
    assert tool("label_wheel").label_of(objects) == "cu130"
    assert "give one of them" in read("AUTO", "-DTGT_PREBUILD=ON")


def test_the_build_script_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    script = str(TOOLS / "build_wheels.sh")
    for arguments, status, message in (
        ((), 2, "build_wheels.sh OUT_DIR"),
        ((str(tmp_path), "--wrong"), 2, "unknown argument --wrong"),
        ((str(tmp_path), "--no-label"), 2, "--no-label is for one kind"),
    ):
        done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, message in done.stdout + done.stderr) == (status, True), done


def test_job_files_are_read_by_what_runs_them() -> None:
    yaml = pytest.importorskip("yaml")
    folder = ROOT / "examples" / "clusters"
    if not folder.is_dir():
        pytest.skip("no examples here")
    for file in folder.glob("*.sbatch"):
        done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        head = file.read_text().split("set -euo pipefail")[0].splitlines()
        assert head[0] == "#!/bin/bash"
        asked = [line for line in head if line.startswith("#SBATCH ")]  # Slurm stops reading at the first command
        assert {"nodes", "ntasks-per-node", "gpus-per-node", "time"} <= {
            line.split("--")[1].split("=")[0] for line in asked
        }
    service, job = yaml.safe_load_all((folder / "train.yaml").read_text())
    assert (service["apiVersion"], service["kind"], job["apiVersion"], job["kind"]) == (
        "v1",
        "Service",
        "batch/v1",
        "Job",
    )
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] in ("OnFailure", "Never")
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["metadata"]["name"] == pod["subdomain"]  # the names of the pods
    (container,) = pod["containers"]
    asked = dict(word[2:].split("=", 1) for word in container["command"] if word.startswith("--"))
    assert asked["rdzv-endpoint"] == f"{name}-0.{pod['subdomain']}:{service['spec']['ports'][0]['port']}"
    assert int(asked["nnodes"]) == spec["completions"]
    assert int(asked["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_workflow_pins_its_actions() -> None:
    yaml = pytest.importorskip("yaml")
    file = ROOT / ".github" / "workflows" / "wheels.yml"
    if not file.exists():
        pytest.skip("no workflow here")
    flow = yaml.safe_load(file.read_text())
    used = [step["uses"] for job in flow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in used)
    assert flow["permissions"] == {"contents": "read"}
    assert flow["jobs"]["publish"]["permissions"] == {"id-token": "write"}  # no password
    for run in (step["run"] for job in flow["jobs"].values() for step in job["steps"] if "run" in step):
        for script in re.findall(r"tools/\S+\.(?:sh|py)", run):
            assert (ROOT / script).exists(), script
