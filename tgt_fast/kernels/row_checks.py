"""Errors of a row, in words, whoever finds them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tgt_fast.kernels.options import DistillOptions


def bad_weight(row: int, value: float, op: str = "distillation_loss") -> str:
    return f"{op}: sample_weight[{row}] = {value} must be finite and >= 0"


def bad_target(row: int, value: int, classes: int, options: DistillOptions, op: str = "distillation_loss") -> str:
    return (
        f"{op}: target[{row}] = {value} is not in [0, {classes}), "
        f"nor ignore_index ({options.ignore_index}), nor unlabeled_index ({options.unlabeled_index})"
    )


def bad_share(row: int, shares: Tensor, op: str = "distillation_loss") -> str:
    at = int((~(shares >= 0)).nonzero()[0])
    return f"{op}: target[{row}, {at}] = {float(shares[at]):g} is no share of a class, which is >= 0"


def find_bad_id(ids: Tensor, log_probs: Tensor, classes: int, counted: Tensor | None) -> tuple[int, int] | None:
    """(row, entry) of the first id that is out of range or repeats one of its row; None if all are fine.

    [N, k] int64, [N, k], [N] bool (the rows that are looked at)
    """
    named = log_probs != -math.inf
    if counted is not None:
        named = named & counted[:, None]
    bad = named & ((ids < 0) | (ids >= classes))
    # Padding gets ids of its own, which repeat nothing.
    places = torch.where(named, ids, -1 - torch.arange(ids.shape[1], device=ids.device))
    in_order, order = places.sort(dim=-1, stable=True)
    repeats = torch.zeros_like(bad)
    repeats[:, 1:] = in_order[:, 1:] == in_order[:, :-1]
    bad = bad | (torch.zeros_like(bad).scatter(1, order, repeats) & named)
    if not bool(bad.any()):
        return None
    row, entry = bad.nonzero()[0].tolist()
    return row, entry


def bad_id(op: str, ids: Tensor, row: int, entry: int, classes: int) -> str:
    """The error of an id that ``find_bad_id`` found."""
    value = int(ids[row, entry])
    if 0 <= value < classes:
        return f"{op}: ids[{row}, {entry}] = {value} is listed twice in its row"
    return f"{op}: ids[{row}, {entry}] = {value} is not in [0, {classes})"
