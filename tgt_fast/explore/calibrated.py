"""What a sampler knows of the data: the unit of its lengths, and anchors by class."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.explore.anchors import AnchorPool, Anchors
from tgt_fast.explore.by_class import ByClass
from tgt_fast.explore.calibration import StreamingStd, measure, measure_together
from tgt_fast.explore.options import checked_integer
from tgt_fast.explore.processes import warn_of_shards
from tgt_fast.kernels.options import MAX_SAMPLE_ID
from tgt_fast.ops.counts import counting_group
from tgt_fast.teacher import Latents, Teacher
from tgt_fast.teacher.key import Key

if TYPE_CHECKING:
    from tgt_fast.explore.options import SamplerOptions

Own = TypeVar("Own", bound="Calibrated")


class Calibrated:
    """The part of :class:`tgt_fast.LatentSampler` that measures."""

    options: SamplerOptions
    teacher: Teacher
    scale: Tensor | None
    _pool: AnchorPool | None

    @torch.inference_mode(False)  # what is kept must be normal tensors, to serve in any mode later
    @torch.no_grad()
    def calibrate(
        self: Own,
        loader: Iterable[Any],
        *,
        per_class: int = 1024,
        columns: Sequence[Any] | None = None,
        group: Any = None,
        progress: bool | None = None,
        cache: Any = None,
    ) -> Own:
        """Measure ``scale``, the standard deviation of Enc(x) over a loader, and collect balanced anchors.

        Args:
            loader: batches ``x``, ``(x,)``, ``(x, y)`` or ``(ids, x, y)``. In data parallel runs give every
                rank the same data, or its part of them and a ``group``, so that all measure in the same unit; what is
                seen to be one rank's part of the data, without a group, warns.
            per_class: anchors kept a class, the first ones (anchors that are drawn only; class: y, or, where y is
                missing or negative, the labeler's argmax; ``Synthetic.anchor_ids`` are the loader's ids, or, where it
                gives none, places in it, counted from 0).
            columns: ``(ids, x, y)``, where they are in other batches, as for :func:`tgt_fast.fit`.
            group: "world", or a process group of ``torch.distributed``, whose processes measure together, each on its
                part of the data: the same ``scale`` to the bit on each, and balanced anchors of them all, those of the
                first process first (their ids are then the loader's, or places in each one's part). Each process
                calls, even with no data. Examples that a ``DistributedSampler`` repeats as padding are left out.
            progress: show a bar; None: on a terminal, where it takes longer than a second.
            cache: a :class:`tgt_fast.TeacherCache` with ``latents=True``, or an ensemble's, which then gives Enc(x) and
                the labeler's argmax by the loader's ids, and keeps what it lacked.

        Returns:
            The sampler itself.

        Raises:
            ArgumentError: fewer than two examples, latents that are not finite or all the same, or batches that can
                be read in more than one way.
        """
        per_class = checked_integer("per_class", per_class, 1, MAX_SAMPLE_ID)
        given = self.teacher, loader, columns, per_class if self.options.pooled else None, cache
        together = counting_group("calibrate", group, name="group")
        if together is None:
            std, pool = measure(*given, padding=True, progress=progress)
        else:
            std, pool = measure_together(together, *given, progress)
        scale = std.result()
        self._pool = None if pool is None else pool.build()
        self.scale = scale
        if self.options.needs_scale and together is None:
            warn_of_shards(loader, scale)
        return self

    def _drawn(self, key: Key) -> Anchors:
        """Balanced anchors."""
        if self._pool is None:
            raise ArgumentError(
                'LatentSampler: anchors="balanced" or by class needs to know the classes: call calibrate(loader) first'
            )
        self._pool = self._pool.to(key.ids.device)
        weights = self.options.anchors
        return self._pool.draw(key, weights if isinstance(weights, ByClass) else None)

    def _scale_for(self, latents: Latents) -> Tensor | None:
        if not self.options.needs_scale:
            return None
        if self.scale is None:
            std = StreamingStd()
            std.update(latents)
            self.scale = std.result()
            warnings.warn(
                "LatentSampler: the latents' standard deviation was estimated from the first batch "
                f"({latents.z.shape[0]} examples) and is kept; call calibrate(loader) before training for a "
                "better one and, with several processes, for the same one on each",
                stacklevel=4,
            )
        shape, latent = self.scale.shape, latents.z.shape[1:]
        if len(shape) != len(latent) or any(a not in (1, b) for a, b in zip(shape, latent, strict=True)):
            raise ShapeError(
                f"LatentSampler: calibrated for latents of shape {tuple(shape)}, the encoder now gives {tuple(latent)}"
            )
        self.scale = self.scale.to(latents.z.device)
        return self.scale
