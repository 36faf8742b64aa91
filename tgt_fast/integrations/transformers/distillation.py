"""DistillationTrainer: transformers' Trainer with a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tgt_fast.cache import TeacherCache
from tgt_fast.errors import ArgumentError
from tgt_fast.integrations.terms import IGNORED, Projection, Said, linear_terms, logits_terms
from tgt_fast.integrations.transformers.heads import VocabularyHead, output_layer
from tgt_fast.integrations.transformers.rows import check_problem, classifies, shifts_labels, targets
from tgt_fast.integrations.transformers.teachers import Frozen
from tgt_fast.integrations.transformers.trainer import CountingTrainer
from tgt_fast.losses import DistillationLoss, LinearDistillationLoss
from tgt_fast.teacher.returned import logits_in

_WHO = "DistillationTrainer"


class DistillationTrainer(CountingTrainer):
    r"""A ``transformers.Trainer`` whose loss is a distillation loss, from a teacher or from a cache.

    The gradient of a step is that of the mean over all its counted rows: 4 micro-batches of 8, or 2 processes of 16,
    are one batch of 32, however many labels of each are -100. The loss of an evaluation is the mean over its rows.
    ``soft`` and ``hard`` stand in the logs beside ``loss``, and add up to it.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, and what else ``transformers.Trainer`` takes: a causal
            or masked language model, with PEFT's adapters or without, or a classifier.
        teacher: a model of transformers for the same inputs and classes, or a :class:`tgt_fast.Teacher`, whose labeler
            is given a batch's inputs as a dict. Frozen in place, in eval mode, and in no checkpoint. None: the cache
            knows all.
        loss: "linear" is ``LinearDistillationLoss(temperature=2.0, hard_weight=1.0)``, which takes the loss of a
            language model where its head would be called, so that logits are never there; a classifier's are few, and
            are taken. "logits" is ``DistillationLoss(temperature=2.0, hard_weight=1.0)``. Or a loss of one of these
            kinds, with reduction "mean".
        cache: a :class:`tgt_fast.TeacherCache`, which is asked by sample id; what it lacks is asked of the teacher and
            kept. The temperature of its records is that of "linear" and "logits".
        id_column: the column of the data sets that holds ids, integers; it reaches the loss although
            ``remove_unused_columns`` removes what the model does not take.

    Labels are those of the data set: where the model shifts them for its own loss they are shifted here. Rows of the
    label -100 count for neither term. Losses that a model adds to its own (of routers, say) are left out.

    Linear: tied heads, biases, scales and softcaps of any family are met in the model's own forward, so that the hooks
    of DistributedDataParallel and FSDP, autocast and hooks of others run as they do for the model's own loss. LoRA on
    the head is trained (without dropout there). A model that does to its logits what no scale and softcap can say is
    refused at the first batch.

    Raises:
        ArgumentError: a loss, teacher or cache of another kind, a model without a vocabulary head for a linear loss,
            labels to be smoothed by the training arguments.

    >>> import tempfile, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
    >>> from tgt_fast.integrations.transformers import DistillationTrainer
    >>> sizes = dict(vocab_size=50, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> student, teacher = (LlamaForCausalLM(LlamaConfig(hidden_size=n, **sizes)) for n in (8, 16))
    >>> rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, -100, 4]}] * 4
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     args = TrainingArguments(folder, max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
    ...     trainer = DistillationTrainer(student, args, train_dataset=rows, teacher=teacher)
    ...     trainer.train().global_step  # doctest: +ELLIPSIS
    {...}
    1
    """

    _who = _WHO

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        teacher: Any = None,
        loss: str | DistillationLoss | LinearDistillationLoss = "linear",
        cache: TeacherCache | None = None,
        id_column: str | None = None,
        **keywords: Any,
    ) -> None:
        self._teacher = Frozen(_WHO, teacher, cache)
        if teacher is not None and teacher is model:
            raise ArgumentError(f"{_WHO}: the teacher is the student, so there is nothing to learn from it")
        self.id_column = id_column
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, kept_columns=(id_column,), **keywords)
        check_problem(self.model)
        self.distillation_loss = _checked(loss, self.model, cache)
        self._teacher.to(self.args.device)
        self._head: VocabularyHead | None = None
        self._logits_wanted = False
        if isinstance(self.distillation_loss, LinearDistillationLoss):
            self._head_of(self.model)  # refused here, if it has none

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch: its rows' sum, divided by the rows of the whole step."""
        inputs = dict(inputs)
        ids = None if self.id_column is None else inputs.pop(self.id_column, None)
        target = targets(inputs, shifts_labels(self.model))
        inputs = {name: part for name, part in inputs.items() if name not in ("labels", "shift_labels")}
        linear = isinstance(self.distillation_loss, LinearDistillationLoss)
        if target is None and (linear or not classifies(self.model)):
            raise ArgumentError(f"{_WHO}: the labels of a language model say which of its rows count; there are none")
        with self.accelerator.autocast():
            said = self._teacher.say(inputs, ids, hidden=linear)
        count = None
        if num_items_in_batch is not None:
            count = torch.as_tensor(num_items_in_batch, device=target.device if target is not None else None)
            count = count.clamp(min=1)  # a batch without a label has the loss 0
        if isinstance(self.distillation_loss, LinearDistillationLoss):
            assert target is not None
            loss, terms, outputs = self._linear(self.distillation_loss, model, inputs, said, target, count)
        else:
            loss, terms, outputs = self._logits(self.distillation_loss, model, inputs, said, target, count)
        loss = self._as_share(loss, count)
        self._keep_terms({name: self._as_share(term, count) for name, term in terms.items()}, loss, count)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        self._logits_wanted = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        finally:
            self._logits_wanted = False

    def _logits(
        self, loss_fn: DistillationLoss, model: nn.Module, inputs: dict[str, Any], said: Said, target: Tensor | None,
        count: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], Any]:  # fmt: skip
        outputs = model(**inputs)
        assert said.logits is not None
        loss, terms = logits_terms(loss_fn, logits_in(f"{_WHO}: the student", outputs), said.logits, target, count)
        if isinstance(outputs, Mapping):
            return loss, terms, {name: part for name, part in outputs.items() if name != "loss"}
        return loss, terms, outputs if isinstance(outputs, tuple) else (None, outputs)

    def _linear(
        self, loss_fn: LinearDistillationLoss, model: nn.Module, inputs: dict[str, Any], said: Said, target: Tensor,
        count: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], Any]:  # fmt: skip
        inner_model = self.accelerator.unwrap_model(model)
        head = self._head_of(inner_model)
        projection = head.learn(inputs)
        settings = _with_projections(loss_fn, projection, said.projection)
        found: list[tuple[Tensor, dict[str, Tensor]]] = []

        def take(hidden: Tensor) -> None:
            found.append(linear_terms(loss_fn, settings, head.matrix(hidden), said, target, count))

        def give(_: Any, __: Any, outputs: Any) -> Any:
            # Among the outputs of what is wrapped: those are what the wrappers look for gradients in.
            kept = dict(outputs) if self._logits_wanted and isinstance(outputs, Mapping) else {}
            return {"loss": found[0][0], **kept} if found else outputs

        handle = inner_model.register_forward_hook(give, prepend=True)
        try:
            with head.instead(take, keep_logits=self._logits_wanted):
                outputs = model(**inputs)
        finally:
            handle.remove()
        return outputs["loss"], found[0][1], outputs

    def _head_of(self, model: nn.Module) -> VocabularyHead:
        if self._head is None or self._head.model is not model:
            self._head = VocabularyHead(model, "student")
        return self._head


