"""``tgt-fast synthesize``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tgt_fast._rng import isolated_rng
from tgt_fast._threads import threads
from tgt_fast.cache.keys import SYNTHETIC
from tgt_fast.cache.query import as_ids
from tgt_fast.errors import ArgumentError
from tgt_fast.explore.options import SamplerOptions
from tgt_fast.ops import _checks
from tgt_fast.report.grid import save_grid
from tgt_fast.synthesis.engines import local, ray, torchrun
from tgt_fast.synthesis.filters import Filters
from tgt_fast.synthesis.job import Job
from tgt_fast.synthesis.maker import OP
from tgt_fast.synthesis.parquet import is_address
from tgt_fast.synthesis.summary import SynthesisSummary
from tgt_fast.teacher import tree
from tgt_fast.teacher.batches import Columns
from tgt_fast.train.pictures import images_of

_OPTIONS: Final = (*SamplerOptions.__dataclass_fields__, "seed")
_FILTERS: Final = ("max_entropy", "min_agreement", "max_distance")
_LETTERS: Final = 200


def run(given: Mapping[str, Any], console: Console) -> None:
    """What the command line asks for.

    Raises:
        ArgumentError: factories, options or numbers that cannot be.
        ProcessError: a worker failed.
        What :func:`tgt_fast.synthesize` raises.
    """
    engine = given["engine"]
    workers = _checks.integer(OP, "--workers", given["workers"], 1, 1 << 16)
    job = job_of(given)
    progress = sys.stderr.isatty()
    if "preview" in given:
        preview(job, _checks.integer(OP, "--preview", given["preview"], 1, 1 << 16), console)
        return
    if engine == "torchrun":
        share = torchrun.place_of_rank()
        if share is None:
            torchrun.launch(words_of(given), workers)
            job.finish()
            return
        summary = torchrun.work(job, share, progress=progress)
        _print(console, f"rank {share[0]} of {share[1]}: {summary}, in {job.folder}")
        return
    work = ray.run if engine == "ray" else local.run
    summary = work(job, workers, progress=progress)
    job.finish()
    _print(console, f"{summary}, in {job.folder}")
    _tell_dropped(summary, console)


def job_of(given: Mapping[str, Any]) -> Job:
    """The job of a command line."""
    options = tuple((name, given[name]) for name in _OPTIONS if name in given and name != "replicas")
    return Job(
        folder=given["out"],
        teacher=given["teacher"],
        data=given["data"],
        student=given.get("student"),
        options=options,
        replicas=given["replicas"],
        k=given.get("topk"),
        latents=given["latents"],
        step=given["step"],
        format=given["format"],
        shard_bytes=given["shard_bytes"],
        filters=Filters(**{name: given.get(name) for name in _FILTERS}),
        calibrate=_checks.integer(OP, "--calibrate", given["calibrate"], 1, 1 << 40),
        threads=_checks.integer(OP, "--threads", given["threads"], 1, 1 << 12),
        gpus=_checks.number(OP, "--gpus-per-worker", given["gpus_per_worker"], 0, 1 << 10),
    )


def words_of(given: Mapping[str, Any]) -> list[str]:
    """The same command in words, for a process that does a part of it."""
    found = ["synthesize"]
    for name, value in given.items():
        if name in ("command", "workers") or value is False:
            continue
        found.append(f"--{name.replace('_', '-')}")
        if value is not True:
            found[-1] += f"={value}"
    return found


def preview(job: Job, count: int, console: Console) -> None:
    """Make the first examples and show them: pictures in a file, or texts; with their labels."""
    lines: list[tuple[str, ...]] = []
    pieces: list[Any] = []
    with threads(job.threads), isolated_rng(0):
        maker, loader = job.parts()
        columns = Columns(OP, None, needs_ids=True)
        for raw in loader:
            given, x, _ = columns.split(raw)
            assert given is not None
            batch = maker.make(as_ids(given), x)
            assert batch.made is not None
            numbers = SYNTHETIC.unpack(batch.keys).tolist()
            for row, said in enumerate(_said(batch.made.teacher_logits)[: count - len(lines)]):
                refused = -1 if batch.place is None else int(batch.place[row])
                kept = "yes" if refused < 0 else f"no: {maker.filters.names[refused]}"
                lines.append((str(len(lines)), *map(str, numbers[row][:2]), *said, kept))
            pieces.append(batch.made.x)
            if len(lines) >= count:
                break
        if not pieces:
            raise ArgumentError(f"{OP}: --data {job.data} gave no batch")
        teacher = maker.sampler.teacher
        x = tree.take(teacher.join(pieces), torch.arange(len(lines), device="cpu"))
        read_text: Any = getattr(teacher, "texts", None)
        texts = None if read_text is None else read_text(x)
    table = Table(title=f"the first {len(lines)} examples, of which none is stored", title_justify="left")
    for name in ("place", "id", "replica", "label", "probability", "kept", *(() if texts is None else ("text",))):
        table.add_column(name, overflow="fold")
    for number, line in enumerate(lines):
        table.add_row(*line, *(() if texts is None else (texts[number][:_LETTERS],)))
    console.print(table, markup=False, highlight=False)
    if texts is None and images_of(x) is not None:
        folder = "." if is_address(job.folder) else job.folder
        file = save_grid(x, Path(folder) / "preview.png", most=count)
        _print(console, f"pictures, row by row in the order of their places: {file}")


def _said(logits: Tensor) -> list[tuple[str, str]]:
    """Of each example its likeliest class and the probability of that."""
    if logits.ndim != 2:
        return [("-", "-")] * len(logits)
    probability, label = logits.softmax(-1).max(-1)
    return [(str(one), f"{p:.3f}") for one, p in zip(label.tolist(), probability.tolist(), strict=True)]


def _tell_dropped(summary: SynthesisSummary, console: Console) -> None:
    for name, examples in summary.examples.items():
        some = ", ".join(f"{one.key} {one.value:.4g}" for one in examples)
        _print(console, f"dropped by {name}, the first (id, replica, step) with what it found: {some}")


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
