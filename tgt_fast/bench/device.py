"""Which device is measured."""

from __future__ import annotations

import torch

from tgt_fast.errors import DeviceError


def chosen_device(name: str) -> torch.device:
    """``"auto"`` (a GPU where there is one), ``"cpu"`` or ``"cuda"``.

    Raises:
        DeviceError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            built = "for the CPU" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
            raise DeviceError(f"--device cuda: no GPU here (torch {torch.__version__} was built {built})")
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)
