"""Arguments of a soft-label loss that change its logits or its divergence: checks, and the record that travels."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.calls import is_soft
from tgt_fast.kernels.options import TEMPERATURES, DistillOptions
from tgt_fast.ops import _checks

NAMES: Final = ("student_bias", "teacher_bias", "label_margin", "standardize", "decoupled", "skew", "correct_teacher")
DEFAULTS: Final = (None, None, None, False, None, 0.0, None)
_SKEWED: Final = ("forward_kl", "reverse_kl")
_LARGEST: Final = 0.99  # of the skew: a KL goes to 0 with the square of what is left of 1
_WEIGHTS: Final = 1e6


def row_temperatures(
    op: str, temperature: Any, teacher_temperature: Any
) -> tuple[float, float | None, tuple[Tensor, Tensor] | None]:
    """The two temperatures as numbers, and as a tensor each where one of them has a value a row."""
    by_row = [isinstance(value, Tensor) and value.dim() > 0 for value in (temperature, teacher_temperature)]
    if not any(by_row):
        return temperature, teacher_temperature, None
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if isinstance(value, Tensor) and value.dim():
            _checks.real(op, name, value)
        elif value is not None:
            _checks.number(op, name, value, *TEMPERATURES, late=True)
    rows = temperature if by_row[0] else teacher_temperature
    if teacher_temperature is None:
        teacher_temperature = temperature
    ours, theirs = (
        value if isinstance(value, Tensor) and value.dim() else torch.full_like(rows, value, dtype=torch.float64)
        for value in (temperature, teacher_temperature)
    )
    return 1.0, None, (ours, theirs)


def make_adjustments(
    op: str, options: DistillOptions, student_bias: Tensor | None, teacher_bias: Tensor | None,
    label_margin: Tensor | None, standardize: bool, decoupled: tuple[float, float] | None, skew: float,
    correct_teacher: float | None, temperatures: tuple[Tensor, Tensor] | None = None,
) -> Adjustments | None:  # fmt: skip
    """The record, whose options are checked; None where nothing is asked for."""
    standardize = _checks.flag(op, "standardize", standardize)
    divergence = options.divergence
    if skew != 0:
        skew = _checks.number(op, "skew", skew, 0, _LARGEST)
    if skew and divergence not in _SKEWED:
        raise ArgumentError(
            f"{op}: skew mixes one side into the other for divergence 'forward_kl' and 'reverse_kl', got {divergence!r}"
        )
    if decoupled is not None:
        decoupled = _two_weights(op, decoupled)
        _of_forward_kl(op, "decoupled", decoupled, divergence)
    if correct_teacher is not None:
        correct_teacher = _checks.number(op, "correct_teacher", correct_teacher, 0, 1, open_low=True)
        _of_forward_kl(op, "correct_teacher", correct_teacher, divergence)
    forms = {"decoupled": decoupled, "skew": skew or None, "correct_teacher": correct_teacher}
    found = [f"{name}={value}" for name, value in forms.items() if value is not None]
    if len(found) > 1:
        raise ArgumentError(f"{op}: {' and '.join(found)} each replace the divergence; pass one of them")
    ours, theirs = (None, None) if temperatures is None else temperatures
    made = Adjustments(
        standardize, decoupled, skew, correct_teacher, student_bias, teacher_bias, label_margin, ours, theirs
    )
    return None if made == Adjustments() else made


def _of_forward_kl(op: str, name: str, value: Any, divergence: str) -> None:
    if divergence != "forward_kl":
        raise ArgumentError(f"{op}: {name}={value} replaces the divergence 'forward_kl', got {divergence!r}")


def _two_weights(op: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ArgumentError(f"{op}: decoupled must be two weights, of the label's part and the others', got {value!r}")
    a, b = (_checks.number(op, f"decoupled[{i}]", part, 0, _WEIGHTS) for i, part in enumerate(value))
    return a, b


def check_adjustments(
    op: str, adjust: Adjustments, rows: torch.Size, classes: int, like: Tensor, target: Tensor | None
) -> Adjustments:
    """The record with checked tensors, a temperature a row as [N]; ``rows``: the shape of the logits' rows."""
    for name in ("student_bias", "teacher_bias", "label_margin"):
        value = getattr(adjust, name)
        if value is None:
            continue
        _checks.floating(op, name, value)
        _checks.real(op, name, value)
        if value.shape != (classes,):
            raise ShapeError(f"{op}: {name} must have a number a class, ({classes},), got {tuple(value.shape)}")
        _checks.same_device(op, name, value, "student_logits", like)
        if _checks.on_plain_cpu(value) and not bool(value.isfinite().all()):
            raise ArgumentError(
                f"{op}: {name} must be finite, got {float(value[~value.isfinite()][0])}; the logarithm of a share of 0 "
                "is -inf: add a little to the shares first"
            )
    labels = is_soft(target)
    for name in ("decoupled", "correct_teacher", "label_margin"):
        if getattr(adjust, name) is None:
            continue
        if target is None and name != "label_margin":
            raise ArgumentError(f"{op}: {name}={getattr(adjust, name)} needs the labels, but target is missing")
        if labels or (target is not None and target.dim() != len(rows)):
            raise ArgumentError(f"{op}: {name} goes by the label, but target has shares of the classes")
    if adjust.student_temperature is None or adjust.teacher_temperature is None:
        return adjust
    made = []
    by_row = {"temperature": adjust.student_temperature, "teacher_temperature": adjust.teacher_temperature}
    for name, value in by_row.items():
        if value.shape != rows:
            raise ShapeError(
                f"{op}: {name} must be a number, or one a row, {tuple(rows)}, got shape {tuple(value.shape)}"
            )
        _checks.same_device(op, name, value, "student_logits", like)
        if _checks.on_plain_cpu(value) and value.numel():
            least, most = (float(bound) for bound in value.aminmax())
            if not TEMPERATURES[0] <= least <= most <= TEMPERATURES[1]:
                raise ArgumentError(
                    f"{op}: {name} must be in [{TEMPERATURES[0]:g}, {TEMPERATURES[1]:g}], got values from {least:g} "
                    f"to {most:g}"
                )
        made.append(value.detach().reshape(-1))
    return adjust._replace(student_temperature=made[0], teacher_temperature=made[1])


def refuse(op: str, adjust: Adjustments | None, where: str) -> None:
    """ArgumentError where adjustments do not go; ``where``: "with ..."."""
    if adjust is None:
        return
    default = Adjustments()
    named = [
        name.replace("student_temperature", "temperature").replace("teacher_temperature", "temperature")
        for name, value, usual in zip(adjust._fields, adjust, default, strict=True)
        if value is not usual and (isinstance(value, Tensor) or value != usual)
    ]
    if "temperature" in named:
        named = [name for name in named if name != "temperature"] + ["temperature a row"]
    raise ArgumentError(f"{op}: {', '.join(named)} cannot be used {where}")
