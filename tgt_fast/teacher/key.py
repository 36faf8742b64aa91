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

    def on(self, device: torch.device) -> Key:
        if self.ids.device == device:
            return self
        step, replica = (t.to(device) if isinstance(t, Tensor) else t for t in (self.step, self.replica))
        return Key(self.seed.to(device), self.ids.to(device), step, replica)

    def of_replica(self, number: int) -> Key:
        """Of a key of each row's first replica, the key of its replica ``number``, counted from 0."""
        return replace(self, replica=self.replica + number)

    def take(self, rows: Tensor) -> Key:
        replica = self.replica[rows] if isinstance(self.replica, Tensor) else self.replica
        return replace(self, ids=self.ids[rows], replica=replica)

    def by_row(self) -> Key:
        """The same key with a replica for each row, so that keys of several replicas can be put together."""
        if isinstance(self.replica, Tensor):
            return self
        return replace(self, replica=torch.full_like(self.ids, self.replica))


def _flatten(key: Key) -> tuple[list[Any], int | None]:
    if isinstance(key.replica, Tensor):
        return [key.seed, key.ids, key.step, key.replica], None
    return [key.seed, key.ids, key.step], key.replica


def _unflatten(children: Any, replica: int | None) -> Key:
    seed, ids, step, *by_row = children
    return Key(seed, ids, step, by_row[0] if replica is None else replica)


pytree.register_pytree_node(Key, _flatten, _unflatten, serialized_type_name="tgt_fast.Key")
