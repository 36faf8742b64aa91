"""Which backend runs a call, and why the others do not.

A backend is a module under ``tgt_fast.kernels`` with one file an op. It answers one question, ``refusal(op, tensors)``:
``None`` when it can run the call, else the reason. The same answer steers ``backend="auto"``, fills :func:`explain` and
:func:`backends`, and becomes the typed error when a backend that was asked for by name cannot run.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, BackendError, DTypeError
from tgt_fast.kernels import native, reference, triton

# The last two are one module.
OPS: Final = ("distill", "latent", "linear", "contrast", "listwise", "tokens", "soft_embedding")
TOPK: Final = "topk"  # what stands for the first and the third where the teacher gives a top-k record
BACKENDS: Final[dict[str, ModuleType]] = {"native": native, "triton": triton, "reference": reference}
DEFAULT_VARIABLE: Final = "TGT_FAST_BACKEND"

# Fastest first; the reference runs everywhere and comes last.
ORDER: Final[dict[str, tuple[str, ...]]] = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}


@dataclass(frozen=True)
class BackendStatus:
    """One row of :func:`backends`."""

    name: str
    available: bool
    reason: str  # why it cannot run here; empty when it can
    devices: tuple[str, ...]  # device types it serves in this process
    detail: str  # what was built, for what


@dataclass(frozen=True)
class Verdict:
    """One row of :func:`explain`: whether a backend would run the call, and why not."""

    backend: str
    chosen: bool
    reason: str


def requested(backend: str) -> str:
    """The name asked for, where ``"auto"`` gives way to the environment's default, read at call time."""
    asked = "backend"
    if isinstance(backend, str) and backend == "auto":
        backend = os.environ.get(DEFAULT_VARIABLE, "auto")
        if backend == "auto":
            return backend
        asked = f"the environment variable {DEFAULT_VARIABLE}"
    if not isinstance(backend, str) or (backend != "auto" and backend not in BACKENDS):  # what has no hash is none
        raise ArgumentError(f"{asked} must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    return backend


def choose(op: str, backend: str, tensors: Sequence[Tensor]) -> str:
    """The name of the backend that runs ``op`` on ``tensors``.

    Raises:
        ArgumentError: an unknown backend name.
        BackendError: the backend asked for by name cannot run this call.
    """
    name = requested(backend)
    if name != "auto":
        reason = BACKENDS[name].refusal(op, tensors)
        if reason is not None:
            raise BackendError(f"{op}: backend {name!r} cannot run this call: {reason}")
        return name
    first = tensors[0]  # a device costs more to ask for than whether it is the host
    for candidate in ORDER["cpu"] if first.is_cpu else ORDER.get(first.device.type, ("reference",)):
        if BACKENDS[candidate].refusal(op, tensors) is None:
            return candidate
    reasons = "; ".join(f"{row.backend}: {row.reason}" for row in _verdicts(op, tensors))
    raise BackendError(f"{op}: no backend can run this call ({reasons})")


@functools.cache
def kernel(op: str, backend: str) -> Any:
    """The module that computes ``op`` on a backend."""
    return importlib.import_module(f"tgt_fast.kernels.{backend}.{op}")


def explain(op: str, *inputs: Any) -> list[Verdict]:
    """Which backend ``backend="auto"`` takes for ``op`` ("distill", ...) on tensors, and why not the others.

    A :class:`tgt_fast.TeacherTopK` may stand among them where the op takes one.

    >>> import torch, tgt_fast as tgt
    >>> [row.backend for row in tgt.explain("distill", torch.zeros(2, 3)) if row.chosen]
    ['native']
    """
    if op == "sparse":
        raise ArgumentError("op 'sparse' is a form of 'distill' now: explain('distill', student_logits, record)")
    if not isinstance(op, str) or op not in OPS:
        raise ArgumentError(f"op must be one of {OPS}, got {op!r}")
    tensors: list[Tensor] = []
    form = op
    for value in inputs:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif op in ("distill", "linear", "listwise") and isinstance(getattr(value, "log_probs", None), Tensor):
            form = op if op == "listwise" else TOPK
            tensors += [x for x in (value.log_probs, value.ids, value.tail_log_prob) if x is not None]
        else:
            raise DTypeError(f"explain: {op!r} is asked about tensors, got {value!r}")
    return _verdicts(form, tensors or [torch.empty(0, device="cpu")])


def _verdicts(op: str, tensors: Sequence[Tensor]) -> list[Verdict]:
    default = requested("auto")
    rows: list[Verdict] = []
    taken = False
    order = ORDER.get(tensors[0].device.type, ("reference",))
    for name in order:
        reason = BACKENDS[name].refusal(op, tensors)
        if reason is None and default not in ("auto", name):
            reason = f"{DEFAULT_VARIABLE}={default}"
        chosen = reason is None and not taken
        if reason is None and taken:
            reason = "a faster backend can run the call"
        taken = taken or chosen
        rows.append(Verdict(name, chosen, reason or ""))
    return rows


def backends() -> list[BackendStatus]:
    """Every backend: whether it can run in this process, why not, for which devices, and what was built."""
    return [BackendStatus(name, *module.status()) for name, module in BACKENDS.items()]
