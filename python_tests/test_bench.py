"""tgt-fast bench: what it measures is checked, what it writes is complete, and no failure hides another."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from tgt_fast import cli
from tgt_fast.bench import command, distill, distill_rivals, latent, load, memory, rivals, table, timing
from tgt_fast.bench import run as running
from tgt_fast.bench.case import Check
from tgt_fast.bench.check import edge_rows, relative_error, result_bar
from tgt_fast.bench.distill import DistillWork, Spec
from tgt_fast.bench.load import Load, Watch
from tgt_fast.bench.ops import OPS
from tgt_fast.bench.row import Row, Standing
from tgt_fast.bench.run import Plan, measure

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
TINY = (Spec(8, 50, torch.float32), Spec(8, 50, torch.bfloat16, "jsd", teacher_gradient=True))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny cases, a small copy, no look at all objects of the tests' process, and no more threads than there is work
    for."""
    monkeypatch.setattr(distill, "_CPU_QUICK", TINY)
    monkeypatch.setattr(command, "copy_rate", lambda device: 1e10)
    monkeypatch.setattr(running.gc, "collect", lambda: 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(*nouns: str, **options: Any) -> list[Row]:
    options = {"rivals": ("eager",), "seconds": 0.001, "quick": True, **options}
    return list(measure(Plan(CPU, nouns or ("distill",), **options), 1e10))


def bench(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The command in quick form: its exit status, and what it wrote."""
    file = tmp_path / "bench.json"
    fixed = ["bench", "--device", "cpu", "--shapes", "quick", "--seconds", "0.001", "--json", str(file)]
    return cli.main([*fixed, *arguments]), json.loads(file.read_text()) if file.exists() else {}


def test_the_command_prints_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "roofline.png"
    status, record = bench(tmp_path, "--rivals", "eager,liger,quack", "--plot", str(plot))
    out = capsys.readouterr().out
    assert status == 0
    for name in ("commit", "date", "hardware", "core", "command", "versions", "copy_bytes_per_second"):
        assert record[name], name
    assert record["versions"]["torch"] == torch.__version__
    fixed = "tgt-fast bench --device cpu --shapes quick --seconds 0.001 --rivals eager,liger,quack"
    assert record["command"] == fixed
    assert list(dict.fromkeys(row["noun"] for row in record["rows"])) == list(OPS)
    for row in record["rows"]:
        assert row["status"] == "ok"
        assert row["milliseconds"]["ours"] > 0
        assert row["over_eager"] == row["milliseconds"]["eager"] / row["milliseconds"]["ours"]
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["milliseconds"]["ours"] * 1e3)
        assert row["of_copy"] == pytest.approx(row["bytes_per_second"] / 1e10)
        assert row["errors"].keys() == row["bars"].keys()
        assert row["op"] in out
    first, second = record["rows"][:2]
    assert (first["bytes"], second["bytes"]) == (3 * 8 * 50 * 4, 4 * 8 * 50 * 2)
    assert set(second["errors"]) == {"loss", "d_student", "d_teacher"}
    assert first["rivals"]["liger"]["status"] == "skipped"
    assert "liger skipped: liger-kernel" in out
    assert "; load average" in out.splitlines()[0]
    assert record["load"].keys() == first["load"].keys() == {"average", "others", "busy"}
    assert first["ours"]["spread"] >= 0
    step = record["rows"][-1]["parts_milliseconds"]
    assert step.keys() == {"ours", "eager"}
    assert all({"decoder", "labeler", "slope", "student"} <= parts.keys() for parts in step.values())
    assert "eager spends" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 20_000


def row(op: str = "jsd + CE", *, load: Load | None = None, ms: float | None = 2.0, rival: float | None = None) -> Row:
    case = distill.cases(CPU, True)[0]
    ours = Standing() if ms is None else Standing(timing=timing.Timing(ms, spread=0.03))
    theirs = {} if rival is None else {"eager": Standing(timing=timing.Timing(rival))}
    return Row(replace(case, op=op), "native", ours, theirs, copy_rate=1e10, load=load)


def printed(rows: list[Row], width: int = 80) -> str:
    out = io.StringIO()
    table.print_rows(Console(file=out, width=width), rows)
    return out.getvalue()


def test_a_table_breaks_no_name_and_has_no_empty_column() -> None:
    long = "forward_kl + CE, an operation of a long name, " * 4
    shown = printed([row(long), row(ms=None)])
    assert long.strip() in shown
    assert "8 x 50 float32" in shown
    assert not any(name in shown for name in ("over", "extra", "…"))
    assert "3%" in shown
    assert "over eager" in printed([row(rival=1.0), row()])
    assert "spread" not in printed([row(ms=None)])
    assert "GB/s" not in printed([row(ms=None)])


def test_rows_of_a_busy_machine_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    quiet, busy, alone = Load(3.0, 0.2), Load(3.0, 1.26), Load(3.0, None)
    assert [one.busy for one in (quiet, busy, alone)] == [False, True, True]
    assert not Load(1.2, None).busy
    assert not Load(None, None).busy
    shown = printed([row("one", load=quiet), row("two", load=busy)])
    lines = {line.split()[1]: line for line in shown.splitlines() if line.startswith("│")}
    assert " 2 * " in lines["two"]
    assert "*" not in lines["one"]
    assert "* measured while other processes used up to 1.3 cores: a rough number" in shown
    assert "*" not in printed([row(load=quiet)])
    assert table.line(row(load=busy)).endswith("busy: others used 1.3 cores")
    assert "2 ms ± 3%" in table.line(row(load=quiet))
    assert row(load=busy).to_json()["load"] == {"average": 3.0, "others": 1.26, "busy": True}
    assert row().to_json()["ours"]["spread"] == 0.03


def test_what_others_use_is_the_machines_less_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat, own, clock = tmp_path / "stat", [10.0], [5.0]
    monkeypatch.setattr(load, "_STAT", stat)
    monkeypatch.setattr(load, "_own", lambda: own[0])
    monkeypatch.setattr(load, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    ticks = os.sysconf("SC_CLK_TCK")
    stat.write_text(f"cpu {ticks} 0 {ticks} 9000 500 0 0 0 50 0\ncpu0 1\n")
    watch = Watch()
    # 4 s of work; waiting is none, and what guests had is in it already
    stat.write_text(f"cpu {4 * ticks} 0 {2 * ticks} 9900 700 0 0 0 90 0\ncpu0 1\n")
    own[0], clock[0] = 12.0, 9.0
    assert watch.load().others == pytest.approx(0.5)
    stat.unlink()
    assert watch.load().others is None
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0, 0))
    assert str(watch.load()) == f"load average 1.50 on {os.cpu_count()} cores"


def test_the_plot_fits_a_screen_whatever_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from tgt_fast.bench import roofline

    monkeypatch.setattr(roofline, "png", lambda made: tuple(made.get_size_inches()))  # not drawn, which takes seconds
    few = [row(rival=3.0)]
    many = [replace(few[0], case=replace(few[0].case, noun=noun)) for noun in OPS for _ in range(30)]
    sizes = [roofline.roofline(rows, 1e10, "a machine") for rows in (few, many, [])]
    assert all(height <= 1.05 * width for width, height in sizes)
    assert all(width <= 13 for width, _ in sizes)
    assert sizes[0] == sizes[2]


def test_an_absent_rival_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    assert rivals.absence("orda", torch.device("cuda")) == "orda-kernel is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    assert rivals.absence("orda", CPU) == "orda-kernel needs a GPU"
    assert rivals.absence("orda", torch.device("cuda")) is None
    assert rivals.absence("eager", CPU) is None


def scaled_loss(*arguments: Any, **options: Any) -> Tensor:
    return 1.05 * TRUE_LOSS(*arguments, **options)


def scaled_gradient(*arguments: Any, **options: Any) -> Tensor:
    loss = TRUE_LOSS(*arguments, **options)
    return 1.05 * loss - 0.05 * loss.detach()


def no_gradient(*arguments: Any, **options: Any) -> Tensor:
    loss = TRUE_LOSS(*arguments, **options)
    return loss + 0.0 * loss.detach() - (loss - loss.detach())


def not_a_number(*arguments: Any, **options: Any) -> Tensor:
    return TRUE_LOSS(*arguments, **options) * float("nan")


TRUE_LOSS: Callable[..., Tensor] = distill.our_loss


@pytest.mark.parametrize("broken", [scaled_loss, scaled_gradient, no_gradient, not_a_number])
def test_a_wrong_loss_or_gradient_is_reported_and_not_timed(
    broken: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distill, "our_loss", broken)
    status, record = bench(tmp_path, "--rivals", "eager", "--ops", "distill,latent")
    assert status == 1
    for row in record["rows"]:
        assert row["status"] == ("WRONG" if row["noun"] == "distill" else "ok")
        assert ("ours" in row["milliseconds"]) == (row["noun"] != "distill")
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert f"2 of {len(record['rows'])} rows are wrong or failed" in out


def test_an_op_that_does_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "our_op", lambda op, z, grad, anchor, backend: z.clone())
    assert [row.ours.status for row in rows_of("latent")] == ["WRONG"] * 3


def test_a_small_error_of_a_half_precision_result_is_wrong() -> None:
    spec = latent.Spec("ascend", 4, 300, torch.bfloat16)
    work = latent.LatentWork(spec, CPU)
    right = work.ours("native")()["latents"]
    assert work.check({"latents": right}).ok
    assert not work.check({"latents": (right.double() * 1.05).to(right.dtype)}).ok
    assert not work.check({"latents": right.flip(0)}).ok


def test_ours_that_raises_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stumble(*_: Any) -> Tensor:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(latent, "our_op", stumble)
    status, record = bench(tmp_path, "--rivals", "none", "--ops", "distill,latent,tokens")
    assert status == 1
    assert all(row["status"] == ("failed" if row["noun"] == "latent" else "ok") for row in record["rows"])
    assert {row["reason"] for row in record["rows"]} == {"", "RuntimeError: no such kernel"}
    assert "RuntimeError: no such kernel" in capsys.readouterr().out


def test_a_case_that_cannot_be_built_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "LatentWork", lambda *_: 1 / 0)
    rows = rows_of("latent", "distill")
    assert [row.ours.status for row in rows] == ["failed"] * 3 + ["ok"] * 2
    assert "ZeroDivisionError" in rows[0].ours.reason


def test_a_rival_that_raises_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_: Any) -> Callable[..., Tensor]:
        raise RuntimeError("out of registers")

    monkeypatch.setattr(distill_rivals, "loss_of", stumble)
    status, record = bench(tmp_path, "--rivals", "eager", "--ops", "distill,latent")
    assert status == 0
    row = record["rows"][0]
    assert row["rivals"]["eager"] == {"status": "failed", "reason": "RuntimeError: out of registers"}
    assert row["over_eager"] is None
    assert row["milliseconds"]["ours"] > 0
    assert next(row for row in record["rows"] if row["noun"] == "latent")["over_eager"] > 0


def test_a_rival_that_stumbles_under_the_clock_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def later(name: str, divergence: str, temperature: float) -> Callable[..., Tensor]:
        def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("late")
            return distill_rivals._plain(divergence, temperature)(student, teacher, target)

        return loss

    monkeypatch.setattr(distill_rivals, "loss_of", later)
    row = rows_of()[0]
    assert row.ours.timing is not None
    assert row.rivals["eager"].status == "failed"
    assert row.rivals["eager"].timing is None


def test_a_rival_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = distill_rivals._plain

    def summed(divergence: str, temperature: float) -> Callable[..., Tensor]:
        return lambda student, teacher, target: 8 * plain(divergence, temperature)(student, teacher, target)

    monkeypatch.setattr(distill_rivals, "_plain", summed)
    row = rows_of()[0]
    assert row.rivals["eager"].status == "differs"
    assert row.rivals["eager"].timing is None
    assert row.over("eager") is None


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd", "none"])
def test_adapters_of_rivals_compute_the_same(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins that do in plain PyTorch what the libraries document."""
    functional: Any = types.ModuleType("liger_kernel.transformers.functional")

    def jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
        def kl(a: Tensor, b: Tensor) -> Tensor:
            return (a.exp() * (a - b)).sum() / len(a)

        if beta == 1:
            return kl(log_q, log_p)
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)

    def over_its_input(student: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(student * 1.0, target)
        student.data.zero_()
        return loss

    functional.liger_jsd = jsd
    functional.liger_kl_div = F.kl_div
    functional.liger_tvd = lambda q, p, reduction: {"batchmean": (q - p).abs().sum() / len(p) / 2}[reduction]
    functional.liger_cross_entropy = over_its_input
    quack: Any = types.ModuleType("quack")
    quack.cross_entropy = F.cross_entropy
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    monkeypatch.setitem(sys.modules, "quack", quack)

    work = DistillWork(Spec(8, 50, torch.float32, divergence), CPU)
    for name in ("eager", "liger", *(["quack"] if divergence == "none" else [])):
        call = work.rival(name)
        for _ in range(2):  # what the first call leaves behind must not change the second
            check = work.compare(call())
            assert all(error < 1e-4 for error in check.errors.values()), (name, str(check))


def test_what_a_rival_lacks_is_said() -> None:
    work = DistillWork(Spec(8, 50, torch.float32, teacher_gradient=True), CPU)
    for name, reason in (("quack", "no divergence"), ("orda", "hidden states"), ("cce", "hidden states")):
        with pytest.raises(distill.UnfitError, match=reason):
            work.rival(name)


def test_too_little_memory_skips_a_case_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 20)
    status, record = bench(tmp_path, "--ops", "distill")
    assert status == 0
    assert {row["status"] for row in record["rows"]} == {"skipped"}
    assert "GiB" in record["rows"][0]["reason"]


def test_backends_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(backends=("native", "reference"))
    assert [row.backend for row in rows] == ["native", "reference"] * 2
    assert all(row.ours.timing is not None for row in rows)
    assert rows[0].rivals is rows[1].rivals
    monkeypatch.setattr(running.BACKENDS["native"], "refusal", lambda op, tensors: "not today")
    rows = rows_of(backends=("native", "available"))
    assert [(row.backend, row.ours.status) for row in rows[:2]] == [("native", "skipped"), ("reference", "ok")]
    assert rows[0].ours.reason == "not today"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "distil"], "--ops"),
        (["--ops", "distill,sparse"], "--ops: the op 'sparse' is called 'topk'"),
        (["--ops", ""], "--ops"),
        (["--backends", "natve"], "--backends"),
        (["--rivals", "everyone"], "--rivals"),
        (["--seconds", "0"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
    ],
)
def test_misuse_is_found_before_the_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, record = bench(tmp_path, *arguments)
    error = capsys.readouterr().err
    assert (status, record) == (1, {})
    assert error.startswith(f"tgt-fast: error: {message}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "cuda"]) == 1
    assert "no GPU here" in capsys.readouterr().err


def test_the_gpu_cases_cover_what_is_promised() -> None:
    cuda = torch.device("cuda")
    found = {(case.op, case.shape, case.dtype): case for case in OPS["distill"](cuda, False)}
    for classes in (32000, 128256, 151936):
        shape = f"8192 x {classes}"
        element = 8192 * classes
        assert found["forward_kl + CE", shape, torch.bfloat16].bytes_moved == 6 * element
        assert found["forward_kl + CE, teacher gradient", shape, torch.bfloat16].bytes_moved == 8 * element
        for divergence in ("reverse_kl", "jsd", "tvd"):
            assert (f"{divergence} + CE", shape, torch.bfloat16) in found
    assert ("forward_kl + CE", "4096 x 1000", torch.bfloat16) in found
    assert ("forward_kl + CE", "256 x 10", torch.bfloat16) in found
    latents = OPS["latent"](cuda, False)
    assert {case.unit_bytes for case in latents} == {256 << 20}
    assert {case.dtype for case in latents} == {torch.bfloat16, torch.float32}
    assert sum(case.compiled for case in [*found.values(), *latents]) <= 14  # each takes seconds to compile
    assert all(case.bytes_needed < 40 << 30 for case in [*found.values(), *latents])


def test_medians_take_turns() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    found = timing.medians(calls, seconds=1e-9, device=CPU)
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 5  # a warm-up, then turns
    assert all(value.total > 0 and value.device is None for value in found.values())


def test_the_gpu_clock_charges_the_longer_of_device_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins: events that say what the device took, and a cold cache before each."""
    log: list[str] = []
    took = {"long": 5.0, "short": 0.001}
    current: list[str] = []

    class Event:
        def record(self) -> None:
            log.append("event")
            self.name = current[-1] if current else ""

        def elapsed_time(self, other: Any) -> float:
            return took[other.name]

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            current.append(name)
            log.append(name)

        return run

    monkeypatch.setattr(timing, "_event", Event)
    monkeypatch.setattr(timing, "Flush", lambda device: lambda: log.append("flush"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: log.append("wait"))
    found = timing.medians({name: call(name) for name in took}, seconds=1e-9, device=torch.device("cuda"))
    turn = ["flush", "event", "long", "event", "flush", "event", "short", "event", "wait"]
    assert log[4:5] == ["wait"]
    assert log[5 : 5 + len(turn)] == turn
    assert found["long"] == timing.Timing(5.0, 5.0, None)
    short = found["short"]
    assert short.device == 0.001
    assert short.wall is not None
    assert short.total == max(short.wall, 0.001)


def test_peak_memory_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the child knows nothing of the tiny cases
    case = OPS["distill"](CPU, True)[0]
    found = memory.peak_in_fresh_process(case, "ours:native", quick=True, number=0)
    if found is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 0.9 <= found / case.unit_bytes < 3.0  # the gradient, and little else


def test_errors_and_bars() -> None:
    truth = torch.randn(100, dtype=torch.float64)
    assert relative_error(truth * 1.05, truth, 0.0) == pytest.approx(0.05)
    assert result_bar(torch.float32, truth, 1e-2) == 1e-5
    rounding = relative_error(truth.to(torch.bfloat16), truth, 1e-2)
    assert result_bar(torch.bfloat16, truth, 1e-2) == pytest.approx(1.5 * rounding)
    assert not Check({"x": float("nan")}, {"x": 1.0}).ok
    assert edge_rows(3, 8).tolist() == [0, 1, 2]
    assert edge_rows(100, 5).tolist() == [0, 1, 97, 98, 99]


def test_the_readmes_gpu_table(tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, record = bench(tmp_path, "--rivals", "eager,liger", "--ops", "distill,latent")
    record |= {"driver": "1.2.3"}
    record["rows"][0] |= {"over_liger": 7.0, "over_quack": 3.0}
    text = tables.cuda(record)
    assert text.count("\n|") == 1 + len(record["rows"])
    assert "| quack 3.0x |" in text
    assert "Driver 1.2.3" in text
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.rendered((ROOT / "docs/performance/gpu.md").read_text()).count("*Not yet measured on a GPU.*") == len(
        tables.GPU_OPS
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_the_command_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    arguments = ["--device", "cuda", "--shapes", "quick", "--seconds", "0.05", "--rivals", "eager", "--json", str(file)]
    assert cli.main(["bench", *arguments]) == 0
    record = json.loads(file.read_text())
    assert record["driver"]
    assert all(row["milliseconds"]["ours"] > 0 and row["peak_extra"]["ours"] > 0 for row in record["rows"])
