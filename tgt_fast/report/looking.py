"""``tgt_fast.report.run``: what a student and a sampler do on a loader's data, as a page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tgt_fast._rng import isolated_rng
from tgt_fast.errors import ArgumentError
from tgt_fast.explore import LatentSampler, SyntheticReplay
from tgt_fast.report import story, training
from tgt_fast.teacher.batches import Batch, Columns, check_loader, split_batches
from tgt_fast.teacher.returned import LogitsOf
from tgt_fast.train.data import module_device, to_device
from tgt_fast.train.metrics import evaluate
from tgt_fast.train.probe import probe
from tgt_fast.train.run import FitResult


def run(
    result: FitResult,
    sampler: LatentSampler | SyntheticReplay | None = None,
    loader: Iterable[Any] | None = None,
    *,
    out: str | os.PathLike[str],
    student: nn.Module | None = None,
    class_counts: Sequence[int] | Tensor | None = None,
    columns: Sequence[Any] | None = None,
    logits_of: LogitsOf = None,
) -> Path:
    """Write the page of a run that is over: one HTML file below 3 MB that needs nothing else.

    It shows curves of losses and metrics, accuracy by class thirds, anchors beside their reconstructions and what the
    sampler makes of them (images, or texts), the disagreement over ascent steps, what the theory's bound depends on,
    settings and versions. Its curves have a point a record of the history (``eval_every``); those of
    ``tgt-fast report``, from a log, have the steps between. Plots need matplotlib (``tgt-fast[demo]``); without it
    there are tables alone. Nothing is changed by it: sampler, student and global generators are as they were.

    Args:
        result: what :func:`tgt_fast.fit` returned.
        sampler: the run's, or another one; None leaves exploration and diagnostics out.
        loader: real examples to look at and, where they have labels, to measure on; without it likewise.
        out: a file ending in .html, or a folder, for ``report.html``.
        student: by default the one that was trained, if it still lives, as it is now.
        class_counts: the training examples of each class, for the thirds; by default counted in the loader.
        columns: ``(ids, x, y)``, where they are in the loader's batches, as for :func:`tgt_fast.fit`.
        logits_of: where the logits are in what the student returns, as for :class:`tgt_fast.TGTObjective`.

    Returns:
        The page's path.

    Raises:
        ArgumentError: no result of a run, no student to look at, an empty loader, or a folder that cannot be written.
        CheckpointError: the page cannot be written.
    """
    if not isinstance(result, FitResult):
        raise ArgumentError(f"report.run: the result of fit() is needed, got {type(result).__name__}")
    if sampler is not None and not isinstance(sampler, (LatentSampler, SyntheticReplay)):
        raise ArgumentError(f"report.run: sampler must be a tgt_fast.LatentSampler, got {type(sampler).__name__}")
    exploration = thirds = None
    if loader is not None:
        check_loader("report.run", loader)
        model = result.student if student is None else student
        if model is None:
            raise ArgumentError("report.run: the student that was trained is gone; pass student=")
        with isolated_rng():  # reading a loader draws numbers
            if sampler is not None:
                batch = _first(loader, Columns("report.run", columns), model)
                exploration = probe(sampler, model, batch, logits_of=logits_of)
            counts = _counts(loader, Columns("report.run", columns)) if class_counts is None else class_counts
            if counts is not None and len(counts) >= 3:
                teacher = None if sampler is None else sampler.teacher
                thirds = evaluate(model, teacher, loader, class_counts=counts, columns=columns, logits_of=logits_of)
                thirds = {name: thirds[name] for name in ("head", "middle", "tail") if thirds[name] == thirds[name]}
    return training.write(story.of_result(result, exploration, thirds or None), out)


def _first(loader: Iterable[Any], parts: Columns, model: nn.Module) -> Batch:
    for batch, _ in split_batches(loader, parts, padding=False):
        found: Batch = to_device(batch, module_device(model))
        return found
    raise ArgumentError("report.run: the loader gave no batch")


def _counts(loader: Iterable[Any], parts: Columns) -> Tensor | None:
    """The examples of each class."""
    found = torch.zeros(0, dtype=torch.int64, device="cpu")
    for (_, _, y), _ in split_batches(loader, parts, padding=False):
        if y is None or y.ndim != 1:
            return None
        here = torch.bincount(y[y >= 0].cpu(), minlength=len(found))
        found = here + torch.nn.functional.pad(found, (0, len(here) - len(found)))
    return found
