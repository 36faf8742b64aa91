"""A training run at a step, and so what a checkpoint of it holds."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tgt_fast._ranges import named_range
from tgt_fast._rng import isolated_rng
from tgt_fast.errors import ArgumentError, CheckpointError
from tgt_fast.explore.processes import saved_by_all
from tgt_fast.teacher import tree
from tgt_fast.teacher.batches import Batch, Columns
from tgt_fast.teacher.modes import eval_mode
from tgt_fast.train import checkpoint
from tgt_fast.train.average import Average
from tgt_fast.train.checks import checked_output
from tgt_fast.train.data import BatchStream, module_device, to_device
from tgt_fast.train.names import under_own_names
from tgt_fast.train.parallel import Parallel, unwrapped
from tgt_fast.train.processes import Processes, evaluated_by, mean_over

if TYPE_CHECKING:
    from tgt_fast.train.ahead import StepsAhead

Evaluate = Callable[[nn.Module], Mapping[str, float]]


class Objective(Protocol):
    """The objective that :func:`fit` minimises: a ``TGTObjective``, or any callable that can be called like one.

    Six attributes are used where they exist: ``teacher``, whose parameters the optimizer must not hold; ``sampler``,
    whose state goes into checkpoints, as the objective's own does where it has ``terms``; ``cache``, which is flushed
    then; and for ``accumulate`` ``normalizers``, which it needs, and ``occurrences``: what it gives that is not None is
    passed as ``occurrence=``.
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
        **normalizers: Any,  # and occurrence, and logits_of where fit was given it
    ) -> Mapping[str, Any]:
        """``{"loss": 0-d}`` and, if wanted, ``"parts"``: detached 0-d tensors, averaged in the history."""
        ...


@dataclass
class FitResult:
    """The course of a :func:`fit`.

    Attributes:
        steps: optimizer steps taken in all, those before a resume included.
        history: one record an evaluation: ``step``, the means of ``loss`` and of its parts (``hard``,
            ``soft``, ``synthetic``) since the record before, the learning rate ``lr``, and what ``evaluate``
            returned.
        best: the student's ``state_dict`` (copies on the CPU; of FSDP2's, of this process's shards) at its best
            evaluation, of averaged weights where there are some; None without one. Its names are the model's own, also
            where ``torch.compile`` or DistributedDataParallel wraps it; ``student.load_state_dict`` takes them either
            way.
        best_step: the step of that evaluation.
        best_score: its value of the monitored metric.
        ema: the averaged weights at the end, such a ``state_dict``, where ``fit(ema=)`` asked for them.
        settings: what the run was made with, in words, for a report.
    """

    steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_step: int | None = None
    best_score: float | None = None
    ema: dict[str, Tensor] | None = None
    settings: dict[str, str] = field(default_factory=dict, repr=False)
    _student: Any = field(default=None, repr=False, compare=False)  # a weak reference

    @property
    def student(self) -> nn.Module | None:
        """The module that was trained, without what wraps it, as long as it lives elsewhere: a result keeps none."""
        found: nn.Module | None = None if self._student is None else self._student()
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_student": None}


