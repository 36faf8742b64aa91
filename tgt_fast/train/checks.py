"""Arguments of ``fit``: its options, its objective, and what that gives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from numbers import Real
from typing import Any, Final

import torch
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError
from tgt_fast.ops import _checks

_OBJECTIVE: Final = (
    "pass tgt_fast.TGTObjective(teacher, loss=tgt_fast.DistillationLoss(...)), or a function "
    "objective(student, x, y, *, sample_ids, step) that returns {'loss': a 0-d tensor with a graph}"
)


def check_options(
    steps: int,
    accumulate: int,
    clip_grad_norm: float | None,
    eval_every: int,
    mode: str,
    checkpoint_every: int,
) -> None:
    counts = {
        "steps": steps,
        "eval_every": eval_every,
        "checkpoint_every": checkpoint_every,
        "accumulate": accumulate,
    }
    for name, value in counts.items():
        low = int(name == "accumulate")
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ArgumentError(f"fit: {name} must be an integer >= {low}, got {value!r}")
    if clip_grad_norm is not None and not (_is_number(clip_grad_norm) and clip_grad_norm > 0):
        raise ArgumentError(f"fit: clip_grad_norm must be > 0, got {clip_grad_norm!r}")
    if not isinstance(mode, str) or mode not in ("max", "min"):
        raise ArgumentError(f"fit: mode must be 'max' or 'min', got {mode!r}")


def _is_number(value: Any) -> bool:
    """True if it is one of the numbers that a float can be; infinity is."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and float(value) == value
    except OverflowError:
        return False


def check_tools(optimizer: Any, scheduler: Any, seed: Any, monitor: Any, evaluate: Any) -> None:
    """The rest that ``fit`` uses."""
    for name, part, needed in (
        ("optimizer", optimizer, ("step", "zero_grad", "param_groups", "state_dict", "load_state_dict")),
        ("scheduler", scheduler, ("step", "state_dict", "load_state_dict")),
    ):
        if (part is not None or name == "optimizer") and not (
            all(hasattr(part, method) for method in needed) and not isinstance(part, type)
        ):
            raise ArgumentError(f"fit: {name} must be a torch {name}, got {part!r:.200}")
    if seed is not None:
        _checks.integer("fit", "seed", seed, -(1 << 63), 1 << 64)
    if not isinstance(monitor, str):
        raise ArgumentError(f"fit: monitor must be the name of a metric, got {monitor!r}")
    if evaluate is not None and not callable(evaluate):
        raise ArgumentError(f"fit: evaluate must be a function of the student, got {type(evaluate).__name__}")


def check_extras(autocast: Any, ema: Any, callbacks: Any) -> None:
    """Work of ``fit`` beside training."""
    if autocast is not None and autocast is not torch.bfloat16:
        more = "; float16 needs gradients that are scaled" if autocast is torch.float16 else ""
        raise ArgumentError(f"fit: autocast must be torch.bfloat16 or None, got {autocast!r:.200}{more}")
    if ema is not None and not (_is_number(ema) and 0 < ema < 1):
        raise ArgumentError(f"fit: ema must be in (0, 1), got {ema!r:.200}")
    if not isinstance(callbacks, (list, tuple)) or not all(callable(function) for function in callbacks):
        raise ArgumentError(f"fit: callbacks must be a list of functions f(event, run), got {callbacks!r:.200}")


def check_parties(student: Any, objective: Any, asked: Mapping[str, Any]) -> None:
    """That the one can be trained, and the other be called as :class:`Objective` says."""
    if not isinstance(student, nn.Module):
        raise ArgumentError(f"fit: the student must be a torch.nn.Module, got {type(student).__name__}")
    name = type(objective).__name__
    if not callable(objective):
        raise ArgumentError(f"fit: the objective must be callable, got {name}; {_OBJECTIVE}")
    try:
        signature = inspect.signature(objective.forward if isinstance(objective, nn.Module) else objective)
    except (TypeError, ValueError):  # a built-in without one
        return
    try:
        signature.bind(student, None, None, sample_ids=None, step=0, **asked)
    except TypeError as error:
        raise ArgumentError(
            f"fit: {getattr(objective, '__qualname__', name)} is no objective: it cannot be called with student, x, "
            f"y, {''.join(f'{name}=, ' for name in asked)}sample_ids= and step= ({error}); {_OBJECTIVE}"
        ) from None


def checked_output(output: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The loss of an objective, and its parts."""
    if not isinstance(output, Mapping) or "loss" not in output:
        found = f"a dict of {sorted(map(str, output))}" if isinstance(output, Mapping) else type(output).__name__
        raise ArgumentError(
            f"fit: the objective must return {{'loss': a 0-d tensor}}, with 'parts' or not; got {found}"
        )
    loss, parts = output["loss"], output.get("parts", {})
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ArgumentError(f"fit: the objective's loss must be a 0-d tensor, got {found}")
    if not loss.requires_grad:
        raise ArgumentError(
            "fit: no gradient reaches the student: the objective's loss has no graph; it was detached, made under "
            "torch.no_grad(), or every parameter of the student is frozen"
        )
    if not isinstance(parts, Mapping) or not all(isinstance(part, Tensor) for part in parts.values()):
        raise ArgumentError(f"fit: the objective's parts must be a dict of 0-d tensors, got {parts!r}")
    return loss, parts
