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
    replica: int = 0

    def on(self, device: torch.device) -> Key:
        if self.ids.device == device:
            return self
        step = self.step.to(device) if isinstance(self.step, Tensor) else self.step
        return replace(self, seed=self.seed.to(device), ids=self.ids.to(device), step=step)

    def of_replica(self, replica: int) -> Key:
        return replace(self, replica=replica)

    def take(self, rows: Tensor) -> Key:
        return replace(self, ids=self.ids[rows])


def _flatten(key: Key) -> tuple[list[Any], int]:
    return [key.seed, key.ids, key.step], key.replica


def _unflatten(children: Any, replica: int) -> Key:
    seed, ids, step = children
    return Key(seed, ids, step, replica)


pytree.register_pytree_node(Key, _flatten, _unflatten, serialized_type_name="tgt_fast.Key")
