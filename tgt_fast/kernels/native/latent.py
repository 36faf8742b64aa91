"""Perturb and ascend in the compiled core: csrc/cpu/latent.cpp, and csrc/cuda/latent.cu for CUDA tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast._forks import threads
from tgt_fast.kernels.latent_calls import (
    AscendCall,
    LatentCall,
    PerturbCall,
    accumulate_dtype,
    on_device,
    prepared,
    vector,
)
from tgt_fast.kernels.native import DTYPES, core, cuda
from tgt_fast.kernels.native.abi import packer, pointer
from tgt_fast.kernels.options import RADIUS_NORMS, STEP_NORMS
from tgt_fast.kernels.philox import NoiseKey

_UINT64 = (1 << 64) - 1


class _Factor:
    """A number for all samples or one a sample, as the core takes it; keeps the tensor alive for the call."""

    def __init__(self, value: float | Tensor | None, dtype: torch.dtype) -> None:
        self.tensor = vector(value, dtype) if isinstance(value, Tensor) else None
        self.number = float(value) if isinstance(value, (int, float)) else 0.0

    def packed(self) -> tuple[float, int]:
        return self.number, pointer(self.tensor)


def noise_values(key: NoiseKey) -> tuple[Any, ...]:
    """The fields of NoiseKey, whose ids are dense."""
    return (
        int(key.seed) & _UINT64, key.sample_ids.data_ptr(), int(key.step), int(key.replica), key.op,
        key.truncation or 0.0,
    )  # fmt: skip


def run(kernel: str, name: str, at: Tensor, before: tuple[Any, ...], key: NoiseKey, after: tuple[Any, ...]) -> None:
    """Runs a kernel on the device of a tensor; ``before`` and ``after`` are the fields of its struct round the noise.

    Integers of the key that live on the device are left there: their addresses replace them.
    """
    key = key._replace(sample_ids=key.sample_ids.contiguous())
    engine = cuda.engine(at)
    if engine is None:
        compiled = core()
        getattr(compiled, kernel)(packer(compiled, name)(*before, *noise_values(key), *after), threads())
        return
    (seed, seed_at), (step, step_at) = (
        (0, value.data_ptr()) if isinstance(value, Tensor) else (value, 0)
        for value in (on_device(at.device, key.seed), on_device(at.device, key.step))
    )
    values = (*before, *noise_values(key._replace(seed=seed, step=step)), *after)
    with engine.current(at) as stream:
        getattr(engine.core, f"cuda_{kernel}")(packer(engine.core, name)(*values), (seed_at, step_at), stream)


def forward(call: LatentCall, out: Tensor) -> None:
    """The moved latents, in one pass over a sample."""
    if isinstance(call, PerturbCall):
        _perturb(call, out)
    else:
        _ascend(call, out)


def _perturb(call: PerturbCall, out: Tensor) -> None:
    z = call.z.detach().contiguous()
    dtype = accumulate_dtype(z)
    sigma = _Factor(call.sigma, dtype)
    scale = None if call.scale is None else vector(call.scale, dtype)
    given = call.sphere_radius
    radius = -1.0 if given == "keep" else 0.0 if given is None else float(given)
    before = (*z.shape, DTYPES[z.dtype], z.data_ptr(), out.data_ptr(), *sigma.packed(), pointer(scale))
    run("latent_perturb", "PerturbCall", z, before, call.noise, (radius,))


def _ascend(call: AscendCall, out: Tensor) -> None:
    call, dtype = prepared(call)
    z, grad, anchor = call.z, call.grad, call.anchor
    steps, sigmas, radii = (_Factor(value, dtype) for value in (call.step_size, call.sigma, call.radius))
    types = (DTYPES[tensor.dtype] for tensor in (z, grad, z if anchor is None else anchor))
    before = (
        *z.shape, *types, z.data_ptr(), grad.data_ptr(), pointer(anchor), out.data_ptr(), *steps.packed(),
        *sigmas.packed(), *radii.packed(), pointer(call.scale), STEP_NORMS.index(call.norm),
        RADIUS_NORMS.index(call.radius_norm),
    )  # fmt: skip
    run("latent_ascend", "AscendCall", z, before, call.noise, ())
