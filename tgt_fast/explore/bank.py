"""The latents of persistent exploration: where each training example's chain stands."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, CheckpointError, ShapeError
from tgt_fast.explore.processes import ChainWatch
from tgt_fast.teacher import Latents, tree

_ID_BITS = 48


def chain_key(sample_id: int, replica: int) -> int:
    """One int64 for a chain: an example has one a replica. From replica 2^15 on it is negative."""
    key = sample_id | replica << _ID_BITS
    return key - (1 << 64) if key >> 63 else key


class LatentBank:
    """At most ``size`` latents, found by chain; the least recently visited goes first.

    The bank belongs to its process and shares nothing: an id that moves to another process (another rank)
    starts there anew from Enc(x) + noise, and so does one that was evicted. A loaded state may hold chains of all
    processes: those wait, beyond ``size``, until their id is met here. Look-ups happen on the host; the
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
        self._waiting: dict[int, int] = {}  # chain -> row of what was loaded for whichever process meets its id
        self._waiting_store: tuple[Latents, Tensor | None] | None = None
        self.watch = ChainWatch()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, chain: int) -> bool:
        return chain in self._slots

    def take_in(self, chains: list[int]) -> None:
        """Make those of these chains that wait to be met ones of the bank."""
        met = [chain for chain in chains if chain in self._waiting]
        if not met or self._waiting_store is None:
            return
        rows = [self._waiting.pop(chain) for chain in met]
        new = [(chain, row) for chain, row in zip(met, rows, strict=True) if chain not in self._slots]
        if new:
            latents, anchors = self._waiting_store
            where = torch.tensor([row for _, row in new], device=latents.z.device)
            self.visit([chain for chain, _ in new], tree.take(latents, where), _taken(anchors, where))
            self._visit -= 1  # it was no visit of an example
        if not self._waiting:
            self._waiting_store = None

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
        return {**self._state_of("bank"), **self._state_of("waiting")}

    def everything(self) -> dict[str, Tensor]:
        """All chains as waiting ones, on the CPU, with ``visits``, [chains]: the last visit of each, 0 if it waits."""
        waiting, own = (
            {name.removeprefix(kind): value.cpu() for name, value in self._state_of(kind).items()}
            for kind in ("waiting", "bank")
        )
        state = joined([part for part in (waiting, own) if part])
        if state:
            visits = [0] * len(self._waiting) + [self._visits[chain] for chain in self._slots]
            state["visits"] = torch.tensor(visits, device="cpu")
        return state

    def _state_of(self, kind: str) -> dict[str, Tensor]:
        if kind == "bank":
            if self._store is None or not self._slots:
                return {}
            chains = list(self._slots)
            latents, anchors = self.get(chains)
        else:
            if self._waiting_store is None:
                return {}
            chains = list(self._waiting)
            latents, anchors = self._waiting_store
            rows = torch.tensor(list(self._waiting.values()), device=latents.z.device)
            latents, anchors = tree.take(latents, rows), _taken(anchors, rows)
        state = {f"{kind}_chains": torch.tensor(chains, device="cpu"), f"{kind}_latents": latents.z}
        optional = {"mask": latents.mask, "source": latents.source, "anchors": anchors}
        return state | {f"{kind}_{name}": tensor for name, tensor in optional.items() if tensor is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the contents. A bank that is smaller than the saved one keeps the most recently visited.

        Raises:
            CheckpointError: tensors that do not fit together.
        """
        fresh = LatentBank(self.size)
        own = {name: value for name, value in state.items() if name.startswith("bank_")}
        if own:
            chains, latents, anchors = _read(own, "bank", self.size)
            try:
                fresh.visit(chains, latents, anchors)
            except (ArgumentError, ShapeError, TypeError) as error:
                raise CheckpointError(f"LatentSampler: {error}") from error
        if len(own) < len(state):
            chains, latents, anchors = _read({n: v for n, v in state.items() if n not in own}, "waiting", None)
            fresh._waiting = {chain: row for row, chain in enumerate(chains)}
            fresh._waiting_store = latents, anchors
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


def _read(state: dict[str, Tensor], kind: str, most: int | None) -> tuple[list[int], Latents, Tensor | None]:
    """Chains, latents and anchors of one kind, the last so many; checked."""
    chains, z, anchors = state[f"{kind}_chains"], state[f"{kind}_latents"], state.get(f"{kind}_anchors")
    count = chains.shape[0] if chains.ndim == 1 else -1
    sized = all(tensor.ndim > 0 and tensor.shape[0] == count for tensor in state.values())
    if not sized or chains.dtype != torch.int64 or (anchors is not None and anchors.shape != z.shape):
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        raise CheckpointError(f"LatentSampler: the bank's tensors do not fit together: {shapes}")
    kept = slice(0 if most is None else max(0, count - most), None)
    mask, source = (state[n][kept].clone() if n in state else None for n in (f"{kind}_mask", f"{kind}_source"))
    latents = Latents(z[kept].clone(), mask, source)
    try:
        latents.check(latents.z.shape[0], "bank")
    except (ShapeError, TypeError) as error:
        raise CheckpointError(f"LatentSampler: {error}") from error
    return chains[kept].tolist(), latents, None if anchors is None else anchors[kept].clone()


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """States of chains after another, as waiting ones; latents of unequal length are padded to the longest."""
    if len(parts) < 2:
        return {f"waiting_{name.removeprefix('_')}": value for part in parts for name, value in part.items()}
    found = [Latents(part["_latents"], part.get("_mask"), part.get("_source")) for part in parts]
    shape = tuple(max(sizes) for sizes in zip(*(one.z.shape[1:] for one in found), strict=True))
    padded = [one.padded_to(shape) for one in found]
    state = {"waiting_chains": torch.cat([part["_chains"] for part in parts])}
    for name, tensors in (
        ("latents", [one.z for one in padded]),
        ("mask", [one.mask for one in padded]),
        ("source", [one.source for one in padded]),
        ("anchors", [
            replace(one, z=part["_anchors"]).padded_to(shape).z if "_anchors" in part else None
            for one, part in zip(found, parts, strict=True)
        ]),
    ):  # fmt: skip
        there = [tensor for tensor in tensors if tensor is not None]
        if there:
            state[f"waiting_{name}"] = torch.cat(there)
    return state


def latest(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The chains that all processes hold, of :meth:`LatentBank.everything`: of each the one that was visited last."""
    states = [state for state in states if state]
    if not states:
        return {}
    visits = torch.cat([state["visits"] for state in states])
    both = joined([
        {name.removeprefix("waiting"): value for name, value in state.items() if name != "visits"} for state in states
    ])  # fmt: skip
    order = torch.argsort(visits, stable=True)
    last = {chain: row for row, chain in zip(order.tolist(), both["waiting_chains"][order].tolist(), strict=True)}
    rows = torch.tensor(sorted(last.values(), key=order.argsort().tolist().__getitem__), device="cpu")
    return {name: value[rows] for name, value in both.items()}


def _taken(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _moved(latents: Latents, device: torch.device) -> Latents:
    return latents if latents.z.device == device else tree.map_batched(lambda t: t.to(device), latents)
