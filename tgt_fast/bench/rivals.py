"""Whom we are measured against, and why one is left out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, Final

import torch

EAGER: Final = "eager"
COMPILE: Final = "compile"
# Name -> (what to install, what to import). Their kernels are Triton's and CuTe's: they need a GPU.
PACKAGES: Final[dict[str, tuple[str, str]]] = {
    "liger": ("liger-kernel", "liger_kernel"),
    "orda": ("orda-kernel", "orda_kernel"),
    "quack": ("quack-kernels", "quack"),
    "cce": ("cut-cross-entropy", "cut_cross_entropy"),
}
ALL: Final = (EAGER, COMPILE, *PACKAGES)


def absence(name: str, device: torch.device) -> str | None:
    """Why a rival cannot run at all on this device; None when it can."""
    if name not in PACKAGES:
        return None
    package, module = PACKAGES[name]
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed"
    return None if device.type == "cuda" else f"{package} needs a GPU"


def version(name: str) -> str | None:
    """Of an installed rival."""
    try:
        return importlib.metadata.version(PACKAGES[name][0])
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for one shape. Earlier ones are forgotten: beyond a limit it would run eagerly, unasked."""
    torch.compiler.reset()
    made: Callable[..., Any] = torch.compile(function, dynamic=False, fullgraph=True)
    return made
