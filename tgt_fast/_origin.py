"""Whose code something is: PyTorch's and Python's, that of an installed package, or the user's."""

from __future__ import annotations

import sys
from pathlib import PurePath
from typing import Final

_INSTALLED: Final = frozenset({"site-packages", "dist-packages"})


def top_of(module: str | None) -> str:
    return (module or "").partition(".")[0]


def is_given(module: str | None) -> bool:
    """True if code belongs to PyTorch or the standard library."""
    top = top_of(module)
    return top != "__main__" and (top == "torch" or top in sys.stdlib_module_names)


def is_installed(file: str) -> bool:
    """True if a file lies where packages are installed."""
    return not _INSTALLED.isdisjoint(PurePath(file).parts)
