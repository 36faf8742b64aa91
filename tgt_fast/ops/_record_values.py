"""Whether a record holds log-probabilities, as it says, and not logits or probabilities."""

from __future__ import annotations

import math
import warnings
from typing import Final

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError

# Log-probabilities rounded to 8 bits of mantissa may add up to a little more than 1, and none of them is above 0.
_MASS: Final = 1.1
_ABOVE: Final = 0.01
_BELOW: Final = 0.1  # what the same rounding takes from the largest, in nats
_REMEDY: Final = "topk_teacher(logits, k, temperature) makes a record from logits"


def check_log_probs(op: str, log_probs: Tensor, counted: Tensor | None) -> None:
    """That the entries of each row can be log-probabilities.

    [N, k], [N] bool (the rows that are looked at)

    Raises:
        ArgumentError: they cannot, with row and value, and what they seem to be.
    """
    wide = log_probs.detach()
    wide = wide if wide.dtype == torch.float64 else wide.to(torch.float32)
    top = wide.amax(-1)
    bad = ((wide.exp().sum(-1) > _MASS) | (top > _ABOVE)) & (top < math.inf)  # NaN and +inf make a loss of NaN
    if not bool(bad.any()):
        return
    bad = bad if counted is None else bad & counted
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0])
    listed = wide[bad]
    listed = listed[listed > -math.inf]
    if bool(((listed >= 0) & (listed <= 1)).all()):
        found = "they seem to be probabilities: pass their log()"
    else:
        found = f"are they logits? Pass log_softmax(logits / temperature) of all classes at the listed ids; {_REMEDY}"
    values = ", ".join(f"{value:g}" for value in wide[row, :4].tolist()) + (", ..." if wide.shape[1] > 4 else "")
    raise ArgumentError(
        f"{op}: log_probs[{row}] = [{values}] are no log-probabilities, which are at most 0 and whose exp() adds up to "
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
