"""``tgt-fast profile``: where the time of a training step goes, as a Chrome trace and a table.

The step is the user's own, or a real and small one: a convolutional autoencoder and labeler as the teacher, a
convolutional student, Adam, with random weights, since time does not depend on them. Both are steps of ``fit``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from torch import nn

import tgt_fast as tgt
from tgt_fast._ranges import named_range
from tgt_fast.bench.ranges import print_ranges, tree
from tgt_fast.cache.command import factory
from tgt_fast.errors import ArgumentError
from tgt_fast.report.output import prepare_folder, write_bytes
from tgt_fast.teacher.batches import Columns, check_loader
from tgt_fast.train.checks import check_parties, check_tools
from tgt_fast.train.data import BatchStream, module_device
from tgt_fast.train.parallel import Parallel
from tgt_fast.train.run import Run

MODES: Final = ("random", "gradient", "persistent", "prior")
BATCH: Final = 64
_SIDE, _LATENT, _CLASSES = 32, 64, 10
_WARM_UP: Final = 3


def run_profile(
    out: Path,
    device: torch.device,
    steps: int,
    mode: str,
    console: Console,
    *,
    objective: str | None = None,
    data: str | None = None,
) -> Path:
    """Trace so many steps after a warm-up, write ``out/trace.json.gz`` and print the ranges.

    On a GPU the same steps then run under ``emit_nvtx``, for ``nsys profile tgt-fast profile``.

    Args:
        device, mode: of the built-in step.
        objective, data: ``package.module:factory`` of a step of the user's own. Called without arguments they give
            (student, objective) or (student, objective, optimizer), and batches, as ``fit`` takes them.

    Raises:
        ArgumentError, CheckpointError: an option out of range, factories that give something else, or a folder that
            cannot be written to.
    """
    if not 1 <= steps <= 1000:
        raise ArgumentError(f"--steps must be in [1, 1000], got {steps}")
    if (objective is None) != (data is None):
        raise ArgumentError("--objective and --data belong together: what trains, and what on")
    folder = prepare_folder(out, needed=64 << 20)
    if objective is None or data is None:
        step = training_step(device, mode)
    else:
        step, device = own_step(objective, data)
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
    print_ranges(console, tree(profiler.events()), steps, on_gpu=device.type == "cuda")
    if device.type == "cuda":
        with torch.autograd.profiler.emit_nvtx():  # type: ignore[no-untyped-call]
            for _ in range(steps):
                step()
    console.print(
        f"wrote {path}: open it at chrome://tracing or https://ui.perfetto.dev",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return path


def own_step(objective: str, data: str) -> tuple[Callable[[], None], torch.device]:
    """One step of what two factories give, and the device of its student."""
    made = factory("--objective", objective)()
    if not isinstance(made, (tuple, list)) or len(made) not in (2, 3):
        raise ArgumentError(
            f"--objective: {objective} must return (student, objective) or (student, objective, optimizer), as fit "
            f"takes them, got {type(made).__name__}"
        )
    student, goal, *rest = made
    check_parties(student, goal, {})
    optimizer = rest[0] if rest else torch.optim.Adam(student.parameters())
    check_tools(optimizer, None, None, "", None)
    batches = factory("--data", data)()
    check_loader("--data", batches)
    return _step(student, goal, batches, optimizer), module_device(student) or torch.device("cpu")


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
    return _step(student, objective, [(ids, x, y)], torch.optim.Adam(student.parameters(), lr=1e-3))


def _step(student: nn.Module, objective: Any, batches: Any, optimizer: Any) -> Callable[[], None]:
    student.train()
    run = Run(student, objective, BatchStream(batches), Columns("profile"), optimizer, None, Parallel(student))

    def step() -> None:
        with named_range("step"):
            run.step(1, None)

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