class Run:
    """The parts that a step changes, and so what a checkpoint holds."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        stream: BatchStream,
        columns: Columns,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        parallel: Parallel,
        *,
        autocast: torch.dtype | None = None,
        ema: float | None = None,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        self.student, self.objective, self.stream, self.columns = student, objective, stream, columns
        self.model, self.parallel = unwrapped(student), parallel
        self.autocast = autocast
        self.asked = dict(asked or {})  # of the objective, at each call
        self.average = None if ema is None else Average(self.model, ema)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.device = module_device(student)
        self.result = FitResult()
        self.sums: dict[str, Tensor] = {}  # of the loss and its parts since the last record; no step waits for them
        self.summed = 0  # steps in the sums
        self.ahead: StepsAhead | None = None
        self.kept = 0  # examples of the first batch that ``sample`` keeps
        self.sample: Batch | None = None
        self.last: dict[str, Tensor] = {}  # the loss and its parts of the last step

    def step(self, accumulate: int, clip_grad_norm: float | None, *, within: int = 1) -> None:
        """``within``: steps, this one included, until something beside training looks at the data or the sampler."""
        if self.ahead is None:
            batches = [self._take() for _ in range(accumulate)]
            copies = self.copies(batches)
        else:
            batches, copies = self.ahead.next(accumulate, within)
        self.last = {}
        normalizers: dict[str, Any] = dict(self.asked)
        if accumulate > 1:
            real, synthetic = self.objective.normalizers(batches)  # type: ignore[attr-defined]
            normalizers |= {"normalizer": real, "synthetic_normalizer": synthetic}
        for place, ((ids, x, y), copy) in enumerate(zip(batches, copies, strict=True)):
            more = dict(normalizers) if copy is None else {**normalizers, "occurrence": copy}
            if self.ahead is not None and (made := self.ahead.made()) is not None:
                more["synthetic"] = made
            with self.parallel.averaging(place + 1 == len(batches)):
                with self.precision(), named_range("objective"):
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
            if self.average is not None:
                self.average.update()
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        self.summed += 1
        self.result.steps += 1

    def copies(self, batches: list[Batch]) -> list[Tensor | None]:
        """Of the batches of one step, which copy of its id each row is; a single one's are counted by its sampler."""
        counted = getattr(self.objective, "occurrences", None)
        if counted is None or len(batches) == 1:
            return [None] * len(batches)
        found: list[Tensor | None] = counted(batches)
        return found

    def precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast((self.device or torch.device("cpu")).type, self.autocast)

    def _take(self) -> Batch:
        with named_range("data"):
            return self.batch_of(self.stream.take())

    def batch_of(self, raw: Any) -> Batch:
        """What the loader gave, on the device."""
        batch: Batch = to_device(self.columns.split(raw), self.device)
        if self.kept and self.sample is None:
            self.sample = tree.map_batched(lambda leaf: leaf[: self.kept].clone(), batch)
        return batch

    def _add(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            value = value.double()
            for sums in (self.sums, self.last):
                sums[name] = sums[name] + value if name in sums else value

    def record(self, evaluate: Evaluate | None, monitor: str, mode: str) -> bool:
        """Add to the history; whether this is the best evaluation so far (its weights are then kept).

        Losses and metrics are means over the processes that average gradients, the same in each.
        """
        result = self.result
        means = {name: value.item() / self.summed for name, value in self.sums.items()}
        means = mean_over(self.parallel.group, means)
        self.sums, self.summed = {}, 0
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        result.history.append({"step": result.steps, **means, "lr": learning_rate})
        if evaluate is None:
            return False
        with nullcontext() if self.average is None else self.average.in_place():
            with isolated_rng(), eval_mode(self.student), evaluated_by(self.parallel.group):
                metrics = {name: float(value) for name, value in evaluate(self.student).items()}
            self.parallel.settle()
            metrics = mean_over(self.parallel.group, metrics)
            return self._judge(metrics, monitor, mode)

    def _judge(self, metrics: dict[str, float], monitor: str, mode: str) -> bool:
        result = self.result
        result.history[-1].update(metrics)
        if monitor not in metrics:
            raise ArgumentError(f"fit: monitor is {monitor!r}, but evaluate returned {sorted(metrics)}")
        score = metrics[monitor]
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(score)
        if math.isnan(score) or (result.best_score is not None and not _better(score, result.best_score, mode)):
            return False
        result.best_step, result.best_score = result.steps, score
        result.best = self.weights()
        return True

    def weights(self) -> dict[str, Any]:
        """Copies of the student's, as they are."""
        return {name: _copy(value) for name, value in under_own_names(self.model.state_dict()).items()}

    def finish(self, settings: dict[str, str]) -> FitResult:
        self.result.settings, self.result._student = settings, weakref.ref(self.model)
        if self.average is not None:
            with self.average.in_place():
                self.result.ema = self.weights()
        return self.result

    def save(self, processes: Processes, folder: Path) -> None:
        result = self.result
        extra = {
            "sums": self.sums,
            "summed": self.summed,
            "history": result.history,
            "best": result.best,
            "best_step": result.best_step,
            "best_score": result.best_score,
        }
        if self.average is not None:
            extra["ema"] = self.average.values
        self.parallel.settle()
        cache = getattr(self.objective, "cache", None)
        if cache is not None:  # or a resumed run would compute its rows again, beside other rows
            cache.flush()
        with saved_by_all(processes.count > 1):
            checkpoint.save_together(processes, folder, self.model, self._parts(), result.steps, extra)

    def load(self, processes: Processes, folder: Path) -> None:
        loaded = checkpoint.load_together(processes, folder, self.model, self._parts(), self._check)
        extra = loaded.extra
        if self.average is not None:
            self.average.load(extra["ema"])
        best = extra["best"] and under_own_names(extra["best"])
        self.result = FitResult(loaded.step, extra["history"], best, extra["best_step"], extra["best_score"])
        self.sums = {name: value.to(self.device) for name, value in extra["sums"].items()}
        self.summed = extra["summed"]

    def _check(self, saved: checkpoint.Checkpoint) -> None:
        _check_saved(saved)
        if ("ema" in saved.extra) != (self.average is not None):
            has, lacks = ("checkpoint", "run") if self.average is None else ("run", "checkpoint")
            raise CheckpointError(f"the {has} has averaged weights (ema=), the {lacks} has none")

    def _parts(self) -> dict[str, Any]:
        return {  # the data first, since finding its place may move the global generators
            "data": self.stream,
            "sampler": getattr(self.objective, "sampler", None),
            "scheduler": self.scheduler,
            "optimizer": self.optimizer,
            "objective": self.objective if getattr(self.objective, "terms", ()) else None,
        }


def _check_saved(saved: checkpoint.Checkpoint) -> None:
    """True if a checkpoint's step and ``extra`` are what ``Run.save`` writes."""
    extra = saved.extra
    kinds: dict[str, Any] = {
        "sums": dict,
        "summed": int,
        "history": list,
        "best": (dict, NoneType),
        "best_step": (int, NoneType),
        "best_score": (float, NoneType),
    }
    if isinstance(extra, dict) and "ema" in extra:
        kinds["ema"] = dict
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


def _better(score: float, best: float, mode: str) -> bool:
    return score > best if mode == "max" else score < best


def _copy(value: Any) -> Any:
    if hasattr(value, "device_mesh"):  # a shard stays where its mesh is
        return value.detach().clone()
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
