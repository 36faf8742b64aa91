"""The latents of persistent exploration: where each training example's chain stands."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, CheckpointError, ShapeError
from tgt_fast.teacher import Latents, tree

_ID_BITS = 48


def chain_key(sample_id: int, replica: int) -> int:
    """One int64 for a chain: an example has one a replica. From replica 2^15 on it is negative."""
    key = sample_id | replica << _ID_BITS
    return key - (1 << 64) if key >> 63 else key


class LatentBank:
    """At most ``size`` latents, found by chain; the least recently visited goes first.

    The bank belongs to its process and shares nothing: an id that moves to another process (another rank)
    starts there anew from Enc(x) + noise, and so does one that was evicted. Look-ups happen on the host; the
    latents stay on their device, in one tensor that grows by doubling, so that a visit is a gather and a move
    a scatter. Latents with a mask may be of unequal length: they are kept, and come back, padded to the
    longest seen.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._slots: OrderedDict[int, int] = OrderedDict()  # chain -> row of the store; the longest unvisited first
        self._visits: dict[int, int] = {}  # chain -> its last visit, to tell a late move from a current one
        self._visit = 0
        self._store: Latents | None = None  # [capacity, ...]
        self._anchors: Tensor | None = None  # [capacity, ...], where a trust region needs them

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, chain: int) -> bool:
        return chain in self._slots

    def get(self, chains: list[int]) -> tuple[Latents, Tensor | None]:
        """The latents of known chains, and their anchors where the bank keeps them."""
        if self._store is None:
            raise KeyError(chains)
        rows = torch.tensor([self._slots[chain] for chain in chains], device=self._store.z.device)
        return tree.take(self._store, rows), None if self._anchors is None else self._anchors[rows]

    def visit(self, chains: list[int], latents: Latents, anchors: Tensor | None) -> int:
        """Store where these chains stand; returns the number of the visit, for :meth:`move`.

        Raises:
            ArgumentError: a chain twice, or more chains than the bank holds.
            ShapeError: latents of another shape than the bank's, without a mask that could explain it.
        """
        self._check(chains)
        new = [chain for chain in chains if chain not in self._slots]
        self._reserve(min(self.size, len(self._slots) + len(new)), latents, anchors)
        self._visit += 1
        for chain in chains:
            self._visits[chain] = self._visit
            if chain in self._slots:
                self._slots.move_to_end(chain)
        # Those evicted are never of this batch, which now stands at the end. Their rows are all taken over by
        # new chains, so that rows 0 .. len - 1 are the ones in use.
        evicted = [self._slots.popitem(last=False) for _ in range(len(self._slots) + len(new) - self.size)]
        for chain, _ in evicted:
            del self._visits[chain]
        free = [row for _, row in evicted]
        for chain in new:
            self._slots[chain] = free.pop() if free else len(self._slots)
        self._write(chains, latents, anchors)
        return self._visit

    def move(self, visit: int, chains: list[int], latents: Latents) -> None:
        """New places for the chains of a visit, except those evicted, or visited again, since then."""
        current = [row for row, chain in enumerate(chains) if self._visits.get(chain) == visit]
        if len(current) < len(chains):
            latents = tree.take(latents, torch.tensor(current, dtype=torch.int64, device="cpu"))
        self._write([chains[row] for row in current], latents, None)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only, the longest unvisited chain first; empty for an empty bank."""
        if self._store is None or not self._slots:
            return {}
        latents, anchors = self.get(list(self._slots))
        state = {"bank_chains": torch.tensor(list(self._slots), device="cpu"), "bank_latents": latents.z}
        if latents.mask is not None:
            state["bank_mask"] = latents.mask
        if latents.source is not None:
            state["bank_source"] = latents.source
        if anchors is not None:
            state["bank_anchors"] = anchors
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the contents. A bank that is smaller than the saved one keeps the most recently visited.

        Raises:
            CheckpointError: tensors that do not fit together.
        """
        fresh = LatentBank(self.size)
        if state:
            chains, z = state["bank_chains"], state["bank_latents"]
            count = chains.shape[0] if chains.ndim == 1 else -1
            sized = all(tensor.ndim > 0 and tensor.shape[0] == count for tensor in state.values())
            anchors = state.get("bank_anchors")
            if not sized or chains.dtype != torch.int64 or (anchors is not None and anchors.shape != z.shape):
                shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
                raise CheckpointError(f"LatentSampler: the bank's tensors do not fit together: {shapes}")
            kept = slice(max(0, count - self.size), None)
            mask, source = (state[n][kept].clone() if n in state else None for n in ("bank_mask", "bank_source"))
            latents = Latents(z[kept].clone(), mask, source)
            try:
                latents.check(latents.z.shape[0], "bank")
                fresh.visit(chains[kept].tolist(), latents, None if anchors is None else anchors[kept].clone())
            except (ArgumentError, ShapeError, TypeError) as error:
                raise CheckpointError(f"LatentSampler: {error}") from error
        self.__dict__.update(fresh.__dict__)

    def _check(self, chains: list[int]) -> None:
        if len(set(chains)) < len(chains):
            twice = next(chain for chain in chains if chains.count(chain) > 1) & ((1 << _ID_BITS) - 1)
            raise ArgumentError(
                f"LatentSampler: sample id {twice} occurs twice in one batch as the same copy, but persistent mode "
                'keeps one chain a copy; use repeats="distinct", or draw batches without replacement'
            )
        if len(chains) > self.size:
            raise ArgumentError(f"LatentSampler: one call visits {len(chains)} chains, but bank_size is {self.size}")

    def _reserve(self, needed: int, latents: Latents, anchors: Tensor | None) -> None:
        """Room for ``needed`` chains, at the latents' length and on their device."""
        store = self._store
        if store is None:
            store = tree.take(latents, torch.zeros(0, dtype=torch.int64, device="cpu"))
            self._anchors = None if anchors is None else anchors[:0]
        store, old = _moved(store, latents.z.device), self._anchors
        carries = [(x.mask is None, x.source is None) for x in (store, latents)]
        if len(store.z.shape) != len(latents.z.shape) or carries[0] != carries[1]:
            have, given = tuple(store.z.shape[1:]), tuple(latents.z.shape[1:])
            raise ShapeError(f"LatentSampler: latents of shape {given} do not fit a bank of shape {have}")
        shape = tuple(max(a, b) for a, b in zip(store.z.shape[1:], latents.z.shape[1:], strict=True))
        if old is not None:
            old = replace(store, z=old.to(latents.z.device)).padded_to(shape).z
        store = store.padded_to(shape)
        capacity = store.z.shape[0]
        if needed > capacity:
            more = min(self.size, max(needed, 2 * capacity)) - capacity
            store = tree.map_batched(lambda t: torch.cat([t, t.new_zeros(more, *t.shape[1:])]), store)
            old = None if old is None else torch.cat([old, old.new_zeros(more, *old.shape[1:])])
        self._store, self._anchors = store, old

    def _write(self, chains: list[int], latents: Latents, anchors: Tensor | None) -> None:
        if self._store is None or not chains:
            return
        store = self._store
        rows = torch.tensor([self._slots[chain] for chain in chains], device=store.z.device)
        shape = tuple(store.z.shape[1:])
        padded = latents.padded_to(shape)
        store.z[rows] = padded.z.detach().to(store.z)
        if store.mask is not None and padded.mask is not None:
            store.mask[rows] = padded.mask.to(store.mask)
        if store.source is not None and padded.source is not None:
            store.source[rows] = padded.source.to(store.source)
        if self._anchors is not None and anchors is not None:
            self._anchors[rows] = replace(latents, z=anchors).padded_to(shape).z.to(store.z)


def _moved(latents: Latents, device: torch.device) -> Latents:
    return latents if latents.z.device == device else tree.map_batched(lambda t: t.to(device), latents)
