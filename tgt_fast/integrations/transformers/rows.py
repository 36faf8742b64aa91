"""Which rows of a batch count, and what their labels are: as the model and its trainer see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tgt_fast.errors import ArgumentError
from tgt_fast.integrations.terms import IGNORED

_CLASSES: Final = ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification",
                   "ForVideoClassification", "ForAudioClassification", "ForMultipleChoice")  # fmt: skip


def inner(model: Any) -> Any:
    """The model of transformers, without PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def classifies(model: nn.Module) -> bool:
    """True if it is a classifier, whose logits are few."""
    return type(inner(model)).__name__.endswith(_CLASSES)


def shifts_labels(model: nn.Module) -> bool:
    """True if position i of the model predicts label i + 1."""
    base = inner(model)
    if getattr(base, "loss_function", None) is not ForCausalLMLoss or base.config.is_encoder_decoder:
        return False
    # A model whose name says of no loss has this one by default, whatever it does.
    return base.loss_type is not None or type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def check_problem(model: nn.Module) -> None:
    """
    Raises:
        ArgumentError: a model that is no classifier into one of several classes.
    """
    config = getattr(inner(model), "config", None)
    problem = getattr(config, "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        raise ArgumentError(f"DistillationTrainer: the model's problem_type is {problem}, which has no soft labels")


def targets(inputs: Mapping[str, Any], shifts: bool) -> Tensor | None:
    """The label of each of the model's rows, IGNORED where there is none: of ``shift_labels`` or ``labels``."""
    shifted, labels = inputs.get("shift_labels"), inputs.get("labels")
    if shifted is not None or labels is None or not shifts:
        return shifted if shifted is not None else labels
    moved = torch.full_like(labels, IGNORED)
    moved[..., :-1] = labels[..., 1:]
    return moved


def counted(inputs: Mapping[str, Any], shifts: bool) -> Tensor | None:
    """The number of rows of a batch that count; None where it has no labels."""
    labels = targets(inputs, shifts)
    if labels is None:
        return None
    if labels.is_floating_point():  # probabilities, one row a sample
        return torch.tensor(labels[..., 0].numel(), device=labels.device)
    return labels.ne(IGNORED).sum()
