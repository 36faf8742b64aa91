"""A pool of real latents by class, to draw anchors from that are balanced over the classes, or weighted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError
from tgt_fast.explore.by_class import ByClass
from tgt_fast.explore.draws import philox_words
from tgt_fast.kernels.options import OP_PERTURB
from tgt_fast.teacher import Latents, tree
from tgt_fast.teacher.key import Key


class Anchors(NamedTuple):
    """Starting points of B synthetic examples."""

    latents: Latents  # [B, ...]
    ids: Tensor | None  # [B] int64, the sample ids of the real examples; None: a pool that was saved without
    labels: Tensor  # [B] int64, their classes


class AnchorPool:
    """Encoded real examples by class; a draw takes a class uniformly, then a member of it uniformly.

    Balanced anchors are this project's choice, not the paper's: in a long tail the batch's own examples
    rarely show the rare classes.
    """

    def __init__(self, latents: Latents, labels: Tensor, ids: Tensor | None = None) -> None:
        """latents: N examples; labels: [N] int64 >= 0, the class of each; ids: [N] int64; on the same device."""
        order = torch.argsort(labels, stable=True)
        self.latents = tree.take(latents, order)
        self.ids = None if ids is None else ids[order]
        self.labels = labels[order]
        _, self._sizes = torch.unique_consecutive(self.labels, return_counts=True)
        self._starts = torch.cumsum(self._sizes, 0) - self._sizes
        self._weighted: tuple[ByClass, Tensor] | None = None  # the weights that were last drawn by

    @property
    def classes(self) -> int:
        return int(self._sizes.shape[0])

    def to(self, device: torch.device) -> AnchorPool:
        """The pool on that device; itself where it is there."""
        if self.labels.device == device:
            return self
        ids = None if self.ids is None else self.ids.to(device)
        return AnchorPool(tree.map_batched(lambda leaf: leaf.to(device), self.latents), self.labels.to(device), ids)

    def draw(self, key: Key, weights: ByClass | None = None) -> Anchors:
        """An anchor for each row of the key, which is that of the rows' first replicas; the others start there, too.

        Args:
            weights: of the classes; None: all alike.

        Raises:
            ArgumentError: no class that there is has a weight.
        """
        first, second, _, _ = philox_words(key.on(self.labels.device), OP_PERTURB)
        if weights is None:
            # floor(word * n / 2^32): uniform over 0..n-1, exact in int64 as n < 2^31.
            group = (first * self.classes) >> 32
        else:
            group = torch.searchsorted(self._edges(weights), first, right=True)
        member = (second * self._sizes[group]) >> 32
        rows = self._starts[group] + member
        ids = None if self.ids is None else self.ids[rows]
        return Anchors(tree.take(self.latents, rows), ids, self.labels[rows])

    def _edges(self, weights: ByClass) -> Tensor:
        """Where the words of a class end, int64 [classes]; the last at 2^32, so that a class of weight 0 has none."""
        if self._weighted is None or self._weighted[0] != weights:
            classes = self.labels[self._starts]
            weights.check("anchors", classes)
            shares = weights.at(classes)
            if not bool(shares.sum() > 0):
                raise ArgumentError(
                    f"LatentSampler: anchors by class have weight 0 for every class that calibrate met, {weights!r}"
                )
            shares = (shares / shares.max()).cumsum(0)  # of which no sum overflows
            with torch.inference_mode(False):
                edges = (shares / shares[-1] * 2.0**32).round().to(torch.int64).clone()
            self._weighted = weights, edges
        return self._weighted[1]

    def state_dict(self) -> dict[str, Tensor]:
        state = {"pool_latents": self.latents.z, "pool_labels": self.labels}
        optional = {"pool_mask": self.latents.mask, "pool_source": self.latents.source, "pool_ids": self.ids}
        return state | {name: tensor for name, tensor in optional.items() if tensor is not None}


class PoolBuilder:
    """Collects the pool batch by batch, at most ``per_class`` examples a class, first come first kept."""

    def __init__(self, per_class: int) -> None:
        self._per_class = per_class
        self._kept: dict[int, int] = {}
        self._latents: list[Latents] = []
        self._labels: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._seen = 0  # examples
        self._named: bool | None = None  # whether they come with ids

    def add(self, latents: Latents, labels: Tensor, ids: Tensor | None) -> None:
        """labels: [B] int64; a negative one leaves its example out. ids: [B]; by default the places in the loader."""
        if self._named not in (None, ids is not None):
            raise ArgumentError("calibrate: some batches have ids and others have none")
        self._named = ids is not None
        ids = torch.arange(self._seen, self._seen + len(labels), device="cpu") if ids is None else ids.to(torch.int64)
        self._seen += len(labels)
        rows = []
        for row, label in enumerate(labels.tolist()):
            seen = self._kept.get(label, 0)
            if label >= 0 and seen < self._per_class:
                self._kept[label] = seen + 1
                rows.append(row)
        if rows:
            keep = torch.tensor(rows, device="cpu")
            self._latents.append(tree.take(latents, keep))
            for kept, given in ((self._labels, labels), (self._ids, ids)):
                kept.append(given.to(latents.z.device)[keep.to(latents.z.device)])

    def parts(self) -> list[tuple[Latents, Tensor, Tensor]]:
        """The anchors that were kept: latents, labels and ids, on the CPU."""
        return [
            (tree.map_batched(lambda leaf: leaf.cpu(), latents), labels.cpu(), ids.cpu())
            for latents, labels, ids in zip(self._latents, self._labels, self._ids, strict=True)
        ]

    def build(self) -> AnchorPool:
        if not self._latents:
            raise ArgumentError("calibrate: the loader gave no examples")
        longest = torch.Size(max(sizes) for sizes in zip(*(part.z.shape[1:] for part in self._latents), strict=True))
        latents = tree.concat([part.padded_to(longest) for part in self._latents])
        return AnchorPool(latents, torch.cat(self._labels), torch.cat(self._ids))