def _checked(loss: Any, model: nn.Module, cache: TeacherCache | None) -> DistillationLoss | LinearDistillationLoss:
    temperature = 2.0 if cache is None or cache.settings.k is None else cache.settings.temperature
    if isinstance(loss, str) and loss in ("linear", "logits"):
        narrow = loss == "logits" or (classifies(model) and output_layer(model) is None)
        kind = DistillationLoss if narrow else LinearDistillationLoss
        return kind(temperature=temperature, hard_weight=1.0)
    if not isinstance(loss, (DistillationLoss, LinearDistillationLoss)):
        raise ArgumentError(
            f"{_WHO}: loss must be 'linear', 'logits', a DistillationLoss or a LinearDistillationLoss, got {loss!r:.99}"
        )
    options = loss.options
    if options.reduction != "mean" or loss.return_stats or options.ignore_index != IGNORED:
        raise ArgumentError(
            f"{_WHO}: the loss must have reduction='mean', return_stats=False and ignore_index={IGNORED}, got {loss}"
        )
    return loss


def _with_projections(loss: LinearDistillationLoss, student: Projection, teacher: Projection) -> dict[str, Any]:
    """The settings of the loss with what the models do to their logits.

    Raises:
        ArgumentError: the loss says something else than the models do.
    """
    found = {
        "student_scale": student.scale, "student_softcap": student.softcap,
        "teacher_scale": teacher.scale, "teacher_softcap": teacher.softcap,
    }  # fmt: skip
    for name, value in found.items():
        given = getattr(loss, name)
        unsaid = given == 1.0 if name.endswith("scale") else given is None
        if not unsaid and (value is None or abs(given - value) > 1e-4 * abs(value)):
            raise ArgumentError(f"{_WHO}: the loss says {name}={given}, but the model's is {value}; leave it out")
    return {**loss._settings, **found}
