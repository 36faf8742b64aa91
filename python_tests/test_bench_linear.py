"""The benchmark of the loss from hidden states: its rivals compute the same, and its checks tell who does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tgt_fast.bench import linear, linear_rivals, rivals
from tgt_fast.bench.case import UnfitError

CPU = torch.device("cpu")
PYTORCHS = (rivals.EAGER, linear_rivals.CHUNKED, linear_rivals.LINEAR_CE)
# 300 rows: a chunk of the rivals' and a part of one; wide enough that PyTorch's own chunks are several.
SPECS = {
    "heads": linear.Spec(300, 16, 24, 200, torch.float32),
    "record": linear.Spec(300, 16, 24, 200, torch.float32, k=8),
    "frozen": linear.Spec(300, 16, 24, 200, torch.float32, frozen=True),
}
FIT = [(name, rival) for name in SPECS for rival in PYTORCHS if name == "heads" or rival != linear_rivals.LINEAR_CE]


@pytest.mark.parametrize(("name", "rival"), FIT)
def test_pytorchs_own_ways_compute_the_same(name: str, rival: str) -> None:
    if rival == linear_rivals.LINEAR_CE and not hasattr(torch.nn.functional, rival):
        pytest.skip("this torch does not have it")
    work = linear.case(SPECS[name], CPU).build()
    check = work.check(work.rival(rival)())  # the bars of ours
    assert check.ok, str(check)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("part", ["loss", "a gradient"])
@pytest.mark.parametrize("factor", [0.0, 1.05])
def test_the_check_finds_wrong_results(native: str, name: str, part: str, factor: float) -> None:
    work = linear.case(SPECS[name], CPU).build()
    result = {key: value.clone() for key, value in work.ours(native)().items()}
    assert work.check(result).ok
    result["loss" if part == "loss" else "d_hidden"].mul_(factor)
    assert not work.check(result).ok


@pytest.mark.parametrize("missing", [False, True], ids=["", "this torch does not have it"])
def test_what_a_rival_cannot_compute_it_refuses(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reason that does not hang on the version of PyTorch."""
    if missing:
        monkeypatch.delattr(torch.nn.functional, linear_rivals.LINEAR_CE, raising=False)
    with pytest.raises(UnfitError, match="gives the gradients of forward_kl alone"):
        linear_rivals.loss_of(linear_rivals.LINEAR_CE, "jsd", 2.0)
    with pytest.raises(UnfitError, match="takes no top-k record"):
        linear_rivals.loss_of_record(linear_rivals.LINEAR_CE, "forward_kl", 2.0)
    with pytest.raises(UnfitError, match="no gradient to the teacher's hidden states"):
        linear.case(SPECS["frozen"], CPU).build().rival(linear_rivals.LINEAR_CE)


def test_a_record_needs_a_kernel_for_records() -> None:
    assert linear.case(SPECS["record"], CPU).kernels_of == "topk"
    assert linear.case(SPECS["heads"], CPU).kernels_of == "linear"


def test_the_floor_of_a_record_is_the_students_alone() -> None:
    heads, record = (linear.case(SPECS[name], CPU) for name in ("heads", "record"))
    assert record.numbers["flops"] == 6 * 300 * 16 * 200
    assert heads.numbers["flops"] == 6 * 300 * 16 * 200 + 2 * 300 * 24 * 200
    assert record.bytes_moved == 2 * 4 * 16 * 500 + 300 * 8 * 12
    assert heads.bytes_moved == 2 * 4 * 16 * 500 + 4 * 24 * 500


def test_tables_of_the_readme_name_what_was_measured(tables: Any) -> None:
    row: dict[str, Any] = {
        "op": "forward_kl + CE", "shape": "8 x (2, 3) x 5", "dtype": "float32",
        "milliseconds": {"ours": 2.0, "copy": 1.0},
        "flops": 6 * 10**9, "over_eager": 4.0, "over_compile": None, "over_chunked": 3.0,
        "over_linear_cross_entropy": 5.0, "peak_extra": {"ours": 0.5, "eager": 6.0, "chunked": 1.5},
        "extra_memory_bytes": 3 << 20,
    }  # fmt: skip
    record = {
        "rows": [row, {"status": "skipped"}], "command": "command", "hardware": "hardware", "commit": "c", "date": "d",
        "versions": {"torch": "2"},
    }  # fmt: skip
    text = tables.linear(record)
    assert "ms | TFLOP/s | over eager | over chunks | over `linear_cross_entropy` | extra MiB |" in text
    assert "| forward_kl + CE, 8 x (2, 3) x 5, float32 | 2 | 3 | 4.0x | 3.0x | 5.0x | 3 |" in text
    assert "logits: 0.50, eager 6.00, chunks 1.50." in text
    text = tables.topk({**record, "rows": [row]})
    assert "| forward_kl + CE, 8 x (2, 3) x 5, float32 | 2 | 4.0x | - | 50% |" in text
