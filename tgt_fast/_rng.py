"""The states of the process-wide random number generators: torch (CPU and CUDA), numpy and Python."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def get_rng_state(*, cuda: bool = True) -> dict[str, Any]:
    """Every global generator's state, as tensors, numbers and tuples (what a checkpoint takes).

    Those of the GPUs only with ``cuda``: while a CUDA graph is captured they cannot be read.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    numpy_state = np.random.get_state(legacy=False)
    if isinstance(numpy_state, dict) and numpy_state["bit_generator"] == "MT19937":
        inner = numpy_state["state"]
        state["numpy"] = {
            "key": torch.from_numpy(inner["key"].astype(np.int64)),
            "pos": int(inner["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        }
    if cuda and torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = list(torch.cuda.get_rng_state_all())
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`get_rng_state` gave. CUDA states beyond the GPUs of this machine are ignored."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "numpy" in state:
        inner = state["numpy"]
        key = inner["key"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, inner["pos"], inner["has_gauss"], inner["gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, device)


@contextmanager
def isolated_rng(seed: int | None = None, *, cuda: bool = True) -> Iterator[None]:
    """Leave the global generators as they were before the block; with a seed, the block starts from that seed."""
    before = get_rng_state(cuda=cuda)
    try:
        try:
            if seed is not None:
                torch.manual_seed(seed)
                np.random.seed(seed % 2**32)
                random.seed(seed)
            yield
        finally:
            set_rng_state(before)
    except BaseException:  # perhaps an interruption of set_rng_state()
        set_rng_state(before)
        raise
