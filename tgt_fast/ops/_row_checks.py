"""Checks that need the data of the rows: labels, weights, and the ids and log-probabilities of a record."""

from __future__ import annotations

import math
import warnings
from typing import Final

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.calls import is_soft, labels_of
from tgt_fast.kernels.options import DistillOptions, TopK
from tgt_fast.kernels.row_checks import bad_id, bad_share, bad_target, bad_weight, find_bad_id
from tgt_fast.ops import _checks

# Log-probabilities rounded to 8 bits of mantissa may add up to a little more than 1, and none of them is above 0.
_MASS: Final = 1.1
_ABOVE: Final = 0.01
_BELOW: Final = 0.1  # what the same rounding takes from the largest, in nats
_REMEDY: Final = "topk_teacher(logits, k, temperature) makes a record from logits"


def check_row_values(
    op: str, classes: int, target: Tensor | None, sample_weight: Tensor | None, options: DistillOptions
) -> None:
    if sample_weight is not None and not sample_weight.is_floating_point():
        sample_weight = sample_weight.to(torch.float64)  # not every kind of integer can be compared
    if sample_weight is not None and not bool(((sample_weight >= 0) & sample_weight.isfinite()).all()):
        row = int((~((sample_weight >= 0) & sample_weight.isfinite())).nonzero()[0])
        raise ArgumentError(bad_weight(row, float(sample_weight[row]), op))
    if target is not None and is_soft(target):
        fine = (target >= 0).all(-1)
        if sample_weight is not None:
            fine |= sample_weight == 0
        if not bool(fine.all()):
            row = int((~fine).nonzero()[0])
            raise ArgumentError(bad_share(row, target[row], op))
    elif target is not None:
        fine = (target >= 0) & (target < classes)
        fine |= (target == options.ignore_index) | (target == options.unlabeled_index)
        if sample_weight is not None:
            fine |= sample_weight == 0
        if not bool(fine.all()):
            row = int((~fine).nonzero()[0])
            raise ArgumentError(bad_target(row, int(target[row]), classes, options, op))


def check_ids(
    op: str, topk: TopK, classes: int, target: Tensor | None, sample_weight: Tensor | None, options: DistillOptions
) -> None:
    """That the rows that count list classes that exist, each once."""
    if options.soft_weight == 0:
        return
    found = find_bad_id(topk.ids, topk.log_probs, classes, counted_rows(target, sample_weight, options))
    if found is not None:
        raise ArgumentError(bad_id(op, topk.ids, *found, classes))


def check_entries(
    op: str, topk: TopK, target: Tensor | None, sample_weight: Tensor | None, options: DistillOptions
) -> None:
    """On a CPU: that the rows that count hold log-probabilities."""
    if options.soft_weight > 0 and _checks.on_plain_cpu(topk.log_probs):
        check_log_probs(op, topk.log_probs, counted_rows(target, sample_weight, options))


def counted_rows(target: Tensor | None, sample_weight: Tensor | None, options: DistillOptions) -> Tensor | None:
    """The rows that enter the loss, bool [N]; None: all."""
    target = labels_of(target)
    counted = None if target is None else target != options.ignore_index
    if sample_weight is not None:
        weighed = sample_weight != 0
        counted = weighed if counted is None else counted & weighed
    return counted


def check_log_probs(op: str, log_probs: Tensor, counted: Tensor | None) -> None:
    """That the entries of each row can be log-probabilities.

    [N, k], [N] bool (the rows that are looked at)

    Raises:
        ArgumentError: they cannot, with row and value, and what they seem to be.
    """
    values = log_probs.detach()
    values = values if values.dtype == torch.float64 else values.to(torch.float32)
    top = values.amax(-1)
    bad = ((values.exp().sum(-1) > _MASS) | (top > _ABOVE)) & (top < math.inf)  # NaN and +inf make a loss of NaN
    if not bool(bad.any()):
        return
    bad = bad if counted is None else bad & counted
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0])
    given = values[bad]
    given = given[given > -math.inf]
    if bool(((given >= 0) & (given <= 1)).all()):
        found = "they seem to be probabilities: pass their log()"
    else:
        found = f"are they logits? Pass log_softmax(logits / temperature) of all classes at the listed ids; {_REMEDY}"
    first = ", ".join(f"{value:g}" for value in values[row, :4].tolist()) + (", ..." if values.shape[1] > 4 else "")
    raise ArgumentError(
        f"{op}: log_probs[{row}] = [{first}] are no log-probabilities, which are at most 0 and whose exp() adds up to "
        f"at most 1; {found}"
    )


def warn_of_small_log_probs(
    op: str, log_probs: Tensor, classes: int, counted: Tensor | None, *, stacklevel: int
) -> None:
    """Say so where every row's likeliest class has less than its share, which cannot be of the likeliest of all.

    Logits that are all negative look like that, and 1 minus their mass, the tail, is then nearly everything.
    """
    top = log_probs.detach().amax(-1)
    looked = top > -math.inf
    looked = looked if counted is None else looked & counted
    small = top < -math.log(classes) - _BELOW
    if bool(looked.any()) and bool((small | ~looked).all()):
        warnings.warn(
            f"{op}: the likeliest listed class of every row has a log-probability of {float(top[looked].max()):g} or "
            f"less, below log(1 / {classes}), that of {classes} equal classes: are log_probs logits? {_REMEDY}",
            stacklevel=stacklevel + 1,
        )
