"""``fit``: a thin training loop that can be killed and resumed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from tgt_fast._ranges import named_range
from tgt_fast._rng import isolated_rng
from tgt_fast.errors import ArgumentError, CheckpointError
from tgt_fast.explore.student import refuse_labeler
from tgt_fast.teacher import Teacher
from tgt_fast.teacher.batches import Batch, Columns
from tgt_fast.teacher.modes import eval_mode
from tgt_fast.teacher.sharing import refuse_shared
from tgt_fast.train import checkpoint
from tgt_fast.train.checks import check_options, check_parties, checked_output
from tgt_fast.train.data import BatchStream, module_device, to_device
from tgt_fast.train.files import make_writable
from tgt_fast.train.names import take_own_names, under_own_names
from tgt_fast.train.rng import turn

BEST_WEIGHTS = "best.safetensors"
Evaluate = Callable[[nn.Module], Mapping[str, float]]


class Objective(Protocol):
    """What :func:`fit` minimises: a ``TGTObjective``, or any callable that can be called like one.

    Four attributes are used where they exist: ``teacher``, whose parameters the optimizer must not hold; ``sampler``,
    whose state goes into checkpoints; and for ``accumulate`` ``normalizers``, which it needs, and ``occurrences``: what
    it gives that is not None is passed as ``occurrence=``.
    """

    def __call__(
        self,
        student: nn.Module,
        x: Any,
        y: Tensor | None,
        /,
        *,
        sample_ids: Tensor | None,
        step: int,
        **normalizers: Any,  # and occurrence
    ) -> Mapping[str, Any]:
        """``{"loss": 0-d}`` and, if wanted, ``"parts"``: detached 0-d tensors, averaged in the history."""
        ...


@dataclass
class FitResult:
    """What :func:`fit` did.

    Attributes:
        steps: optimizer steps taken in all, those before a resume included.
        history: one record an evaluation: ``step``, the means of ``loss`` and of its parts (``hard``,
            ``soft``, ``synthetic``) since the record before, the learning rate ``lr``, and what ``evaluate``
            returned.
        best: the student's ``state_dict`` (copies on the CPU) at its best evaluation; None without one. Its names are
            the model's own, also where ``torch.compile`` wraps it; ``student.load_state_dict`` takes them either way.
        best_step: the step of that evaluation.
        best_score: its value of the monitored metric.
    """

    steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_step: int | None = None
    best_score: float | None = None


def fit(
    student: nn.Module,
    objective: Objective,
    loader: Iterable[Any],
    *,
    steps: int,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    accumulate: int = 1,
    clip_grad_norm: float | None = None,
    evaluate: Evaluate | None = None,
    eval_every: int = 0,
    monitor: str = "accuracy",
    mode: Literal["max", "min"] = "max",
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
    seed: int | None = None,
    progress: bool = True,
    columns: Sequence[Any] | None = None,
) -> FitResult:
    """Train ``student`` for ``steps`` optimizer steps on ``objective``, over ``loader`` as often as it takes.

    Each step: ``objective(student, x, y)["loss"].backward()``, clip, ``optimizer.step()``, ``scheduler.step()``.
    The student is put in train mode, and ends with its last weights; ``student.load_state_dict(result.best)``
    takes the best ones.

    A run that was killed at any moment and is started again with the same arguments and ``resume=True`` gives, on
    a CPU with as many threads, the same bits as one that was not. The interrupted epoch's batches are read once more
    up to the place reached. That holds for loaders with workers, ``persistent_workers`` included. Outside this promise
    are random numbers that persistent workers draw themselves (augmentation in the data set: they live longer than an
    epoch, and so do their generators), loaders with a state of their own, and iterators that can be read only once.

    Args:
        student: the module to train, inputs -> logits. Batches are moved to its device.
        objective: a :class:`TGTObjective`, or another :class:`Objective`.
        loader: a DataLoader, or anything that can be iterated over again, of batches ``(ids, x, y)``,
            ``(x, y)`` or ``x``; ids (B,) int64, y (B, ...) int64 or None. For others see ``columns``. It may shuffle
            by its own generator or by the global one.
        steps: the optimizer steps of the whole run, >= 0, those before a resume included.
        optimizer: over the student's parameters.
        scheduler: stepped after each optimizer step; a ReduceLROnPlateau after each evaluation, by the
            monitored metric.
        accumulate: batches a step. Their valid examples count alike, however they are spread: 4 batches of 8
            equal 1 of 32 (up to BatchNorm, which sees batches).
        clip_grad_norm: the largest l2 norm of a step's gradient.
        evaluate: student -> metrics, such as ``lambda s: tgt_fast.train.evaluate(s, teacher, loader)``. It
            runs in eval mode, and on random numbers of its own.
        eval_every: steps between records of the history; one follows the last step in any case.
        monitor: the metric that decides what is best. Of equals the earliest wins; NaN never does.
        mode: whether more of it ("max") or less ("min") is better.
        checkpoint_dir: keeps the last checkpoint (:mod:`tgt_fast.train.checkpoint`; the best weights are in it too)
            and ``best.safetensors``, the best weights under their own names. A checkpoint is saved at the end in any
            case.
        checkpoint_every: steps between checkpoints.
        resume: go on from the checkpoint in ``checkpoint_dir``; start anew where there is none.
        seed: None draws from the global random generators, and moves them. With a seed the run has its own
            numbers (torch, numpy, Python) and leaves the global ones as they were: its result does not depend
            on what ran before. Those generators are one each in a process: beside a run with a seed no other thread
            can run fit, nor may it draw from them.
        progress: show a bar.
        columns: ``(ids, x, y)``, where they are in a batch: each an index, a key of a dict or another Mapping, or
            None for what there is not; x may be a tuple of keys, and is then a dict of them. By default the length
            decides: three are (ids, x, y), two (x, y), one is x; parts whose dtypes or shapes do not fit that, and
            dicts that seem to hold labels or ids, are refused.

    Returns:
        A :class:`FitResult`.

    Raises:
        ArgumentError: an option out of range, an objective that cannot be called as one or gives no loss to be trained
            on, a student that is the labeler, an optimizer over parameters that the objective's teacher keeps frozen, a
            monitored metric that ``evaluate`` does not return, an empty loader, a batch that can be read in more
            than one way, a ``checkpoint_dir`` that holds another run's checkpoint while ``resume`` is False, or a run
            in another thread while one of the two has a seed.
        CheckpointError: the folder cannot be written (found out before the first step, or later when the disk
            is full), or its checkpoint is damaged or of another run; student and checkpoint are left as they
            were.

    >>> import tgt_fast as tgt
    >>> teacher = tgt.Teacher(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 3))
    >>> student = nn.Linear(8, 3)
    >>> batches = [(torch.randn(4, 8), torch.tensor([0, 1, 2, -1]))]
    >>> optimizer = torch.optim.Adam(student.parameters())
    >>> tgt.fit(student, tgt.TGTObjective(teacher), batches, steps=3, optimizer=optimizer, progress=False).steps
    3
    """
    check_options(steps, accumulate, clip_grad_norm, eval_every, mode, checkpoint_every)
    check_parties(student, objective)
    if accumulate > 1 and not hasattr(objective, "normalizers"):
        raise ArgumentError("fit: accumulate > 1 needs an objective with normalizers(batches), as TGTObjective has")
    if isinstance(scheduler, ReduceLROnPlateau) and evaluate is None:
        raise ArgumentError("fit: ReduceLROnPlateau follows the monitored metric, so it needs evaluate")
    parts = Columns("fit", columns)
    if isinstance(teacher := getattr(objective, "teacher", None), Teacher):
        refuse_labeler("fit", teacher, student)
        refuse_shared("fit", teacher, student, optimizer)
    folder = _checked_folder(checkpoint_dir, resume)
    take_own_names(student)
    run = _Run(student, objective, BatchStream(loader), parts, optimizer, scheduler)
    with turn("fit", seeded=seed is not None), nullcontext() if seed is None else isolated_rng(seed):
        if folder is not None and resume and checkpoint.has_checkpoint(folder):
            run.load(folder)
            checkpoint.remove_unnamed(folder)  # of a process that was killed as it removed them
        student.train()
        optimizer.zero_grad()
        result = run.result
        shown = {"disable": not progress, "desc": "fit", "unit": "step", "miniters": 1}
        with _Bar(total=steps, initial=min(result.steps, steps), **shown) as bar:
            while result.steps < steps:
                run.step(accumulate, clip_grad_norm)
                if _due(eval_every, result.steps, steps):
                    improved = run.record(evaluate, monitor, mode)
                    if improved and folder is not None:
                        checkpoint.save_weights(folder / BEST_WEIGHTS, result.best or {})
                    last = result.history[-1]
                    bar.set_postfix({name: f"{last[name]:.4g}" for name in ("loss", monitor) if name in last})
                if folder is not None and _due(checkpoint_every, result.steps, steps):
                    run.save(folder)
                bar.update()
        if folder is not None and not checkpoint.has_checkpoint(folder):
            run.save(folder)  # of no steps
    return result


class _Bar(tqdm):  # type: ignore[misc]
    """A bar without tqdm's monitoring thread: it outlives the run, and DataLoader workers are forked beside it."""

    monitor_interval = 0


