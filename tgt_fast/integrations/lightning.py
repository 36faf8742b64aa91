"""Teacher-guided training inside Lightning: a module for the objective, and a callback for what must outlive a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tgt_fast._optional import optional
from tgt_fast._processes import connected
from tgt_fast.errors import ArgumentError
from tgt_fast.integrations.measure import measured
from tgt_fast.ops import _checks
from tgt_fast.ops.counts import WORLD
from tgt_fast.teacher import Teacher
from tgt_fast.teacher.batches import Batch, Columns
from tgt_fast.teacher.sharing import refuse_shared
from tgt_fast.train import TGTObjective

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule
else:
    _pytorch = optional("lightning.pytorch", "lightning", "tgt_fast.integrations.lightning")
    Callback, LightningModule = _pytorch.Callback, _pytorch.LightningModule

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


class TGTCallback(Callback):
    """All that a run of a :class:`tgt_fast.TGTObjective` needs around its steps, in any LightningModule.

    The sampler's state is in checkpoints, the chains of all processes among it, and is taken up again from them, by any
    number of processes. In several processes the objective counts over all of them. The teacher follows the module's
    device. :class:`TGTModule` brings this callback along.

    Args:
        objective: whose teacher and sampler these are.
    """

    def __init__(self, objective: TGTObjective) -> None:
        if not isinstance(objective, TGTObjective):
            raise ArgumentError(f"TGTCallback: expected a tgt_fast.TGTObjective, got {type(objective).__name__}")
        self.objective = objective
        self._counting = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._follow(pl_module)
        told = self.objective.count_group is not None or self.objective.loss.count_group is not None
        if trainer.world_size > 1 and not told:
            self.objective.count_group, self._counting = WORLD, True

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._let_go()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._counting:
            self.objective.count_group, self._counting = None, False

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._follow(pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._follow(pl_module)

    def _follow(self, module: Any) -> None:
        if self.objective.teacher.device not in (None, module.device):
            self.objective.teacher.to(module.device)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's; every process is asked for it, and gives what all have."""
        sampler = self.objective.sampler
        return {} if sampler is None else {"sampler": sampler.state_dict(group=WORLD)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        sampler = self.objective.sampler
        if (sampler is not None) != ("sampler" in state_dict):
            has, lacks = ("objective", "checkpoint") if sampler is not None else ("checkpoint", "objective")
            raise ArgumentError(f"TGTCallback: the {has} has a sampler, the {lacks} has none")
        if sampler is not None:
            sampler.load_state_dict(state_dict["sampler"])


class TGTModule(LightningModule):
    r"""A LightningModule that trains ``student`` on a :class:`tgt_fast.TGTObjective`.

    Checkpoints hold the student and the sampler's state, nothing of the teacher. The student is in train mode in every
    training step, also where it came in eval mode, as pretrained models do; Lightning puts modes back after a
    validation. ``loss``, ``hard``, ``soft`` and ``synthetic`` are logged, means over the processes, and of a validation
    ``val_loss`` (of the real examples) and ``val_accuracy``, means over its rows.

    Args:
        student: inputs -> logits, or what holds them (``objective.logits_of``).
        objective: with or without a sampler.
        optimizer: makes one from the student's parameters, such as ``lambda p: torch.optim.AdamW(p, lr=1e-3)``.
        scheduler: makes one from the optimizer; stepped after each step of it.
        columns: ``(ids, x, y)``, where they are in a batch, as for :func:`tgt_fast.fit`.
        accumulate: batches a step. Their valid rows count alike, however they are spread, which Lightning's
            ``accumulate_grad_batches`` cannot do: it takes the mean of their means, and is refused.
        clip_grad_norm: the largest norm of a step's gradient, where ``accumulate > 1``; Lightning's own
            ``gradient_clip_val`` serves a single batch a step alone.

    With ``accumulate > 1`` the optimisation is "manual" in Lightning's words: batches are kept until a step's are all
    there, counted together, in all processes, and then one after the other go forward and backward. The last step of an
    epoch may have fewer.

    Raises:
        ArgumentError: another objective, an optimizer over the teacher's parameters, ``accumulate_grad_batches``.

    >>> import lightning, torch, tgt_fast as tgt
    >>> from torch import nn
    >>> from tgt_fast.integrations.lightning import TGTModule
    >>> teacher = tgt.Teacher(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 3))
    >>> objective = tgt.TGTObjective(teacher, tgt.LatentSampler(teacher, sigma=0.5, units="absolute"))
    >>> module = TGTModule(nn.Linear(8, 3), objective, lambda p: torch.optim.SGD(p, 0.1), accumulate=2)
    >>> sorted(module.state_dict())
    ['student.bias', 'student.weight']
    """

    def __init__(
        self,
        student: nn.Module,
        objective: TGTObjective,
        optimizer: MakeOptimizer,
        *,
        scheduler: MakeScheduler | None = None,
        columns: Sequence[Any] | None = None,
        accumulate: int = 1,
        clip_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module) or isinstance(student, Teacher):
            raise ArgumentError(f"TGTModule: student must be a torch.nn.Module, got {type(student).__name__}")
        self._accumulate = _checks.integer("TGTModule", "accumulate", accumulate, 1, 2**31)
        if clip_grad_norm is not None and accumulate == 1:
            raise ArgumentError("TGTModule: clip_grad_norm goes with accumulate; Trainer(gradient_clip_val=) does here")
        self.student = student
        self.objective = objective
        self._callback = TGTCallback(objective)
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        self._parts = Columns("TGTModule", columns)
        self._clip = clip_grad_norm
        self._waiting: list[Batch] = []
        self.automatic_optimization = accumulate == 1

    def forward(self, x: Any) -> Any:
        return self.student(x)

    def configure_callbacks(self) -> list[Any]:
        return [self._callback]

    def configure_optimizers(self) -> Any:
        optimizer = self._make_optimizer(self.student.parameters())
        refuse_shared("TGTModule", self.objective.teacher, self.student, optimizer)
        if self._make_scheduler is None:
            return optimizer
        scheduler = self._make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        if self.trainer.accumulate_grad_batches != 1:
            raise ArgumentError(
                "TGTModule: accumulate_grad_batches takes the mean of the means of batches, whose valid rows then "
                "count differently; give accumulate= to TGTModule"
            )
        self._waiting = []
        self.student.train()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        made = self._parts.split(batch)
        if self.automatic_optimization:
            found = self._loss(made, {})
            self._log([found])
            return found["loss"]
        self._waiting.append(made)
        if len(self._waiting) == self._accumulate or self.trainer.is_last_batch:
            batches, self._waiting = self._waiting, []
            self._step(batches)
        return None

    def _loss(self, batch: Batch, more: dict[str, Any]) -> Any:
        ids, x, y = batch
        return self.objective(self.student, x, y, sample_ids=ids, step=self.global_step, **more)

    def _step(self, batches: list[Batch]) -> None:
        """One step of the optimizer on some batches, whose rows are counted before the first."""
        optimizer: Any = self.optimizers()
        real, synthetic = self.objective.normalizers(batches)
        counts = {"normalizer": real, "synthetic_normalizer": synthetic}
        copies = self.objective.occurrences(batches)
        found = []
        for place, (batch, copy) in enumerate(zip(batches, copies, strict=True)):
            output = self._loss(batch, counts if copy is None else {**counts, "occurrence": copy})
            if place + 1 < len(batches) and hasattr(self.trainer.strategy, "block_backward_sync"):
                with self.trainer.strategy.block_backward_sync():
                    self.manual_backward(output["loss"])
            else:
                self.manual_backward(output["loss"])
            found.append(output)
        if self._clip is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self._clip, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
        self._log(found)

    def _log(self, outputs: list[Any]) -> None:
        """The sums of a step's losses and terms, which with their divisors make up those of the step."""
        names = ["loss", *outputs[0]["parts"]]
        values = [torch.stack([output["loss"].detach(), *output["parts"].values()]) for output in outputs]
        total = torch.stack(values).sum(0)
        if connected() and self.trainer.world_size > 1:
            torch.distributed.all_reduce(total)
            total = total / self.trainer.world_size
        for name, value in zip(names, total, strict=True):
            self.log(name, value, prog_bar=name == "loss", on_step=True, on_epoch=False)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._measure(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._measure(batch, "test")

    def _measure(self, batch: Any, stage: str) -> None:
        _, x, y = self._parts.split(batch)
        loss, logits, rows = measured(self.objective, self.student, x, y)
        self._log_mean(f"{stage}_loss", loss, rows)
        if y is not None and not y.is_floating_point():
            options = self.objective.loss.options
            known = (y != options.ignore_index) & (y != options.unlabeled_index)
            count = int(known.sum())
            right = (logits.argmax(-1) == y) & known
            self._log_mean(f"{stage}_accuracy", right.sum() / max(count, 1), count)

    def _log_mean(self, name: str, value: Any, rows: int) -> None:
        """One value of a batch, weighted by its rows in the mean over all processes."""
        self.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=max(rows, 1))
