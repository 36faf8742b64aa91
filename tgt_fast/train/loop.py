"""``fit``: a thin training loop that can be killed and resumed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tgt_fast._bars import Bar, quiet
from tgt_fast._opening import as_path
from tgt_fast._rng import isolated_rng
from tgt_fast.errors import ArgumentError
from tgt_fast.explore.student import refuse_labeler
from tgt_fast.ops import _checks
from tgt_fast.teacher import Teacher
from tgt_fast.teacher.batches import Columns, check_loader
from tgt_fast.teacher.returned import LogitsOf, check_logits_of
from tgt_fast.teacher.sharing import refuse_shared
from tgt_fast.train import checkpoint
from tgt_fast.train.ahead import StepsAhead, checked_prefetch, within
from tgt_fast.train.checks import check_extras, check_options, check_parties, check_tools
from tgt_fast.train.data import BatchStream
from tgt_fast.train.document import remove_unnamed
from tgt_fast.train.failures import one_for_all
from tgt_fast.train.files import make_writable
from tgt_fast.train.log import Means, RunLog
from tgt_fast.train.names import take_own_names
from tgt_fast.train.parallel import Parallel, only_bar, unwrapped
from tgt_fast.train.plateau import checked_plateau, follow, waiting
from tgt_fast.train.processes import ALONE, sharing
from tgt_fast.train.rng import turn
from tgt_fast.train.run import Evaluate, FitResult, Objective, Run
from tgt_fast.train.settings import settings_of
from tgt_fast.train.sharded import gathered, take_whole_weights
from tgt_fast.train.view import RunView

BEST_WEIGHTS = "best.safetensors"
_GLANCES = 0.5  # seconds between two looks at the loss
Callback = Callable[[str, RunView], Any]


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
    autocast: torch.dtype | None = None,
    ema: float | None = None,
    callbacks: Sequence[Callback] = (),
    log: str | os.PathLike[str] | None = None,
    logits_of: LogitsOf = None,
    prefetch: int = 0,
    explore_on_plateau: int | None = None,
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

    **In several processes** (``torchrun``) all of them call ``fit`` with a student that DistributedDataParallel wraps
    or ``fully_shard`` (FSDP2) shards, each with its part of the data. A :class:`TGTObjective` then counts over them
    (``count_group="world"``), the micro-batches of a step in one go before the first, so that a step is that of all
    their examples in one process. A step communicates gradients and counts, nothing else. Losses and metrics in the
    history are means over the processes; :func:`tgt_fast.train.evaluate` measures on the data of all. One bar is shown.
    A student that nothing wraps is each process's own.

    With one ``checkpoint_dir`` on a file system that they share, the first writes it; of the others it holds what
    differs: generators, place in the data, sampler, history, buffers. A run of two processes that was killed gives the
    same bits as one that was not if as many resume it; another number is refused, and can start from the weights that
    :func:`tgt_fast.train.checkpoint_weights` reads. With more than two, an ``all_reduce`` may round otherwise in the
    first step after a resume, in which DistributedDataParallel has its buckets in another order. A process that has a
    ``checkpoint_dir`` of its own keeps to itself.

    Args:
        student: the module to train, inputs -> logits, or what holds them. Batches are moved to its device.
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
            case. In several processes each gives it, or none does.
        checkpoint_every: steps between checkpoints.
        resume: go on from the checkpoint in ``checkpoint_dir``; start anew where there is none.
        seed: None draws from the global random generators, and moves them. With a seed the run has its own
            numbers (torch, numpy, Python) and leaves the global ones as they were: its result does not depend
            on what ran before. Those generators are one each in a process: beside a run with a seed no other thread
            can run fit, nor may it draw from them.
        progress: show a bar, with the loss from the first step on; evaluations that take longer have their own.
        columns: ``(ids, x, y)``, where they are in a batch: each an index, a key of a dict or another Mapping, or
            None for what there is not; x may be a tuple of keys, and is then a dict of them. By default the length
            decides: three are (ids, x, y), two (x, y), one is x; parts whose dtypes or shapes do not fit that, and
            dicts that seem to hold labels or ids, are refused.
        autocast: ``torch.bfloat16``: the objective runs under ``torch.autocast`` (teacher, student, sampler; the losses
            themselves stay exact). Evaluations do not.
        ema: in (0, 1), such as 0.999: keep an exponential average of the weights, ``average = ema * average +
            (1 - ema) * weights`` after each step. It is what ``evaluate`` sees (with the student's own buffers), what
            ``best`` holds, and ``FitResult.ema`` at the end; checkpoints have it. The student ends with its own.
        callbacks: functions ``f(event, run)``, called in this order in each process: event is "start" before the
            first step, "step" after each, "record" after an entry of the history, "checkpoint" after one was saved, and
            "end"; run is a :class:`tgt_fast.train.RunView`, to read. Random numbers that they draw leave the run's as
            they were; what they raise ends it.
        log: a folder, such as "runs/1", to whose ``log.jsonl`` the first process adds a line of JSON for the run's
            settings, about a thousand with the means of loss and parts, one a record of the history and one for how it
            ended; ``exploration.json`` beside it is what the sampler last made of some examples. A kill costs what was
            not written yet. A run that begins anew in it, or goes on, is added to what is there. ``tgt-fast report
            runs/1`` makes a page of it, also while it runs.
        logits_of: passed to the objective, which is a :class:`TGTObjective` or takes it: where the logits are in what
            the student returns, in the place of its own ``logits_of``.
        prefetch: in [0, 1024], for how many steps batches are read, and the sampler's examples made, ahead: on a CUDA
            device on a stream of their own (not yet run on a GPU), on a CPU in a thread, where PyTorch leaves it a core
            (``torch.set_num_threads``). Modes random and prior alone, which need no student. The bits, and those
            after a resume, are those without: nothing is ahead where an epoch, an evaluation or a checkpoint begins,
            and a loader that draws from the global random generators in this process as it reads is not read ahead.
        explore_on_plateau: explore only while validation stalls: from so many evaluations in a row without a better
            monitored metric on, and until there is one. Needs ``evaluate``, and a :class:`TGTObjective` with a sampler,
            whose ``start_after`` counts besides. A resumed run goes on alike.

    Returns:
        A :class:`FitResult`.

    Raises:
        ArgumentError: an option out of range, an objective that cannot be called as one or gives no loss to be trained
            on, a student that is the labeler, an optimizer over parameters that the objective's teacher keeps frozen, a
            monitored metric that ``evaluate`` does not return, an empty loader, a batch that can be read in more
            than one way, a ``checkpoint_dir`` that holds another run's checkpoint while ``resume`` is False, or a run
            in another thread while one of the two has a seed.
        ProcessError: another process of the run failed, as the message says. The error that a process raises by itself,
            in the objective, a callback or the loader, say, is its own, and ends the others within seconds.
        CheckpointError: the folder cannot be written (found out before the first step, or later when the disk
            is full), or its checkpoint is damaged or of another run; student and checkpoint are left as they
            were. In several processes it is raised in all of them when one cannot go on.

    >>> import torch, tgt_fast as tgt
    >>> from torch import nn
    >>> teacher = tgt.Teacher(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 3))
    >>> student = nn.Linear(8, 3)
    >>> batches = [(torch.randn(4, 8), torch.tensor([0, 1, 2, -1]))]
    >>> optimizer = torch.optim.Adam(student.parameters())
    >>> tgt.fit(student, tgt.TGTObjective(teacher), batches, steps=3, optimizer=optimizer, progress=False).steps
    3
    """
    check_options(steps, accumulate, clip_grad_norm, eval_every, mode, checkpoint_every)
    asked = {} if logits_of is None else {"logits_of": check_logits_of("fit", logits_of)}
    check_parties(student, objective, asked)
    check_tools(optimizer, scheduler, seed, monitor, evaluate)
    check_extras(autocast, ema, callbacks)
    prefetch = checked_prefetch(objective, prefetch)
    patience = checked_plateau(objective, explore_on_plateau, evaluate)
    check_loader("fit", loader)
    resume, progress = _checks.flag("fit", "resume", resume), _checks.flag("fit", "progress", progress)
    if accumulate > 1 and not hasattr(objective, "normalizers"):
        raise ArgumentError("fit: accumulate > 1 needs an objective with normalizers(batches), as TGTObjective has")
    if isinstance(scheduler, ReduceLROnPlateau) and evaluate is None:
        raise ArgumentError("fit: ReduceLROnPlateau follows the monitored metric, so it needs evaluate")
    parts = Columns("fit", columns)
    if isinstance(teacher := getattr(objective, "teacher", None), Teacher):
        refuse_labeler("fit", teacher, student)
        refuse_shared("fit", teacher, student, optimizer)
    parallel = Parallel(student)
    with ExitStack() as stack:
        stack.enter_context(one_for_all(parallel.rank, parallel.count, parallel.group))
        keeper = _Keeper(checkpoint_dir, resume, parallel)
        if parallel.count == 1:
            stack.enter_context(one_for_all(keeper.processes.rank, keeper.processes.count))
        take_own_names(student)
        take_whole_weights(unwrapped(student))
        stream = BatchStream(loader)
        told = stack.enter_context(closing(RunLog(log, first=only_bar())))
        tools = optimizer, scheduler, parallel
        run = Run(student, objective, stream, parts, *tools, autocast=autocast, ema=ema, asked=asked)
        stack.enter_context(turn("fit", seeded=seed is not None))
        if seed is not None:
            stack.enter_context(isolated_rng(seed))
        stack.enter_context(parallel.counting(objective))
        tell = _Callbacks(callbacks, RunView(run, steps))
        keeper.load(run)
        if prefetch:
            run.ahead = stack.enter_context(closing(StepsAhead(run, prefetch)))
        student.train()
        optimizer.zero_grad()
        result = run.result
        stack.enter_context(quiet(not progress))
        settings = settings_of(
            run, steps=steps, accumulate=accumulate, clip_grad_norm=clip_grad_norm, eval_every=eval_every,
            monitor=None if evaluate is None else f"{monitor} ({mode})", seed=seed, autocast=autocast, ema=ema,
            prefetch=prefetch or None, explore_on_plateau=patience,
        )  # fmt: skip
        stack.enter_context(waiting(objective, patience))
        follow(objective, result, patience)
        stack.enter_context(told.of(run, steps, settings))
        tell("start")
        with _Bar(run, steps, shown=progress and only_bar()) as bar:
            while result.steps < steps:
                run.step(accumulate, clip_grad_norm, within=within(result.steps, steps, eval_every, checkpoint_every))
                told.stepped(run)
                bar.stepped()
                tell("step")
                if _due(eval_every, result.steps, steps):
                    told.before_record(run)
                    keeper.save_best(run if run.record(evaluate, monitor, mode) else None)
                    follow(objective, result, patience)
                    told.recorded(run)
                    bar.recorded(monitor)
                    tell("record")
                if _due(checkpoint_every, result.steps, steps):
                    keeper.save(run)
                    if keeper.folder is not None:
                        tell("checkpoint")
                bar.update()
        if not keeper.kept:
            keeper.save(run)  # of no steps
        tell("end")
        return run.finish(settings)


