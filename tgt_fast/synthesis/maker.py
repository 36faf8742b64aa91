"""The maker of rows: a sampler with the options of one synthesis."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tgt_fast.cache.arguments import flag
from tgt_fast.cache.fingerprint import Fingerprint
from tgt_fast.cache.index import Ids
from tgt_fast.cache.keys import SYNTHETIC
from tgt_fast.cache.layout import Layout
from tgt_fast.cache.outputs import Settings
from tgt_fast.errors import ArgumentError
from tgt_fast.explore import LatentSampler, Synthetic
from tgt_fast.explore.gradient import checked_student
from tgt_fast.kernels.options import MAX_REPLICA, MAX_STEP
from tgt_fast.ops import _checks
from tgt_fast.synthesis.filters import Filters
from tgt_fast.synthesis.provenance import provenance
from tgt_fast.synthesis.rows import fields_of
from tgt_fast.train.data import to_device

OP: Final = "synthesize"


class Batch(NamedTuple):
    """The rows of one batch, made: those that are kept, and those that are not."""

    keys: Ids
    layout: Layout
    tensors: dict[str, Tensor]
    place: Tensor | None  # of the filter that refused each; None: there is no filter
    value: Tensor | None
    made: Synthetic | None  # None in the processes that only store it

    def to_store(self) -> Batch:
        """What another process needs to store it: on the CPU."""
        return self._replace(tensors={name: x.cpu() for name, x in self.tensors.items()}, made=None)


class Maker:
    """Makes the rows of batches."""

    def __init__(
        self, sampler: LatentSampler, replicas: int, settings: Settings, student: Any, step: int, filters: Filters
    ) -> None:
        self.sampler, self.replicas, self.settings = sampler, replicas, settings
        self.student, self.step, self.filters = student, step, filters
        self.fingerprint: Fingerprint = provenance(
            sampler, student, filters, k=settings.k, temperature=settings.temperature, latents=settings.latents
        )

    @staticmethod
    def of(sampler: Any, *, replicas: Any, k: Any, latents: Any, student: Any, step: Any, filters: Any) -> Maker:
        """
        Raises:
            ArgumentError: what cannot be.
        """
        if not isinstance(sampler, LatentSampler):
            raise ArgumentError(f"{OP}: sampler must be a tgt_fast.LatentSampler, got {type(sampler).__name__}")
        replicas = _checks.integer(OP, "replicas", replicas, 1, MAX_REPLICA // 2 + 1)
        step = _checks.integer(OP, "step", step, 0, MAX_STEP)
        k = None if k is None else _checks.integer(OP, "k", k, 1, 2**31)
        if not isinstance(filters, Filters):
            raise ArgumentError(f"{OP}: filters must be tgt_fast.synthesis.Filters, got {type(filters).__name__}")
        if sampler.mode == "persistent":
            raise ArgumentError(
                f"{OP}: persistent chains move with the training that they are part of; rows that can be made again, "
                "by any process, are those of the modes prior, random and gradient"
            )
        if sampler.options.asks_labels:
            raise ArgumentError(
                f"{OP}: rows are made by sample id, without a label, but the sampler has replicas or sigma by class; "
                "with anchors=weights by class it can have a sigma by class"
            )
        if sampler.replicas not in (1, replicas):
            raise ArgumentError(
                f"{OP}: replicas={replicas}, but the sampler has replicas={sampler.replicas}; pass "
                f"replicas={sampler.replicas}, or a sampler that leaves it at 1"
            )
        if sampler.options.needs_scale and sampler.scale is None:
            raise ArgumentError(
                f'{OP}: a sampler with units="std" must know its unit, the same in every process and every later run: '
                "call sampler.calibrate(loader) first"
            )
        if sampler.mode == "gradient":
            student = checked_student(sampler.teacher, student)
        # A copy, which shares everything but these options; copies of an id within a batch are one example.
        own = copy.copy(sampler)
        own.options = replace(sampler.options, replicas=replicas, repeats="same", record_disagreement=False)
        settings = Settings(k, float(sampler.temperature), "bucket", flag(OP, "latents", latents), None)
        return Maker(own, replicas, settings, student if sampler.mode == "gradient" else None, step, filters)

    def keys(self, ids: Ids) -> Ids:
        """Of the rows of a batch, as the sampler gives them: all of replica 0 first."""
        found = np.empty((self.replicas, len(ids), 3), np.int64)
        found[..., 0], found[..., 1] = ids, np.arange(self.replicas)[:, None]
        found[..., 2] = self.step
        return SYNTHETIC.pack(found.reshape(-1, 3))

    def make(self, ids: Ids, x: Any) -> Batch:
        """
        Raises:
            What the sampler raises, and ArgumentError, DTypeError for what cannot be stored.
        """
        x = to_device(x, self.sampler.teacher.device)
        made = self.sampler(x, sample_ids=torch.from_numpy(ids), step=self.step, student=self.student)
        classes = made.teacher_logits.shape[-1]
        if self.settings.k is not None and self.settings.k > classes:
            raise ArgumentError(f"{OP}: k={self.settings.k}, but there are {classes} classes; k=None stores logits")
        layout, tensors = fields_of(OP, made, self.settings)
        place, value = self.filters.refused(self.sampler, made) if self.filters.names else (None, None)
        return Batch(self.keys(ids), layout, tensors, place, value, made)
