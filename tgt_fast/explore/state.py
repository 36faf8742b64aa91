"""A sampler's saved state, checked before anything of it is taken over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.errors import CheckpointError
from tgt_fast.explore.anchors import AnchorPool
from tgt_fast.explore.bank import LatentBank
from tgt_fast.explore.options import NAMED, SamplerOptions
from tgt_fast.teacher import Latents

_COUNTERS: Final = ("seed", "step", "next_id")
_BANK: Final = ("bank_chains", "bank_latents", "bank_mask", "bank_source", "bank_anchors")
_WAITING: Final = tuple(name.replace("bank", "waiting") for name in _BANK)
_PLACE: Final = ("rank", "world_size")
_POOL: Final = ("pool_latents", "pool_mask", "pool_source", "pool_labels", "pool_ids")


@dataclass(frozen=True)
class SamplerState:
    seed: Tensor
    step: Tensor
    next_id: Tensor
    stride: int
    scale: Tensor | None
    bank: LatentBank
    place: tuple[int, int] | None  # the rank whose chains these are, and of how many; None: it was not saved
    pool: AnchorPool | None


def checked_state(state: Any, options: SamplerOptions) -> SamplerState:
    """The parts of a ``LatentSampler.state_dict()``, for a sampler with these options.

    Raises:
        CheckpointError: what is wrong, and where.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"LatentSampler: a state is a dict, got {type(state).__name__}")
    _check_names(state, options)
    mine = options.fingerprint()
    placed = [name for name in _PLACE if name in state]
    for name in ("version", "stride", *placed, *mine):
        if isinstance(state[name], bool) or not isinstance(state[name], int) or state[name] < 0:
            raise CheckpointError(f"LatentSampler: {name} must be a non-negative integer, got {state[name]!r}")
    if state["version"] != 1:
        raise CheckpointError(f"LatentSampler: this state has format {state['version']}, this release reads format 1")
    differing = [
        f"{name}={_shown(name, state[name])}, here {_shown(name, value)}"
        for name, value in mine.items()
        if state[name] != value
    ]
    if differing:
        raise CheckpointError(f"LatentSampler: the state is of a sampler with {'; '.join(differing)}")
    for name in _COUNTERS:
        value = _tensor(state, name)
        if value.ndim or value.dtype != torch.int64:
            raise CheckpointError(
                f"LatentSampler: {name} must be a 0-d int64 tensor, got {value.dtype} {tuple(value.shape)}"
            )
    scale = None
    if "scale" in state:
        scale = _tensor(state, "scale").clone()
        if not scale.is_floating_point() or not bool((scale.isfinite() & (scale >= 0)).all()):
            raise CheckpointError("LatentSampler: scale must hold finite standard deviations >= 0")
    bank = LatentBank(options.bank_size)
    bank.load_state_dict({name: _tensor(state, name) for name in (*_BANK, *_WAITING) if name in state})
    seed, step, next_id = (state[name].clone() for name in _COUNTERS)
    place = (state["rank"], state["world_size"]) if placed else None
    return SamplerState(seed, step, next_id, state["stride"], scale, bank, place, _pool(state))


def _shown(name: str, saved: int) -> str:
    names = NAMED.get(name)
    return repr(names[saved]) if names is not None and saved < len(names) else str(saved)


def _check_names(state: dict[str, Any], options: SamplerOptions) -> None:
    needed = {"version", "stride", *options.fingerprint(), *_COUNTERS}
    allowed = needed | {"scale"}
    has_pool = any(name in state for name in _POOL)
    if options.mode == "persistent":
        allowed |= {*_BANK, *_WAITING, *_PLACE}
        if any(name in state for name in _PLACE):
            needed |= set(_PLACE)
        for kind, names in (("bank", _BANK), ("waiting", _WAITING)):
            if any(name in state for name in names):
                needed |= {f"{kind}_chains", f"{kind}_latents"}
                needed |= {f"{kind}_anchors"} if options.radius is not None else set()
    if options.pooled:
        allowed |= set(_POOL)
        if has_pool:
            needed |= {"pool_latents", "pool_labels"}
    missing, foreign = sorted(needed - state.keys()), sorted(map(str, state.keys() - allowed))
    if missing or foreign:
        raise CheckpointError(
            f"LatentSampler: not the state of a sampler with mode={options.mode!r} and "
            f"anchors={options.anchors!r}: missing {missing}, foreign {foreign}"
        )


def _pool(state: dict[str, Any]) -> AnchorPool | None:
    if "pool_latents" not in state:
        return None
    z, labels = _tensor(state, "pool_latents"), _tensor(state, "pool_labels")
    if labels.dtype != torch.int64 or labels.shape != z.shape[:1] or not labels.numel():
        found = f"{labels.dtype} {tuple(labels.shape)}"
        raise CheckpointError(f"LatentSampler: pool_labels {found} do not fit latents {tuple(z.shape)}")
    optional = ("pool_mask", "pool_source", "pool_ids")
    mask, source, ids = (_tensor(state, name) if name in state else None for name in optional)
    if ids is not None and (ids.dtype != torch.int64 or ids.shape != labels.shape):
        raise CheckpointError(f"LatentSampler: pool_ids {ids.dtype} {tuple(ids.shape)} are not one a pooled latent")
    latents = Latents(z, mask, source)
    try:
        latents.check(z.shape[0], "pool")
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"LatentSampler: {error}") from error
    return AnchorPool(latents, labels, ids)


def _tensor(state: dict[str, Any], name: str) -> Tensor:
    value = state[name]
    if not isinstance(value, Tensor):
        raise CheckpointError(f"LatentSampler: {name} must be a tensor, got {type(value).__name__}")
    return value
