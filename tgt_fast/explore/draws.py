"""The draws that exploration makes. No global generator is used."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tgt_fast._ranges import named_range
from tgt_fast.explore.by_class import ByClass
from tgt_fast.explore.channels import channel_noise, moved
from tgt_fast.explore.options import SamplerOptions
from tgt_fast.kernels.philox import philox4x32
from tgt_fast.ops.latent import perturb_latents
from tgt_fast.teacher import Latents, Teacher, tree
from tgt_fast.teacher.key import Key

# Normals take a sample's counter blocks from 0 upwards, four numbers each: the last is out of their reach.
_LAST_BLOCK = 0xFFFFFFFF
_WORD = 0xFFFFFFFF


def philox_words(key: Key, op: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four independent 32-bit words a sample, each int64 [B] in [0, 2^32), that no normal draw uses."""
    counter = (
        torch.full_like(key.ids, _LAST_BLOCK),
        key.ids & _WORD,
        ((key.ids >> 32) & 0xFFFF) | (key.replica << 16),
        torch.zeros_like(key.ids) | (op << 28) | key.step,
    )
    made = philox4x32(counter, (key.seed & _WORD, (key.seed >> 32) & _WORD))
    return cast("tuple[Tensor, Tensor, Tensor, Tensor]", made)


def with_noise(
    latents: Latents, scale: Tensor | None, key: Key, options: SamplerOptions, *, op: str = "perturb"
) -> Latents:
    """z + sigma * scale * noise at the real positions. scale: broadcastable to z.shape[1:], or None for 1.

    With ``affine`` it is the channels that are moved.
    """
    if options.sigma == 0 and key.sigma is None:
        return latents
    if options.affine:
        with named_range("perturb"):
            return moved(latents, channel_noise(latents, key, options), scale)
    key = key.on(latents.z.device)
    if key.sigma is not None:
        return _with_noise_of_rows(latents, key.sigma, scale, key, options, op)
    assert not isinstance(options.sigma, ByClass)  # which rows with a sigma have
    sigma: Any = options.sigma if scale is None else options.sigma * over_coordinates(scale, latents.z)
    with named_range("perturb"):
        z = perturb_latents(
            latents.z,
            sigma,
            seed=key.seed,
            sample_ids=key.ids,
            step=key.step,
            replica=key.replica,
            truncation=options.truncation,
            op=op,
            backend=options.backend,
        )
    return latents.at_real(z)


def _with_noise_of_rows(
    latents: Latents, sigma: Tensor, scale: Tensor | None, key: Key, options: SamplerOptions, op: str
) -> Latents:
    """The same, where each row has a sigma: the kernel knows one a row or one a coordinate, so noise comes first."""
    exact = torch.promote_types(latents.z.dtype, torch.float32)
    with named_range("perturb"):
        noise = perturb_latents(
            torch.zeros_like(latents.z, dtype=exact),
            1.0 if scale is None else over_coordinates(scale, latents.z).to(exact),
            seed=key.seed, sample_ids=key.ids, step=key.step, replica=key.replica, truncation=options.truncation, op=op,
            backend=options.backend,
        )  # fmt: skip
        z = latents.z + sigma.to(exact).reshape(-1, *(1,) * (latents.z.ndim - 1)) * noise
    return latents.at_real(z.to(latents.z.dtype))


def decoded(teacher: Teacher, latents: Latents, key: Key, replicas: int, *, relaxed: bool = False) -> Any:
    """``Dec(z)`` for latents [replicas * B, ...]; a decoder that draws numbers gets the key of each replica."""
    if not teacher.decoder_takes_key:
        return teacher.decode(latents, relaxed)
    key, count = key.on(latents.z.device), key.ids.shape[0]
    pieces = []
    for replica in range(replicas):
        rows = slice(replica * count, (replica + 1) * count)
        mine = tree.map_batched(lambda leaf, rows=rows: leaf[rows], latents)  # type: ignore[misc]
        pieces.append(teacher.decode(mine, relaxed, key.of_replica(replica)))
    return teacher.join(pieces)


def over_coordinates(scale: Tensor, z: Tensor) -> Tensor:
    """The scale, which may be pooled over positions, as (1,) + one number a coordinate of z."""
    return scale.to(z.device).expand(z.shape[1:]).unsqueeze(0)
