"""Between what a teacher gives (logits or records, latents) and the fields of a cache's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.cache.arguments import with_numbers
from tgt_fast.cache.layout import CLASS_IDS, Layout
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.ops import _checks
from tgt_fast.ops.topk import TeacherTopK, topk_teacher
from tgt_fast.teacher import Latents

OP: Final = "TeacherCache"


@dataclass(frozen=True)
class Settings:
    """In which form outputs are stored."""

    k: int | None
    temperature: float
    tail: str
    latents: bool
    dtype: torch.dtype | None

    @staticmethod
    def of(parts: Any) -> Settings:
        """From the parts of a fingerprint."""
        dtype = parts.get("dtype")
        return Settings(
            parts.get("k"), parts.get("temperature") or 1.0, parts.get("tail") or "bucket", bool(parts.get("latents")),
            None if dtype is None else getattr(torch, dtype),
        )  # fmt: skip

    def fields(self, outputs: Tensor | TeacherTopK, latents: Latents | Tensor | None, n: int) -> tuple[Layout, dict]:
        """The fields of n samples and their layout.

        Raises:
            ShapeError, DTypeError, ArgumentError: outputs that do not fit the settings, with both values.
        """
        tensors, classes = self._labels(outputs)
        if self.latents:
            tensors |= _latents(latents, n)
        elif latents is not None:
            raise ArgumentError(f"{OP}: this cache stores no latents; make it with latents=True")
        for name, x in tensors.items():
            with_numbers(OP, name, x)
            if x.shape[0] != n:
                raise ShapeError(f"{OP}: {n} sample ids, but {name} {tuple(x.shape)}")
        return Layout.of(tensors, classes), tensors

    def _labels(self, outputs: Tensor | TeacherTopK) -> tuple[dict[str, Tensor], int]:
        if isinstance(outputs, TeacherTopK):
            if self.k is None:
                raise ArgumentError(f"{OP}: this cache stores logits (k=None), but got a record")
            for name in ("k", "temperature", "tail"):
                here, there = getattr(self, name), getattr(outputs, name)
                if here != there:
                    raise ArgumentError(f"{OP}: the cache has {name}={here!r}, the record {there!r}")
            if not outputs.shape:
                raise ShapeError(f"{OP}: a record of one row without a dimension of samples")
            return self._record(outputs.check()), outputs.num_classes
        _checks.floating(OP, "logits", outputs)
        if outputs.dim() < 2 or outputs.shape[-1] == 0:
            raise ShapeError(f"{OP}: logits must be (n, ..., C) with C >= 1, got {tuple(outputs.shape)}")
        classes = outputs.shape[-1]
        if self.k is None:
            return {"logits": self._rounded(outputs)}, classes
        if self.k > classes:
            raise ArgumentError(f"{OP}: k={self.k}, but there are {classes} classes; k=None stores logits")
        return self._record(topk_teacher(outputs, self.k, self.temperature, tail=self.tail)), classes

    def _record(self, record: TeacherTopK) -> dict[str, Tensor]:
        narrow = torch.int32 if record.num_classes <= 2**31 else torch.int64
        found = {CLASS_IDS: record.ids.to(narrow), "log_probs": self._rounded(record.log_probs)}
        if record.tail_log_prob is not None:
            found["tail_log_prob"] = self._rounded(record.tail_log_prob)
        return found

    def _rounded(self, x: Tensor) -> Tensor:
        x = x.detach()
        return x if self.dtype is None else x.to(self.dtype)

    def labels(self, tensors: dict[str, Tensor], classes: int, device: torch.device) -> Tensor | TeacherTopK:
        """The inverse of :meth:`_labels`."""
        if device.type != "cpu":
            tensors = {name: x.to(device) for name, x in tensors.items()}
        if self.k is None:
            return tensors["logits"]
        tail = tensors.get("tail_log_prob")
        ids = tensors[CLASS_IDS].to(torch.int64)
        return TeacherTopK(ids, tensors["log_probs"], tail, self.temperature, classes, self.tail)


LABELS: Final = (CLASS_IDS, "log_probs", "tail_log_prob", "logits")
LATENTS: Final = ("latents", "latents_mask", "latents_source")


def _latents(latents: Latents | Tensor | None, n: int) -> dict[str, Tensor]:
    if isinstance(latents, Tensor):
        latents = Latents(latents)
    if not isinstance(latents, Latents):
        raise DTypeError(f"{OP}: this cache stores latents, and they must be Latents or a tensor, got {latents!r}")
    latents.check(n, OP)
    optional = {"latents_mask": latents.mask, "latents_source": latents.source}
    return {"latents": latents.z, **{name: x for name, x in optional.items() if x is not None}}


def as_latents(tensors: dict[str, Tensor], device: torch.device) -> Latents:
    """The inverse of :func:`_latents`, on a device."""
    found = (None if (x := tensors.get(name)) is None else x.to(device) for name in LATENTS[1:])
    return Latents(tensors["latents"].to(device), *found)
