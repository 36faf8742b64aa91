"""TGTTrainer: transformers' Trainer for the objective of teacher-guided training."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError, CheckpointError
from tgt_fast.integrations.measure import measured
from tgt_fast.integrations.transformers.trainer import CountingTrainer
from tgt_fast.ops.counts import WORLD
from tgt_fast.teacher.batches import Batch
from tgt_fast.train import TGTObjective

SAMPLER: Final = "tgt_sampler.pt"  # in a checkpoint's folder
_WHO: Final = "TGTTrainer"


class TGTTrainer(CountingTrainer):
    r"""A ``transformers.Trainer`` that trains a model on a :class:`tgt_fast.TGTObjective`, with any sampler.

    A step is that of all its examples in one batch, however they are spread over micro-batches and processes: real rows
    are divided by the number of real rows that count, synthetic ones by their own. ``soft``, ``hard`` and ``synthetic``
    stand in the logs beside ``loss``, and add up to it. An evaluation is of the real examples, and takes the mean over
    its rows.

    Checkpoints hold the sampler's state, the chains of all processes among it, and nothing of the teacher. A run that
    goes on from one (``train(resume_from_checkpoint=...)``) gives the numbers of a run that was not broken off.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, and what else ``transformers.Trainer`` takes.
        objective: whose teacher follows the model's device.
        id_column: the column of the data sets that holds sample ids, integers: what noise and chains are keyed by.
        input_columns: those that are the data, x. By default all but ids and labels. One is x itself, several are a
            dict, which a model of transformers is given as keywords.

    Raises:
        ArgumentError: another objective, or one whose sampler keeps chains without an ``id_column``.
    """

    _who = _WHO
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        objective: TGTObjective,
        id_column: str | None = None,
        input_columns: Sequence[str] | None = None,
        **keywords: Any,
    ) -> None:
        if not isinstance(objective, TGTObjective):
            raise ArgumentError(f"{_WHO}: objective must be a tgt_fast.TGTObjective, got {type(objective).__name__}")
        if id_column is None and getattr(objective.sampler, "mode", None) == "persistent":
            raise ArgumentError(f"{_WHO}: a sampler in persistent mode keeps a chain a sample id: name the id_column")
        self.objective, self.id_column = objective, id_column
        self.input_columns = None if input_columns is None else tuple(input_columns)
        self._window: deque[dict[str, Any]] = deque()  # the counts and copies of the micro-batches to come
        if args is not None and args.label_names is None:
            args.label_names = ["labels"]  # also of a model whose forward takes none
        columns = (id_column, *(self.input_columns or ()))
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, kept_columns=columns, **keywords)
        objective.teacher.to(self.args.device)

    # ---- steps ----

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        told = self.objective.count_group is not None or self.objective.loss.count_group is not None
        if self.args.world_size > 1 and not told:
            self.objective.count_group = WORLD
        try:
            return super().train(*arguments, **keywords)
        finally:
            if not told:
                self.objective.count_group = None

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, whose rows are counted before the first of them."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window.clear()
        if samples:
            batches = [self._batch(self._prepare_inputs(sample)) for sample in samples]
            counts: dict[str, Any] = {}
            if len(batches) > 1 or self.args.world_size > 1:
                real, synthetic = self.objective.normalizers(batches)
                first = batches[0].y
                if first is not None and not first.is_floating_point():
                    synthetic = synthetic * first[0].numel()  # rows an example
                counts = {"normalizer": real, "synthetic_normalizer": synthetic}
            for copies in self.objective.occurrences(batches):
                self._window.append(counts if copies is None else {**counts, "occurrence": copies})
        return samples, None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        return None  # get_batch_samples counts

    def _batch(self, inputs: Any) -> Batch:
        """Ids, x and labels of a collated batch."""
        given = dict(inputs)
        ids = None
        if self.id_column is not None:
            if self.id_column not in given:
                raise ArgumentError(f"{_WHO}: the collator gave no {self.id_column!r}, but {sorted(given)}")
            ids = given.pop(self.id_column)
        y = given.pop("labels", None)
        names = tuple(given) if self.input_columns is None else self.input_columns
        lost = [name for name in names if name not in given]
        if lost or not names:
            raise ArgumentError(f"{_WHO}: the collator gave no {lost or 'inputs'}, but {sorted(given)}")
        x = given[names[0]] if len(names) == 1 else {name: given[name] for name in names}
        return Batch(ids, x, y)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch: its rows' sums, divided by the rows of the whole step."""
        ids, x, y = self._batch(inputs)
        if not model.training:
            with self.accelerator.autocast():
                loss, logits, rows = measured(self.objective, model, x, y)
            self._keep_terms({}, loss, torch.tensor(rows, device=loss.device))
            return (loss, {"logits": logits}) if return_outputs else loss
        more = self._window.popleft() if self._window else {}
        with self.accelerator.autocast():
            made = self.objective(model, x, y, sample_ids=ids, step=self.state.global_step, **more)
        terms = cast("dict[str, Tensor]", dict(made["parts"]))
        self._keep_terms(terms, made["loss"], torch.ones((), device=made["loss"].device))  # they are of the whole step
        return made["loss"]

    # ---- checkpoints ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.objective.sampler is not None:
            state = self.objective.sampler.state_dict(group=WORLD)  # which all processes make
            if self.args.should_save:
                os.makedirs(output_dir, exist_ok=True)
                torch.save(state, os.path.join(output_dir, SAMPLER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.objective.sampler is None:
            return
        path = os.path.join(checkpoint, SAMPLER)
        if not os.path.isfile(path):
            raise CheckpointError(f"{_WHO}: {checkpoint} holds no state of a sampler ({SAMPLER}), but here is one")
        self.objective.sampler.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
