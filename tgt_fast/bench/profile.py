"""``tgt-fast profile``: where the time of a teacher-guided training step goes, as a Chrome trace and a table.

The step is real and small: a convolutional autoencoder and labeler as the teacher, a convolutional student, Adam. The
weights are random, since time does not depend on them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import tgt_fast as tgt
from tgt_fast._ranges import PREFIX, named_range
from tgt_fast.errors import ArgumentError
from tgt_fast.report.output import prepare_folder, write_bytes

MODES: Final = ("random", "gradient", "persistent", "prior")
BATCH: Final = 64
_SIDE, _LATENT, _CLASSES = 32, 64, 10
_WARM_UP: Final = 3


def run_profile(out: Path, device: torch.device, steps: int, mode: str, console: Console) -> Path:
    """Trace so many steps after a warm-up, write ``out/trace.json.gz`` and print the ranges.

    On a GPU the same steps then run under ``emit_nvtx``, for ``nsys profile tgt-fast profile``.

    Raises:
        ArgumentError, CheckpointError: an option out of range, or a folder that cannot be written to.
    """
    if not 1 <= steps <= 1000:
        raise ArgumentError(f"--steps must be in [1, 1000], got {steps}")
    folder = prepare_folder(out, needed=64 << 20)
    step = training_step(device, mode)
    for _ in range(_WARM_UP):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    path = folder / "trace.json.gz"
    with tempfile.TemporaryDirectory() as private:  # the profiler would write through a link
        trace = Path(private, path.name)
        profiler.export_chrome_trace(str(trace))
        write_bytes(path, trace.read_bytes())
    _print(console, profiler, steps, device)
    if device.type == "cuda":
        with torch.autograd.profiler.emit_nvtx():  # type: ignore[no-untyped-call]
            for _ in range(steps):
                step()
    console.print(
        f"wrote {path}: open it at chrome://tracing or https://ui.perfetto.dev",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return path


def training_step(device: torch.device, mode: str) -> Callable[[], None]:
    """One step of teacher-guided training on a batch of 64 images of 3 x 32 x 32."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        teacher, student = _teacher().to(device), _classifier(16).to(device)
        x = torch.rand(BATCH, 3, _SIDE, _SIDE).to(device)
        y = torch.randint(0, _CLASSES, (BATCH,)).to(device)
    ids = torch.arange(BATCH, device=device)
    sampler = tgt.LatentSampler(teacher, mode=mode, sigma=0.5, radius=3.0 if mode == "gradient" else None)
    if mode != "prior":
        sampler.calibrate([x])
    objective = tgt.TGTObjective(teacher, sampler)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)

    def step() -> None:
        with named_range("step"):
            loss = objective(student, x, y, sample_ids=ids)["loss"]
            with named_range("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
            with named_range("optimizer"):
                optimizer.step()
                optimizer.zero_grad()

    return step


def _teacher() -> tgt.Teacher:
    encoder = nn.Sequential(*_down(3, 32), *_down(32, 64), nn.Flatten(), nn.Linear(64 * (_SIDE // 4) ** 2, _LATENT))
    decoder = nn.Sequential(
        nn.Linear(_LATENT, 64 * (_SIDE // 4) ** 2), nn.Unflatten(1, (64, _SIDE // 4, _SIDE // 4)),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.SiLU(),
        nn.ConvTranspose2d(32, 3, 4, stride=2, padding=1), nn.Sigmoid(),
    )  # fmt: skip
    return tgt.Teacher(encoder, decoder, _classifier(32), prior="normal")


def _classifier(width: int) -> nn.Sequential:
    return nn.Sequential(
        *_down(3, width), *_down(width, 2 * width), nn.Flatten(), nn.Linear(2 * width * (_SIDE // 4) ** 2, _CLASSES)
    )


def _down(channels: int, filters: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, filters, 3, stride=2, padding=1), nn.SiLU()


def _print(console: Console, profiler: Any, steps: int, device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    table = Table(title=f"ranges, a step ({steps} steps)", title_justify="left", title_style="bold")
    table.add_column("range")
    for name in ("calls", "CPU ms", *(["GPU ms"] if on_gpu else []), "of the step"):
        table.add_column(name, justify="right")
    # A range has a second event, of the device, where there is one; its time is in the first as well.
    found = [e for e in profiler.key_averages() if e.key.startswith(PREFIX) and e.cpu_time_total > 0]
    spent: Callable[[Any], float] = lambda event: event.device_time_total if on_gpu else event.cpu_time_total  # noqa: E731
    whole = next((spent(event) for event in found if event.key == PREFIX + "step"), 0.0)
    for event in sorted(found, key=spent, reverse=True):
        table.add_row(
            event.key.removeprefix(PREFIX), f"{event.count / steps:g}", f"{event.cpu_time_total / steps / 1e3:.3f}",
            *([f"{event.device_time_total / steps / 1e3:.3f}"] if on_gpu else []),
            f"{spent(event) / whole:.0%}" if whole else "-",
        )  # fmt: skip
    console.print(table, markup=False, highlight=False)
