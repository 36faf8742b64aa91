"""Persistent exploration: one chain of latents a training example, moved by the user's own backward pass.

A backward pass that does not ask for the latents' gradient, as ``torch.autograd.grad(loss, student.parameters())`` and
``loss.backward(inputs=...)``, moves no chain, and nothing can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tgt_fast._ranges import named_range
from tgt_fast.explore.bank import LatentBank, chain_key
from tgt_fast.explore.draws import philox_words, with_noise
from tgt_fast.explore.gradient import ascent_step
from tgt_fast.explore.options import SamplerOptions
from tgt_fast.kernels.options import OP_RESTART
from tgt_fast.teacher import Latents, Teacher, tree
from tgt_fast.teacher.key import Key

_CPU = torch.device("cpu")


def chain_latents(
    teacher: Teacher,
    bank: LatentBank,
    x: Any,
    key: Key,
    scale_of: Callable[[Latents], Tensor | None],
    options: SamplerOptions,
    encodings: Latents | None = None,
) -> Latents:
    """Positions of these examples' chains, as a leaf that requires grad, [replicas * B, ...].

    A chain that is unknown, and any with probability ``restart_probability``, (re)starts at Enc(x) + noise;
    only those examples are encoded, where their ``encodings`` are not given. The gradient that a later backward
    brings to the leaf moves the bank.
    """
    count = key.ids.shape[0]
    if not count:
        nothing = teacher.encode(x) if encodings is None else encodings
        return replace(nothing, z=nothing.z.requires_grad_())
    host = key.on(_CPU)
    keys = [host.of_replica(replica) for replica in range(options.most_replicas)]
    by_replica = [_chains_of(k) for k in keys]
    chains = [chain for some in by_replica for chain in some]
    bank.take_in(chains)
    bank.watch.begun([chain for chain in chains if chain not in bank])
    fresh = torch.stack([_starts_anew(bank, k, c, options) for k, c in zip(keys, by_replica, strict=True)])  # [m, B]
    encoded: Latents | None = None
    places = torch.cumsum(fresh.any(0), 0) - 1  # [B], an example's row among the encoded ones
    if fresh.any():
        every, rows_of_fresh = bool(fresh.any(0).all()), fresh.any(0).nonzero().flatten()
        if encodings is None:
            encoded = teacher.encode(x if every else tree.take(x, rows_of_fresh))
        else:
            encoded = encodings if every else tree.take(encodings, rows_of_fresh)

    where: list[Latents] = []  # pieces of the batch, and beside them their anchors and their rows in it
    anchors: list[Latents] = []
    rows: list[Tensor] = []
    known = (~fresh).flatten().nonzero().flatten()
    if known.numel():
        stored, stored_anchors = bank.get([chains[row] for row in known.tolist()])
        where.append(stored)
        anchors.append(stored if stored_anchors is None else replace(stored, z=stored_anchors))
        rows.append(known)
    scale = scale_of(where[0] if encoded is None else encoded)
    if encoded is not None:
        for replica in range(options.most_replicas):
            chosen = fresh[replica].nonzero().flatten()
            if not chosen.numel():
                continue
            anchors.append(tree.take(encoded, places[chosen]))
            where.append(with_noise(anchors[-1], scale, keys[replica].take(chosen), options, op="restart"))
            rows.append(chosen + replica * count)

    order = torch.argsort(torch.cat(rows))
    start = _in_order(where, order)
    anchor = None if options.radius is None else _in_order(anchors, order)
    visit = bank.visit(chains, start, None if anchor is None else anchor.z)
    seen: list[Tensor] = []

    def move(d_z: Tensor) -> None:
        # Summed over backward passes of one graph, so that a loss backpropagated in parts moves as if in one.
        seen[:] = [d_z if not seen else seen[0] + d_z]
        with named_range("ascend"):
            bank.move(visit, chains, _moved(start, seen[0], anchor, scale, key, options))

    # The hook holds `start`, not the leaf that holds the hook: no cycle keeps the batch alive.
    leaf = start.z.detach().requires_grad_()
    leaf.register_hook(move)  # type: ignore[no-untyped-call]
    return replace(start, z=leaf)


def _chains_of(key: Key) -> list[int]:
    """The chain of each row of a key on the host."""
    replicas = key.replica.tolist() if isinstance(key.replica, Tensor) else [key.replica] * key.ids.shape[0]
    return [chain_key(*pair) for pair in zip(key.ids.tolist(), replicas, strict=True)]


def _starts_anew(bank: LatentBank, key: Key, chains: list[int], options: SamplerOptions) -> Tensor:
    """True if each chain starts from its example, bool [B]; decided by sample id, step and replica alone."""
    # Against an integer: as float32 the largest words would round up to 2^32.
    coin = philox_words(key, OP_RESTART)[0] < round(options.restart_probability * 2**32)
    unknown = [chain not in bank for chain in chains]
    return coin | torch.tensor(unknown, dtype=torch.bool, device=coin.device)


def _in_order(parts: list[Latents], order: Tensor) -> Latents:
    """The pieces, padded to the longest of them, put together in batch order."""
    if len(parts) > 1:
        longest = tuple(max(sizes) for sizes in zip(*(part.z.shape[1:] for part in parts), strict=True))
        parts = [part.padded_to(longest) for part in parts]
    return tree.take(tree.concat(parts), order)


def _moved(
    start: Latents,
    slope: Tensor,
    anchors: Latents | None,
    scale: Tensor | None,
    key: Key,
    options: SamplerOptions,
) -> Latents:
    """One normalised step from where the visit began; replica by replica, as the noise is keyed by it."""
    count = key.ids.shape[0]
    parts = []
    for replica in range(options.most_replicas):
        rows = torch.arange(replica * count, (replica + 1) * count, device="cpu")
        anchor = None if anchors is None else tree.take(anchors, rows)
        mine = tree.take(start, rows)
        parts.append(ascent_step(mine, tree.take(slope, rows), anchor, scale, key.of_replica(replica), options))
    return tree.concat(parts)
