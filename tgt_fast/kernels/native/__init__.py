"""The compiled core: C++ on a CPU, CUDA on a device.

The core is loaded when it is first needed, never at import. A core that fails to load is remembered with its reason.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tgt_fast._forks import forked
from tgt_fast.errors import BackendError
from tgt_fast.kernels.plain import not_plain

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/common/dtype.h


@functools.cache
def load() -> ModuleType | str:
    """The core, or the reason why it does not load."""
    try:
        module = importlib.import_module("tgt_fast._core")
    except ImportError as error:
        return f"tgt_fast._core does not load ({error}); reinstall tgt-fast with a C++17 compiler present"
    if forked():  # the core watches too, but only once it is loaded
        module.avoid_openmp()
    return module


def core() -> Any:
    """The core. Raises BackendError with the reason when it cannot be loaded."""
    module = load()
    if isinstance(module, str):
        raise BackendError(module)
    return module


def release_buffers() -> int:
    """Give the memory of past gradients, which is kept for those to come, back to the system.

    Returns:
        How many bytes that was: at most two large gradients' worth.
    """
    module = load()
    return 0 if isinstance(module, str) else int(module.release_buffers())


def refusal(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why the core cannot run ``op`` on ``tensors``; None when it can."""
    module = load()
    if isinstance(module, str):
        return module
    reason = not_plain(tensors)
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor.is_cpu:
            continue
        if tensor.is_cuda:
            from tgt_fast.kernels.native import cuda

            if op == "soft_embedding":
                return "the core has no CUDA kernel for soft_embedding, which Triton fuses with its matrix product"
            if op == "listwise":
                return "the core has no CUDA kernel for the listwise loss, which Triton has"
            reason = cuda.refusal(tensor.device)
            if reason is not None:
                return reason
        else:
            return f"the core serves CPU and CUDA tensors, these are on {tensor.device}"
    return None


def status() -> tuple[bool, str, tuple[str, ...], str]:
    """(available, reason, devices, detail) for ``tgt_fast.backends()``."""
    from tgt_fast.kernels.native import cuda

    module = load()
    if isinstance(module, str):
        return False, module, (), ""
    info = module.build_info()
    built = f"CUDA {info['cuda']} for {info['cuda_architectures']}" if info["cuda"] else "CUDA off"
    detail = f"{info['compiler']}, {built}, running {info['isa']} of {', '.join(info['isas'])}"
    problem = cuda.status()
    if problem and info["cuda"]:
        detail += f"; no CUDA device: {problem}"
    return True, "", ("cpu",) if problem else ("cpu", "cuda"), detail
