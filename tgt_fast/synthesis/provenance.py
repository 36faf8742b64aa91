"""Provenance of synthetic examples: by which teacher, sampler and options they were made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Final

from torch import Tensor

from tgt_fast.cache.fingerprint import Fingerprint
from tgt_fast.cache.identity import Identity
from tgt_fast.cache.values import tensor_bytes
from tgt_fast.explore import LatentSampler
from tgt_fast.explore.by_class import ByClass
from tgt_fast.synthesis.filters import Filters

# Of a sampler's options those that say nothing about the numbers in a row, and those that some modes do not look at.
_NEVER: Final = (
    "replicas", "repeats", "bank_size", "restart_probability", "backend", "record_disagreement", "logits_of",
)  # fmt: skip
_ANCHORED: Final = ("units", "anchors", "affine")
_PLAIN: Final = (type(None), bool, int, float, str)
_CLIMBING: Final = (
    "step_size", "steps", "radius", "norm", "step_noise", "divergence", "beta", "temperature", "ball", "score",
)  # fmt: skip


def provenance(
    sampler: LatentSampler,
    student: Callable[..., Any] | None,
    filters: Filters,
    *,
    k: int | None,
    temperature: float,
    latents: bool,
) -> Fingerprint:
    """The fingerprint of what decides about the numbers in a row, apart from its key.

    Options that the sampler's mode does not look at are left out, and so is what changes rounding alone: backends,
    devices, and how the loader batches.
    """
    parts: dict[str, Any] = {"form": "synthetic examples"}
    teacher = Identity(latents=True, generator=True)
    teacher.add("teacher", sampler.teacher)
    parts |= {"teacher_weights": teacher.weights, "teacher_code": teacher.code}
    unseen = teacher.unseen
    if sampler.mode == "gradient" and student is not None:
        other = Identity()
        other.add("student", student)
        other.add("logits_of", sampler.logits_of)
        parts |= {"student_weights": other.weights, "student_code": other.code}
        unseen += other.unseen
    left_out = _NEVER + (_ANCHORED if sampler.mode == "prior" else ())
    left_out += () if sampler.mode == "gradient" else _CLIMBING
    for name in (one.name for one in fields(sampler.options) if one.name not in left_out):
        value = getattr(sampler.options, name)
        if isinstance(value, _PLAIN):
            parts[name] = value
        elif isinstance(value, ByClass):
            parts[name] = value.text
        else:  # a function, or several values
            held = Identity()
            held.add(name, value)
            parts |= {f"{name}_code": held.code, f"{name}_weights": held.weights}
    parts["seed"] = sampler.seed
    if sampler.options.needs_scale:
        parts["scale"] = _digest(sampler.scale)
    if sampler.options.pooled:
        pool = {} if sampler._pool is None else sampler._pool.state_dict()
        parts["pool"] = _digest(*(value for _, value in sorted(pool.items())))
    parts |= {"k": k, "latents": latents}
    if k is not None:
        parts |= {"temperature": temperature, "tail": "bucket"}
    parts |= {name: value for name, value in filters.bounds.items() if value is not None}
    if filters.second is not None:
        view = Identity()
        view.add("second", filters.second)
        parts |= {"second_code": view.code, "second_weights": view.weights}
        unseen += view.unseen
    return Fingerprint(parts, unseen)


def _digest(*tensors: Tensor | None) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        for piece in () if tensor is None else tensor_bytes("sampler", tensor):
            found.update(piece)
    return found.hexdigest()[:16]
