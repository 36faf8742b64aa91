"""Triton's real launch path: kernels compiled for sm_90 and launched on a driver that starts nothing, see dry_gpu.py.

What they compute is tested elsewhere, in Triton's interpreter; that forgives what a GPU or its driver would not.

It takes a minute of a core, and runs once for each state of the sources (once.py).
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tgt_fast.kernels import triton as backend_module

REGISTERS = 65536  # of a multiprocessor
STORE = re.compile(r"tt\.store %[\w#]+, (%[\w#]+)")

pytestmark = [
    pytest.mark.once("launches of the Triton kernels"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def found_by(script: str, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """The findings of a script, with nothing compiled before."""
    unwanted = ("TRITON_INTERPRET", "TGT_FAST_TRITON_PLANS")
    environment = {name: value for name, value in environment.items() if name not in unwanted}
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), str(folder / "findings.json")],
        check=True, env={**environment, "TRITON_CACHE_DIR": str(folder / "compiled"), "XDG_CACHE_HOME": str(folder)},
    )  # fmt: skip
    found: dict[str, Any] = json.loads((folder / "findings.json").read_text())
    return found


@pytest.fixture(scope="module")
def findings(child_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The findings of dry_forms.py."""
    return found_by("dry_forms.py", child_environment, tmp_path_factory.mktemp("dry"))


def test_every_kernel_is_launched_twice(findings: dict[str, Any]) -> None:
    """A first launch compiles; a second finds what was compiled, and looks whether it still holds."""
    assert findings["errors"] == {}
    assert len(findings["names"]) > 10
    for name in findings["names"]:
        assert findings["launches"].get(name, 0) >= 2, name


def test_machine_code_is_made_of_every_kernel_and_not_of_every_form(findings: dict[str, Any]) -> None:
    """It takes most of the time of these tests, which have a minute, on one core, together."""
    made = [kernel["name"] for kernel in findings["kernels"] if kernel["registers"] is not None]
    assert set(made) == set(findings["names"])
    assert len(made) <= 40


def test_no_kernel_asks_for_more_registers_than_there_are(findings: dict[str, Any]) -> None:
    of_a_chip = [kernel for kernel in findings["kernels"] if kernel["registers"] is not None]
    limited = [kernel for kernel in of_a_chip if kernel["limit"] is not None]
    assert {kernel["warps"] for kernel in limited} >= {8, 16, 32}
    for kernel in limited:
        assert kernel["registers"] <= kernel["limit"], kernel["name"]
        assert kernel["limit"] * 32 * kernel["warps"] <= REGISTERS, kernel["name"]


def forwards(findings: dict[str, Any], *parts: str) -> list[dict[str, Any]]:
    """The loss's forwards that have all of these arguments."""
    return [
        kernel
        for kernel in findings["kernels"]
        if kernel["name"].startswith("distill_fwd")
        and not any(kernel["constants"].get(part, 0) is None for part in parts)
    ]


def test_the_count_of_classes_is_a_constant_in_the_state_of_rows_without_smoothing(findings: dict[str, Any]) -> None:
    """Computed, it would be a zero that other values are selected from: Triton 3.5 and 3.6 then emit invalid code."""
    checked = [kernel for kernel in forwards(findings, "row_state") if not kernel["constants"]["SMOOTHED"]]
    assert {kernel["name"] for kernel in checked} == {"distill_fwd_kernel", "distill_fwd_stream_kernel"}
    for kernel in checked:
        lines = kernel["code"].splitlines()
        constants = set(re.findall(r"(%[\w#]+) = arith\.constant", kernel["code"]))
        stored = [found[1] for line in lines if (found := STORE.search(line)) and base(line, lines) == "row_state"]
        assert len(stored) == 11
        assert stored[5] in constants, kernel["constants"]


