"""``fit``: a thin training loop that can be killed and resumed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from tgt_fast.errors import ArgumentError
from tgt_fast.train import checkpoint
from tgt_fast.train.data import Batch, BatchStream, module_device, split_batch, to_device
from tgt_fast.train.metrics import eval_mode
from tgt_fast.train.objective import TGTObjective
from tgt_fast.train.rng import isolated_rng, set_rng_state

BEST_WEIGHTS = "best.safetensors"


@dataclass
class FitResult:
    """What :func:`fit` did.

    Attributes:
        steps: optimizer steps taken in all, those before a resume included.
        history: one record an evaluation: ``step``, the mean ``loss`` and its terms ``hard``, ``soft`` and ``synthetic`` since the
            record before, ``lr``, and what ``evaluate`` returned.
        best: the student's ``state_dict`` (copies on the CPU) at its best evaluation; None without one.
        best_step: the step of it.
        best_score: the value of the monitored metric then.
    """

    steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_step: int | None = None
    best_score: float | None = None


def fit(
    student: nn.Module,
    objective: TGTObjective,
    loader: Iterable[Any],
    *,
    steps: int,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    accumulate: int = 1,
    clip_grad_norm: float | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    eval_every: int = 0,
    monitor: str = "accuracy",
    mode: Literal["max", "min"] = "max",
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
    seed: int | None = None,
    progress: bool = True,
) -> FitResult:
    """Train ``student`` for ``steps`` optimizer steps on ``objective``, over ``loader`` as often as it takes.

    Each step: ``objective(student, x, y)["loss"].backward()``, clip, ``optimizer.step()``, ``scheduler.step()``. The student is
    put in train mode, and ends with its last weights; ``student.load_state_dict(result.best)`` takes the best ones.

    A run that was killed at any moment, started again with ``resume=True`` and the same arguments, gives the same bits on a
    CPU as one that was not. The data's order is found again by reading the interrupted epoch's batches up to that place once
    more. Outside this promise: random data augmentation in ``persistent_workers``, loaders that keep a state of their own, and
    iterators that can be read only once.

    Args:
        student: the module to train, inputs -> logits. Batches are moved to its device.
        objective: a :class:`TGTObjective`.
        loader: a DataLoader, or anything that can be iterated over again, of batches ``(ids, x, y)``, ``(x, y)`` or ``x``; ids are
            (B,) int64, y (B, ...) int64 or None. Shuffling may use the loader's own generator or the global one.
        steps: the optimizer steps of the whole run, >= 0, those before a resume included.
        optimizer: over the student's parameters.
        scheduler: stepped after each optimizer step.
        accumulate: batches a step. Their examples count alike, however many of them are valid: 4 batches of 8 equal 1 of 32
            (up to BatchNorm, which sees batches).
        clip_grad_norm: the largest l2 norm of a step's gradient.
        evaluate: student -> metrics, such as ``lambda s: tgt_fast.train.evaluate(s, teacher, loader)``. It runs in eval mode and
            leaves the random numbers of the training as they were.
        eval_every: steps between evaluations; one follows the last step in any case.
        monitor, mode: the metric that decides what is best, and whether more of it ("max") or less ("min") is better. The
            earliest of equals wins; NaN never does.
        checkpoint_dir: where to keep the last checkpoint and ``best.safetensors``, the best weights under their own names. A
            checkpoint is saved at the end in any case. See :mod:`tgt_fast.train.checkpoint`.
        checkpoint_every: steps between checkpoints.
        resume: go on from the checkpoint in ``checkpoint_dir``; start anew where there is none.
        seed: None draws from the global random generators, and moves them. With a seed the run has its own stream (torch,
            numpy, Python) and leaves the global ones untouched, so that its result does not depend on what ran before.
        progress: show a bar.

    Returns:
        A :class:`FitResult`.

    Raises:
        ArgumentError: an option out of range, a monitored metric that ``evaluate`` does not return, an empty loader, or a
            ``checkpoint_dir`` that holds another run's checkpoint while ``resume`` is False.
        CheckpointError: the folder cannot be written (found out before the first step, or at a full disk later), or its
            checkpoint is damaged or of another run. The student and the checkpoint on the disk are then as they were.
    """
    _check(steps, accumulate, clip_grad_norm, eval_every, mode, checkpoint_every)
    folder = _checked_folder(checkpoint_dir, resume)
    run = _Run(student, objective, BatchStream(loader), optimizer, scheduler)
    with nullcontext() if seed is None else isolated_rng(seed):
        if folder is not None and resume and checkpoint.has_checkpoint(folder):
            run.load(folder)
        student.train()
        bar = tqdm(
            total=steps, initial=min(run.result.steps, steps), disable=not progress, desc="fit", unit="step"
        )
        with bar:
            while run.result.steps < steps:
                run.step(accumulate, clip_grad_norm)
                step = run.result.steps
                last = step == steps
                if evaluate is not None and (last or (eval_every and step % eval_every == 0)):
                    improved = run.evaluate(evaluate, monitor, mode)
                    if improved and folder is not None:
                        checkpoint.save_weights(folder / BEST_WEIGHTS, run.result.best or {})
                    bar.set_postfix(run.shown(monitor), refresh=False)
                if folder is not None and (last or (checkpoint_every and step % checkpoint_every == 0)):
                    run.save(folder)
                bar.update()
    return run.result


class _Run:
    """What a step changes, and so what a checkpoint holds."""

    def __init__(
        self,
        student: nn.Module,
        objective: TGTObjective,
        stream: BatchStream,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
    ) -> None:
        self.student, self.objective, self.stream = student, objective, stream
        self.optimizer, self.scheduler = optimizer, scheduler
        self.device = module_device(student)
        self.result = FitResult()
        self.sums: dict[
            str, Tensor
        ] = {}  # of the terms since the last record; on the device, so that no step waits for it
        self.summed = 0

    def step(self, accumulate: int, clip_grad_norm: float | None) -> None:
        batches = [self._take() for _ in range(accumulate)]
        normalizers: dict[str, Any] = {}
        if accumulate > 1:
            real, synthetic = self.objective.normalizers(batches)
            normalizers = {"normalizer": real, "synthetic_normalizer": synthetic}
        for ids, x, y in batches:
            output = self.objective(self.student, x, y, sample_ids=ids, step=self.result.steps, **normalizers)
            output["loss"].backward()
            terms = {"loss": output["loss"].detach(), **cast(dict[str, Tensor], output["parts"])}
            for name, value in terms.items():
                self.sums[name] = self.sums.get(name, 0.0) + value.double()
        if clip_grad_norm is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        self.summed += 1
        self.result.steps += 1

    def _take(self) -> Batch:
        return split_batch(to_device(self.stream.take(), self.device))

    def evaluate(self, evaluate: Callable[[nn.Module], dict[str, float]], monitor: str, mode: str) -> bool:
        """Add a record to the history; whether it is the best so far (its weights are then kept)."""
        with isolated_rng(), eval_mode(self.student):
            metrics = {name: float(value) for name, value in evaluate(self.student).items()}
        if monitor not in metrics:
            raise ArgumentError(f"fit: monitor={monitor!r}, but evaluate returned {sorted(metrics)}")
        result, score = self.result, metrics[monitor]
        means = {name: value.item() / self.summed for name, value in self.sums.items()}
        result.history.append(
            {"step": result.steps, **means, "lr": float(self.optimizer.param_groups[0]["lr"]), **metrics}
        )
        self.sums, self.summed = {}, 0
        if math.isnan(score):
            return False
        if result.best_score is not None and (
            score <= result.best_score if mode == "max" else score >= result.best_score
        ):
            return False
        result.best_step, result.best_score = result.steps, score
        result.best = {
            name: value.detach().to("cpu", copy=True) for name, value in self.student.state_dict().items()
        }
        return True

    def shown(self, monitor: str) -> dict[str, str]:
        record = self.result.history[-1]
        return {name: f"{record[name]:.4g}" for name in ("loss", monitor)}

    def save(self, folder: Path) -> None:
        result = self.result
        extra = {
            "data": self.stream.state_dict(),
            "sums": self.sums,
            "summed": self.summed,
            "history": result.history,
            "best": result.best,
            "best_step": result.best_step,
            "best_score": result.best_score,
        }
        checkpoint.save_checkpoint(
            folder,
            student=self.student,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            sampler=self.objective.sampler,
            step=result.steps,
            extra=extra,
        )

    def load(self, folder: Path) -> None:
        loaded = checkpoint.load_checkpoint(
            folder,
            student=self.student,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            sampler=self.objective.sampler,
            restore_rng=False,
        )
        extra = loaded.extra
        self.result = FitResult(
            loaded.step, extra["history"], extra["best"], extra["best_step"], extra["best_score"]
        )
        self.sums = {name: value.to(self.device) for name, value in extra["sums"].items()}
        self.summed = extra["summed"]
        self.stream.load_state_dict(extra["data"])  # draws random numbers
        set_rng_state(loaded.rng)


def _check(
    steps: int,
    accumulate: int,
    clip_grad_norm: float | None,
    eval_every: int,
    mode: str,
    checkpoint_every: int,
) -> None:
    at_least = {"steps": (steps, 0), "accumulate": (accumulate, 1), "eval_every": (eval_every, 0)}
    at_least["checkpoint_every"] = (checkpoint_every, 0)
    for name, (value, low) in at_least.items():
        if not isinstance(value, int) or value < low:
            raise ArgumentError(f"fit: {name} must be an integer >= {low}, got {value!r}")
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ArgumentError(f"fit: clip_grad_norm must be > 0, got {clip_grad_norm!r}")
    if mode not in ("max", "min"):
        raise ArgumentError(f"fit: mode must be 'max' or 'min', got {mode!r}")


def _checked_folder(checkpoint_dir: str | os.PathLike[str] | None, resume: bool) -> Path | None:
    if checkpoint_dir is None:
        if resume:
            raise ArgumentError("fit: resume=True needs a checkpoint_dir")
        return None
    folder = Path(checkpoint_dir)
    if not resume and checkpoint.has_checkpoint(folder):
        raise ArgumentError(
            f"fit: {folder} holds a run's checkpoint; pass resume=True to go on with it, or another folder"
        )
    checkpoint.make_writable(folder)
    return folder
