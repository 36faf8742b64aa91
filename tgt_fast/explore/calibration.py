"""The latents' standard deviation, streamed, and the classes of a calibration loader's examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tgt_fast._bars import batches
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.explore.anchors import PoolBuilder
from tgt_fast.explore.cached import check_cache, needed_ids
from tgt_fast.explore.processes import of_all_processes
from tgt_fast.ops.topk import TeacherTopK
from tgt_fast.teacher import Latents, Teacher, tree
from tgt_fast.teacher.batches import Columns, check_loader, split_batches


class StreamingStd:
    """Standard deviation of each latent coordinate over all examples, by Chan's merge of float64 moments.

    Where the latents carry a mask, its positions are exchangeable and of changing number: the deviation is
    pooled over the real ones and has size 1 there: (1, d) for z of (B, L, d) and a mask of (B, L).
    """

    def __init__(self) -> None:
        self._count: Tensor | None = None  # per coordinate, as the mask may hide different positions
        self._mean = torch.empty(0, device="cpu")
        self._squares = torch.empty(0, device="cpu")

    def update(self, latents: Latents) -> None:
        z = latents.z.detach().double()
        dims = [0]
        real = torch.ones_like(z)
        if latents.mask is not None and latents.real is not None:
            real = latents.real.expand_as(z).double()
            mask = latents.mask
            dims += [i for i in range(1, mask.ndim) if mask.shape[i] > 1 or z.shape[i] == 1]
            z = torch.where(latents.real, z, 0.0)  # whatever padding holds, 0 * NaN included
        count = real.sum(dims, keepdim=True)[0]
        mean = (z * real).sum(dims, keepdim=True)[0] / count.clamp(min=1)
        squares = ((z - mean).square() * real).sum(dims, keepdim=True)[0]
        self.add((count, mean, squares))

    def moments(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Number, mean and sum of squared deviations, on the CPU; None of no examples."""
        if self._count is None:
            return None
        return self._count.cpu(), self._mean.cpu(), self._squares.cpu()

    def add(self, moments: tuple[Tensor, Tensor, Tensor] | None) -> None:
        """Those of other examples."""
        if moments is None:
            return
        count, mean, squares = moments
        if self._count is None:
            self._count, self._mean, self._squares = count, mean, squares
            return
        if self._count.shape != count.shape:
            raise ShapeError(
                f"calibrate: latents of shape {list(count.shape)} after latents of shape {list(self._count.shape)}"
            )
        total = self._count + count
        gap = mean - self._mean
        share = count / total.clamp(min=1)
        self._squares = self._squares + squares + gap.square() * self._count * share
        self._mean = self._mean + gap * share
        self._count = total

    def result(self) -> Tensor:
        """The unbiased standard deviation, float32, shaped like one example's latents (size 1 where pooled).

        Raises:
            ArgumentError: fewer than two examples, latents that are not finite, or that are all the same.
        """
        if self._count is None or not bool((self._count >= 2).any()):
            raise ArgumentError(
                "LatentSampler: the latents' standard deviation needs at least two examples: "
                'call calibrate(loader) with more data, or use units="absolute"'
            )
        std = (self._squares / (self._count - 1).clamp(min=1)).sqrt().float()
        if not bool(std.isfinite().all()):
            raise ArgumentError(
                "LatentSampler: the encoder's latents are not all finite, so they have no standard deviation"
            )
        if not bool((std > 0).any()):
            raise ArgumentError(
                "LatentSampler: the encoder gives every example the same latent, so there is no deviation to "
                'measure in; calibrate with more data, or use units="absolute"'
            )
        return std


def measure(
    teacher: Teacher,
    loader: Iterable[Any],
    columns: Sequence[Any] | None,
    per_class: int | None,
    cache: Any = None,
    *,
    padding: bool,
    progress: bool | None = None,
) -> tuple[StreamingStd, PoolBuilder | None]:
    """The moments of a loader's latents and, with ``per_class``, balanced anchors."""
    check_cache("calibrate", cache)
    std, pool = StreamingStd(), None if per_class is None else PoolBuilder(per_class)
    parts = Columns("calibrate", columns)
    check_loader("calibrate", loader)
    made = split_batches(loader, parts, padding=padding)
    for (ids, x, y), kept in batches(made, loader, "calibrate", progress):
        if kept is not None:
            ids, x, y = (tree.map_batched(lambda leaf, kept=kept: leaf[:kept], one) for one in (ids, x, y))  # type: ignore[misc]
        if kept == 0:
            continue
        if teacher.device is not None:
            x = tree.map_batched(lambda leaf: leaf.to(teacher.device), x)
        latents = teacher.encode(x) if cache is None else cache.encode(x, needed_ids("calibrate", ids))
        std.update(latents)
        if pool is not None:
            pool.add(latents, labels_of(teacher, x, y, cache, ids), ids)
    return std, pool


def measure_together(
    group: Any,
    teacher: Teacher,
    loader: Iterable[Any],
    columns: Sequence[Any] | None,
    per_class: int | None,
    cache: Any = None,
    progress: bool | None = None,
) -> tuple[StreamingStd, PoolBuilder | None]:
    """The same of the loaders of all processes, in the order of their ranks: equal to the bit in each."""

    def of_this() -> Any:
        std, pool = measure(teacher, loader, columns, per_class, cache, padding=False, progress=progress)
        return std.moments(), None if pool is None else pool.parts()

    std, pool = StreamingStd(), None if per_class is None else PoolBuilder(per_class)
    for moments, kept in of_all_processes("calibrate", group, of_this):
        std.add(moments)
        for latents, labels, ids in kept or ():
            assert pool is not None
            pool.add(latents, labels, ids)
    return std, pool


@torch.no_grad()
def labels_of(teacher: Teacher, x: Any, y: Tensor | None, cache: Any = None, ids: Tensor | None = None) -> Tensor:
    """The class of each example, int64 [B]: y, or, where it is missing or negative, the labeler's argmax."""
    if y is None:
        return _opinion(teacher, x, cache, ids)
    if not isinstance(y, Tensor) or y.is_floating_point() or y.dtype == torch.bool:
        found = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise DTypeError(f"calibrate: labels must be a tensor of integer classes, got {found}")
    if y.ndim != 1:
        raise ShapeError(f"calibrate: labels must be [batch], got {tuple(y.shape)}")
    y = y.to(torch.int64)
    if bool((y >= 0).all()):
        return y
    opinion = _opinion(teacher, x, cache, ids)
    return torch.where(y.to(opinion.device) >= 0, y.to(opinion.device), opinion)


def _opinion(teacher: Teacher, x: Any, cache: Any, ids: Tensor | None) -> Tensor:
    logits = teacher.label(x) if cache is None else cache.label(x, ids)
    if isinstance(logits, TeacherTopK):
        if logits.ids.ndim == 2:
            return logits.ids.gather(1, logits.log_probs.argmax(1, keepdim=True)).squeeze(1)
        logits = logits.log_probs
    if logits.ndim != 2:
        raise ShapeError(
            "calibrate: balanced anchors need one class an example, but the labeler gives logits of shape "
            f"{tuple(logits.shape)}"
        )
    return logits.argmax(1)