class _Callbacks:
    """Callables that are called as things happen in a run."""

    def __init__(self, functions: Sequence[Callback], view: RunView) -> None:
        self.functions, self.view = tuple(functions), view

    def __call__(self, event: str) -> None:
        if self.functions:
            with isolated_rng():
                for function in self.functions:
                    function(event, self.view)


class _Bar(Bar):
    """The bar of a run, which shows its loss: the mean since it was last shown, read a few times a second at most."""

    def __init__(self, run: Run, total: int, *, shown: bool) -> None:
        begun = min(run.result.steps, total)
        super().__init__(total=total, initial=begun, disable=not shown, desc="fit", unit="step", miniters=1)
        if shown:
            self._run, self._means, self._next = run, Means(run), 0.0
            self._score: dict[str, float] = {}

    def stepped(self) -> None:
        """After a step: reading the loss waits for the device, so not after each."""
        if not self.disable and (now := time.monotonic()) >= self._next:
            first, self._next = self._next == 0.0, now + _GLANCES
            self._show(self._means(), refresh=first)

    def recorded(self, monitor: str) -> None:
        """After a record of the history."""
        if not self.disable:
            self._means()
            last = self._run.result.history[-1]
            self._score = {monitor: last[monitor]} if monitor in last else {}
            self._show(last, refresh=True)

    def _show(self, values: Mapping[str, float], *, refresh: bool) -> None:
        found = {"loss": values["loss"], **self._score} if "loss" in values else {}
        if found:
            self.set_postfix({name: f"{value:.4g}" for name, value in found.items()}, refresh=refresh)


