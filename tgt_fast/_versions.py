"""The versions that a result was made with."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata

import numpy as np
import torch

import tgt_fast


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Of this package, Python, PyTorch, NumPy, and of those other ``packages`` that are installed, by their names."""
    others = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            others[name] = metadata.version(name)
    return {
        "tgt-fast": tgt_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **others,
    }
