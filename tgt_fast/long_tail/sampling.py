"""Samplers for loaders that draw rare classes more often."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from tgt_fast._processes import place
from tgt_fast.errors import ArgumentError
from tgt_fast.long_tail.counts import labels_of
from tgt_fast.ops import _checks


class _ClassSampler(Sampler[int]):
    """Indices whose class is drawn with a probability in proportion to ``n_c**power``."""

    power: float

    def __init__(
        self,
        labels: Any,
        *,
        num_samples: int | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.op = op = type(self).__name__
        pieces = list(labels_of(op, labels))
        found = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64, device="cpu")
        rows = (found >= 0).nonzero().flatten()
        if not len(rows):
            raise ArgumentError(f"{op}: there is no labelled example to draw")
        order = rows[torch.argsort(found[rows], stable=True)]
        classes, counts = torch.unique_consecutive(found[order], return_counts=True)
        self.classes = classes  # those that have examples, ascending
        self._members: tuple[Tensor, ...] = torch.split(order, counts.tolist())
        self.probabilities = counts.double() ** self.power / (counts.double() ** self.power).sum()
        here = place()
        self.num_replicas = here[1] if num_replicas is None else num_replicas
        self.num_replicas = _checks.integer(op, "num_replicas", self.num_replicas, 1, 1 << 31)
        self.rank = _checks.integer(op, "rank", here[0] if rank is None else rank, 0, self.num_replicas)
        wanted = len(found) if num_samples is None else num_samples
        wanted = _checks.integer(op, "num_samples", wanted, 1, 1 << 62)
        self.drop_last = _checks.flag(op, "drop_last", drop_last)
        whole = wanted // self.num_replicas
        self.num_samples = whole if self.drop_last else -(-wanted // self.num_replicas)  # of this process
        self.total_size = self.num_samples * self.num_replicas
        self.seed = _checks.integer(op, "seed", seed, 0, 1 << 62)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next pass draws for; :func:`tgt_fast.fit` calls it."""
        self.epoch = _checks.integer(self.op, "epoch", epoch, 0, 1 << 62)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.rand(self.total_size, generator=generator, dtype=torch.float64, device="cpu")
        edges = self.probabilities.cumsum(0)
        groups = torch.searchsorted(edges, drawn * edges[-1], right=True).clamp(max=len(edges) - 1)
        found = torch.empty(self.total_size, dtype=torch.int64, device="cpu")
        by_class = torch.argsort(groups, stable=True)
        wanted = torch.bincount(groups, minlength=len(edges)).tolist()
        for members, places in zip(self._members, torch.split(by_class, wanted), strict=True):
            rounds = -(-len(places) // len(members))
            orders = [torch.randperm(len(members), generator=generator) for _ in range(rounds)]
            if orders:
                found[places] = members[torch.cat(orders)[: len(places)]]
        yield from found[self.rank :: self.num_replicas].tolist()

    def __repr__(self) -> str:
        return (
            f"{self.op}(classes={len(self.classes)}, num_samples={self.num_samples}, rank={self.rank}, "
            f"num_replicas={self.num_replicas}, seed={self.seed})"
        )


class ClassBalancedSampler(_ClassSampler):
    r"""Indices of examples, ``p(class c) = 1 / C`` over the classes that have examples: class-balanced sampling.

    Within a class every example comes once before any comes again. Examples without a label are not drawn. What is
    drawn depends on seed and epoch alone, and is dealt to the processes in turn.

    Source: Kang et al., "Decoupling representation and classifier for long-tailed recognition", ICLR 2020, equation 1
    with q = 0; "class-aware sampling" of Shen et al., ECCV 2016. Evidence there: it is for the classifier, retrained by
    it (:class:`ClassifierRetraining`), rather than for the whole network.

    Args:
        labels: of the examples: integers in a tensor, an array or a list, negative ones missing; or a data set, whose
            ``labels`` or ``targets`` they are.
        num_samples: >= 1, indices an epoch, over all processes; by default as many as there are examples.
        num_replicas, rank: processes, and which this is; by default torch.distributed's, where it is initialised.
        seed: the same in all processes.
        drop_last: of an epoch that is not divisible by the processes, leave the rest out; else further ones are drawn.

    Attributes:
        num_samples: indices an epoch of this process, ``len(sampler)``.

    Raises:
        ArgumentError: no labelled example, or an option outside its range.

    >>> import tgt_fast as tgt
    >>> sampler = tgt.long_tail.ClassBalancedSampler([0] * 98 + [1, -1], num_samples=1000)
    >>> 450 < list(sampler).count(98) < 550
    True
    """

    power = 0.0


class SquareRootSampler(_ClassSampler):
    r"""Indices of examples, ``p(class c) = sqrt(n_c) / sum_c sqrt(n_c)``: square-root sampling.

    Source: Kang et al., ICLR 2020, equation 1 with q = 1/2; after Mikolov et al., NeurIPS 2013. Evidence: this
    library's digits, where it gains less than class-balanced sampling.

    Args:
        labels, num_samples, num_replicas, rank, seed, drop_last: as for
            :class:`tgt_fast.long_tail.ClassBalancedSampler`.

    >>> import tgt_fast as tgt
    >>> sampler = tgt.long_tail.SquareRootSampler([0] * 81 + [1] * 9 + [2])
    >>> [round(p, 3) for p in sampler.probabilities.tolist()]
    [0.692, 0.231, 0.077]
    """

    power = 0.5