class _Keeper:
    """The folder of a run, if it has one, which the processes of a distributed run may share."""

    def __init__(self, checkpoint_dir: str | os.PathLike[str] | None, resume: bool, parallel: Parallel) -> None:
        self.folder: Path | None = None
        self.kept = True  # whether what is to be kept is
        self.processes, self.found = ALONE, False
        if checkpoint_dir is None:
            if resume:
                raise ArgumentError("fit: resume=True needs a checkpoint_dir")
            return
        self.folder, self.kept = as_path("fit", "checkpoint_dir", checkpoint_dir), False
        self.processes = sharing("fit", self.folder)
        if parallel.sharded and parallel.count > 1 and self.processes.count != parallel.count:
            raise ArgumentError("fit: the processes of a sharded student must have one checkpoint_dir, of all of them")
        self.found = self.processes.together(lambda: self._look(resume))[0]

    def _look(self, resume: bool) -> bool:
        assert self.folder is not None
        found = checkpoint.has_checkpoint(self.folder)
        if found and not resume:
            raise ArgumentError(
                f"fit: {self.folder} holds a run's checkpoint; pass resume=True to go on, or another folder"
            )
        make_writable(self.folder)
        return found

    def load(self, run: Run) -> None:
        if self.folder is not None and self.found:
            run.load(self.processes, self.folder)
            if self.processes.first:
                remove_unnamed(self.folder)  # of a process that was killed as it removed them
            self.kept = True

    def save_best(self, run: Run | None) -> None:
        """The best weights of a run that has better ones than before; those of the first process are kept."""
        if self.folder is not None:
            path = self.folder / BEST_WEIGHTS
            mine = None if run is None or run.result.best is None else gathered(run.result.best, self.processes.first)
            self.processes.together(lambda: None if mine is None else checkpoint.save_weights(path, mine))

    def save(self, run: Run) -> None:
        if self.folder is not None:
            run.save(self.processes, self.folder)
            self.kept = True


def _due(every: int, step: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)
