"""The base of the trainers of this folder: rows counted over a whole step, and the terms of the loss in the logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from tgt_fast.errors import ArgumentError
from tgt_fast.integrations.transformers.rows import counted, shifts_labels


class CountingTrainer(transformers.Trainer):
    """A ``transformers.Trainer`` whose losses are sums over rows, divided by the rows of a whole step.

    A step's rows are those of all its micro-batches in all processes, however they are spread. The mean of an
    evaluation is over the rows of the evaluation, too.
    """

    _who = "trainer"
    _signature_columns: list[str] | None

    def __init__(self, *arguments: Any, kept_columns: tuple[str | None, ...] = (), **keywords: Any) -> None:
        if keywords.get("compute_loss_func") is not None:
            raise ArgumentError(f"{self._who}: compute_loss_func and this trainer's own loss cannot both be the loss")
        self._kept_columns = tuple(name for name in kept_columns if name is not None)
        self._terms: dict[str, Tensor] = {}
        self._terms_since = 0
        self._evaluated: list[tuple[Tensor, Tensor]] | None = None
        super().__init__(*arguments, **keywords)
        if self.args.label_smoothing_factor:
            raise ArgumentError(f"{self._who}: give label_smoothing to the loss, not to the training arguments")
        if self.args.n_gpu > 1:
            raise ArgumentError(
                f"{self._who}: one process drives {self.args.n_gpu} GPUs by DataParallel, which is not served; start "
                "a process a GPU with torchrun"
            )

    # ---- batches ----

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: list[str] = self._signature_columns or []
            self._signature_columns = [*columns, *(name for name in self._kept_columns if name not in columns)]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """The rows of these batches that count, over all processes where the trainer averages over them."""
        shifts = shifts_labels(self.model)
        counts = [counted(batch, shifts) for batch in batch_samples]
        if not counts or any(count is None for count in counts):
            return None
        total = torch.stack([count.to(device) for count in counts if count is not None]).sum()
        if self._counts_together:
            total = self.accelerator.gather(total).sum()
        copies: int = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()  # processes with the same batch
        return total / copies

    @property
    def _counts_together(self) -> bool:
        return bool(self.args.average_tokens_across_devices and self.args.world_size > 1)

    def _as_share(self, loss: Tensor, count: Tensor | None) -> Tensor:
        """A loss that was divided by the rows of all processes, for the mean over processes that comes after."""
        # The trainer divides by the micro-batches of a step where this is False.
        self.loss_is_scaled_for_ga = count is not None
        if count is None or not self._counts_together:
            return loss
        share: int = self.accelerator.num_processes // self.get_tp_size()
        return loss * share

    # ---- logs ----

    def _keep_terms(self, terms: Mapping[str, Tensor], loss: Tensor, count: Tensor | None) -> None:
        """The detached terms of a loss, which add up to it, for the next log; the loss of an evaluation for its end."""
        if self._evaluated is not None:
            rows = torch.ones((), device=loss.device) if count is None else count
            self._evaluated.append((loss.detach().double(), rows.double()))
        elif self.model.training:
            if not self._terms:
                self._terms_since = self.state.global_step
            steps = 1 if count is not None else self.current_gradient_accumulation_steps
            for name, value in terms.items():
                self._terms[name] = self._terms.get(name, 0) + value.detach().double() / steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        steps = self.state.global_step - self._terms_since
        if "loss" in logs and self._terms and steps > 0:
            names, values = list(self._terms), torch.stack(list(self._terms.values()))
            if self.args.world_size > 1:
                values = self.accelerator.gather(values[None]).mean(0)
            logs |= {name: value / steps for name, value in zip(names, values.tolist(), strict=True)}
            self._terms = {}
        super().log(logs, start_time)

    def evaluation_loop(self, *arguments: Any, **keywords: Any) -> Any:
        outer, self._evaluated = self._evaluated, []
        try:
            found = super().evaluation_loop(*arguments, **keywords)
            name = f"{keywords.get('metric_key_prefix', 'eval')}_loss"
            if self._evaluated and name in found.metrics:
                found.metrics[name] = self._mean_of(self._evaluated)
            return found
        finally:
            self._evaluated = outer

    def _mean_of(self, losses: list[tuple[Tensor, Tensor]]) -> float:
        """The mean over all rows of an evaluation, of batches whose means and rows these are."""
        values, rows = (torch.stack(part) for part in zip(*losses, strict=True))
        total = torch.stack([(values * rows).sum(), rows.sum()])
        if self.args.world_size > 1:
            total = self.accelerator.gather(total[None]).sum(0)
        return float(total[0] / total[1])