class _Run:
    """What a step changes, and so what a checkpoint holds."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        stream: BatchStream,
        columns: Columns,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
    ) -> None:
        self.student, self.objective, self.stream, self.columns = student, objective, stream, columns
        self.optimizer, self.scheduler = optimizer, scheduler
        self.device = module_device(student)
        self.result = FitResult()
        self.sums: dict[str, Tensor] = {}  # of the loss and its parts since the last record; no step waits for them
        self.summed = 0  # steps in the sums

    def step(self, accumulate: int, clip_grad_norm: float | None) -> None:
        batches = [self._take() for _ in range(accumulate)]
        normalizers: dict[str, Any] = {}
        if accumulate > 1:
            real, synthetic = self.objective.normalizers(batches)  # type: ignore[attr-defined]
            normalizers = {"normalizer": real, "synthetic_normalizer": synthetic}
        for (ids, x, y), copies in zip(batches, self._copies(batches), strict=True):
            more = normalizers if copies is None else {**normalizers, "occurrence": copies}
            output = self.objective(self.student, x, y, sample_ids=ids, step=self.result.steps, **more)
            loss, parts = checked_output(output)
            with named_range("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
            self._add({"loss": loss.detach(), **parts})
        if clip_grad_norm is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
        with named_range("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        self.summed += 1
        self.result.steps += 1

    def _copies(self, batches: list[Batch]) -> list[Tensor | None]:
        """Of the batches of one step, which copy of its id each row is; a single one's are counted by its sampler."""
        counted = getattr(self.objective, "occurrences", None)
        if counted is None or len(batches) == 1:
            return [None] * len(batches)
        found: list[Tensor | None] = counted(batches)
        return found

    def _take(self) -> Batch:
        batch: Batch = to_device(self.columns.split(self.stream.take()), self.device)
        return batch

    def _add(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            value = value.double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def record(self, evaluate: Evaluate | None, monitor: str, mode: str) -> bool:
        """Add to the history; whether this is the best evaluation so far (its weights are then kept)."""
        result = self.result
        means = {name: value.item() / self.summed for name, value in self.sums.items()}
        self.sums, self.summed = {}, 0
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        result.history.append({"step": result.steps, **means, "lr": learning_rate})
        if evaluate is None:
            return False
        with isolated_rng(), eval_mode(self.student):
            metrics = {name: float(value) for name, value in evaluate(self.student).items()}
        result.history[-1].update(metrics)
        if monitor not in metrics:
            raise ArgumentError(f"fit: monitor is {monitor!r}, but evaluate returned {sorted(metrics)}")
        score = metrics[monitor]
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(score)
        if math.isnan(score) or (result.best_score is not None and not _better(score, result.best_score, mode)):
            return False
        result.best_step, result.best_score = result.steps, score
        result.best = {name: _copy(value) for name, value in under_own_names(self.student.state_dict()).items()}
        return True

    def save(self, folder: Path) -> None:
        result = self.result
        extra = {
            "sums": self.sums,
            "summed": self.summed,
            "history": result.history,
            "best": result.best,
            "best_step": result.best_step,
            "best_score": result.best_score,
        }
        checkpoint.save_checkpoint(folder, **self._parts(), step=result.steps, extra=extra)

    def load(self, folder: Path) -> None:
        loaded = checkpoint.load_checkpoint(folder, **self._parts(), check=_check_saved)
        extra = loaded.extra
        best = extra["best"] and under_own_names(extra["best"])
        self.result = FitResult(loaded.step, extra["history"], best, extra["best_step"], extra["best_score"])
        self.sums = {name: value.to(self.device) for name, value in extra["sums"].items()}
        self.summed = extra["summed"]

    def _parts(self) -> dict[str, Any]:
        return {
            "student": self.student,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "sampler": getattr(self.objective, "sampler", None),
            "data": self.stream,
        }


def _check_saved(saved: checkpoint.Checkpoint) -> None:
    """Whether a checkpoint's step and ``extra`` are what ``_Run.save`` writes."""
    extra = saved.extra
    kinds: dict[str, Any] = {
        "sums": dict,
        "summed": int,
        "history": list,
        "best": (dict, NoneType),
        "best_step": (int, NoneType),
        "best_score": (float, NoneType),
    }
    if not isinstance(extra, dict) or extra.keys() != kinds.keys():
        found = sorted(map(str, extra)) if isinstance(extra, dict) else type(extra).__name__
        raise CheckpointError(f"it was not saved by fit: its extra holds {found}, fit's {sorted(kinds)}")
    wrong = [name for name, kind in kinds.items() if not isinstance(extra[name], kind)]
    if not wrong and not all(isinstance(value, Tensor) for value in extra["sums"].values()):
        wrong = ["sums"]
    if not wrong and not all(isinstance(record, dict) for record in extra["history"]):
        wrong = ["history"]
    if wrong:
        raise CheckpointError(f"it was not saved by fit: of its extra, {wrong} are not what fit saves")


def _due(every: int, step: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def _better(score: float, best: float, mode: str) -> bool:
    return score > best if mode == "max" else score < best


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _checked_folder(checkpoint_dir: str | os.PathLike[str] | None, resume: bool) -> Path | None:
    if checkpoint_dir is None:
        if resume:
            raise ArgumentError("fit: resume=True needs a checkpoint_dir")
        return None
    folder = Path(checkpoint_dir)
    if not resume and checkpoint.has_checkpoint(folder):
        raise ArgumentError(f"fit: {folder} holds a run's checkpoint; pass resume=True to go on, or another folder")
    make_writable(folder)
    return folder
