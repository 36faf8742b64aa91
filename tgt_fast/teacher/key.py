"""The key of random numbers: what the noise of one call depends on, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class Key:
    """All that the noise of one call depends on. A node of ``torch.utils._pytree``, so that a batch's key is cut into
    pieces with the batch."""

    seed: Tensor  # 0-d int64
    ids: Tensor  # [B] int64
    step: int | Tensor  # 0-d int64 as a tensor
    replica: int | Tensor = 0  # [B] int64 as a tensor, where the rows are not all of one replica
    sigma: Tensor | None = None  # [B] float64, the noise's standard deviation of each row, where it has one of its own

    def on(self, device: torch.device) -> Key:
        if self.ids.device == device:
            return self
        step, replica = (t.to(device) if isinstance(t, Tensor) else t for t in (self.step, self.replica))
        sigma = None if self.sigma is None else self.sigma.to(device)
        return Key(self.seed.to(device), self.ids.to(device), step, replica, sigma)

    def of_replica(self, number: int | Tensor) -> Key:
        """Of a key of each row's first replica, the key of its replica ``number``, counted from 0; one a row."""
        return replace(self, replica=self.replica + number)

    def take(self, rows: Tensor) -> Key:
        replica = self.replica[rows] if isinstance(self.replica, Tensor) else self.replica
        sigma = None if self.sigma is None else self.sigma[rows]
        return replace(self, ids=self.ids[rows], replica=replica, sigma=sigma)

    def by_row(self) -> Key:
        """The same key with a replica for each row, so that keys of several replicas can be put together."""
        if isinstance(self.replica, Tensor):
            return self
        return replace(self, replica=torch.full_like(self.ids, self.replica))


def _flatten(key: Key) -> tuple[list[Any], tuple[int | None, bool]]:
    by_row = [key.replica] if isinstance(key.replica, Tensor) else []
    own = [] if key.sigma is None else [key.sigma]
    replica = None if isinstance(key.replica, Tensor) else key.replica
    return [key.seed, key.ids, key.step, *by_row, *own], (replica, key.sigma is not None)


def _unflatten(children: Any, has: tuple[int | None, bool]) -> Key:
    seed, ids, step, *rest = children
    replica, own = has
    return Key(seed, ids, step, rest[0] if replica is None else replica, rest[-1] if own else None)


pytree.register_pytree_node(Key, _flatten, _unflatten, serialized_type_name="tgt_fast.Key")