def test_rows_of_1000_classes_are_read_16_bytes_at_a_time(findings: dict[str, Any]) -> None:
    """1000 is a multiple of 8 and not of 16, which is all that Triton asks of numbers by itself."""
    checked = [
        kernel for kernel in findings["kernels"]
        if kernel["name"] in ("distill_fwd_kernel", "distill_bwd_kernel") and kernel["accesses"]
        and (kernel["constants"].get("GRAIN"), kernel["constants"].get("BLOCK")) == (8, 1024)
    ]  # fmt: skip
    assert {kernel["name"] for kernel in checked} == {"distill_fwd_kernel", "distill_bwd_kernel"}
    for kernel in checked:
        seen = Counter(kernel["accesses"])
        assert seen["ld.global.v4.b32"] == 2  # 1024 classes of 128 threads, of student and teacher
        assert seen["st.global.v4.b32"] >= 1
        assert seen["ld.global.b16"] <= 1  # the label's logit
        assert seen["st.global.b16"] == 0


def test_passes_of_a_streamed_row(findings: dict[str, Any]) -> None:
    """Every other one walks back; of labels at temperatures 1 to 4 none takes an exponential."""
    checked = [kernel for kernel in forwards(findings, "d_student", "teacher") if "STAGES" in kernel["constants"]]
    powers = set()
    for kernel in checked:
        divergence, power = kernel["constants"]["DIVERGENCE"], kernel["constants"]["POWER"]
        passes = kernel["code"].split("scf.for ")[1:]
        back = [re.search(r"%col\w* = arith\.subi %last", code) is not None for code in passes]
        assert back == ([False, True, False] if divergence in ("jsd", "tvd") else [False, True])
        if divergence != "mse" and kernel["constants"].get("target", 0) is not None:
            powers.add(power)
            assert passes[0].count("math.exp2") == (4 if power else 6)  # of both sides, and of their maxima's rise
    assert {1, 2} <= powers


def test_the_logit_of_the_label_is_read_before_the_first_barrier(findings: dict[str, Any]) -> None:
    """Reductions end in barriers. Behind the last of them a warp may have written gradients over the logits already."""
    checked = forwards(findings, "target", "d_student")
    assert {kernel["name"] for kernel in checked} == {"distill_fwd_kernel", "distill_fwd_stream_kernel"}
    assert {kernel["constants"]["DIVERGENCE"] for kernel in checked} >= {"none", "forward_kl", "jsd"}
    for kernel in checked:
        lines = kernel["code"].splitlines()
        reads = [place for place, line in enumerate(lines) if loads_a_column(line) and base(line, lines) == "student"]
        reductions = [place for place, line in enumerate(lines) if '"tt.reduce"(' in line]
        assert len(reads) == 1
        assert reads[0] < reductions[0], kernel["constants"]


def loads_a_column(line: str) -> bool:
    return re.search(r"= tt\.load .*tensor<\d+x1x!tt\.ptr<", line) is not None


def base(line: str, lines: list[str]) -> str:
    """Which of the kernel's pointers an address in Triton's intermediate code comes from."""
    made = {found[1]: other for other in lines if (found := re.match(r"\s*(%[\w#]+)(?::\d+)? = ", other))}
    while True:
        found = re.search(r"tt\.(?:load|store|addptr|splat|broadcast) (%[\w#]+)", line)
        assert found is not None, line
        if found[1] not in made:
            return found[1][1:]
        line = made[found[1]]


@pytest.mark.always
@pytest.mark.parametrize("warps", [1, 4, 8, 16, 32])
def test_a_limit_of_registers_fits_the_warps(warps: int) -> None:
    asked: dict[str, Any] = {}

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **constants: asked.update(constants)

    backend_module.launch(Kernel(), 1, warps=warps, registers=168)
    assert asked["maxnreg"] == min(168, REGISTERS // (32 * warps))


def test_the_host_side_of_the_gpu_tests(child_environment: dict[str, str], tmp_path: Path) -> None:
    """Each that launches Triton's kernels, on tensors of more than 2^31 elements too."""
    found = found_by("dry_gpu_tests.py", child_environment, tmp_path)
    assert found["errors"] == {}
    assert len(found["names"]) >= 11
