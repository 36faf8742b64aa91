"""The script that launches Triton's kernels without a GPU: which forms it knows, and what it writes down."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tgt_fast.bench.nouns import NOUNS


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    folder = Path(__file__).parent.parent / "benchmarks"
    if not folder.is_dir():
        pytest.skip("the tests run outside a checkout")
    monkeypatch.syspath_prepend(folder)
    made = importlib.import_module("triton_dry_run")
    monkeypatch.setattr(made, "RESULT", tmp_path / "result.json")
    return made


def test_the_bench_has_a_form_of_every_case_with_kernels_in_triton(script: ModuleType) -> None:
    names = list(script.bench_forms())
    assert {name.split()[1].rstrip(":") for name in names} == set(NOUNS) - {"sparse"}
    gpu = torch.device("cuda")
    for noun in ("distill", "latent", "contrast", "explore"):
        assert {f"bench {noun}: {case.title}" for case in NOUNS[noun](gpu, False)} <= set(names)
    assert not any("sample" in name for name in names)


def test_all_and_some_combinations_of_options(script: ModuleType) -> None:
    every, few, fragile = (set(script.forms_of(*which)) for which in (("options", 1), ("options", 20), ("fragile", 1)))
    assert len(every) > 3000
    assert few < every
    assert len(few) >= len(every) // 20
    assert fragile < every
    assert {name for name in every if "state" in name and "smoothed" not in name and " 100 classes" in name} < fragile


def test_what_is_on_a_gpu_lies_on_meta(script: ModuleType) -> None:
    with script.OnMeta():
        assert torch.zeros(3, device="cuda").is_meta
        assert torch.empty(3).to(torch.device("cuda", 0)).is_meta
        assert not torch.zeros(3).is_meta


def test_every_version_of_triton_has_its_place(script: ModuleType) -> None:
    nothing: dict[str, Any] = {"forms": 3, "failed": {}, "launches": {"a_kernel": 6}}
    script.save("3.6.0", "bench", nothing)
    script.save("3.9.0", "options", {**nothing, "one_of": 8})
    script.save("3.9.0", "bench", {**nothing, "failed": {"one": "why"}})
    found = json.loads(script.RESULT.read_text())
    assert set(found) == {"3.6.0", "3.9.0"}
    assert found["3.9.0"]["sets"]["options"]["one_of"] == 8
    assert found["3.9.0"]["sets"]["bench"]["failed"] == {"one": "why"}
    one = found["3.6.0"]["sets"]["bench"]
    assert nothing.items() <= one.items()
    assert one["kernels"] == script.kernels_digest()
    assert found["3.6.0"]["architecture"] == "sm_90"
