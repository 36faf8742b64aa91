"""Packages that only some users need: imported where they are used, and missed by name."""

from __future__ import annotations

import importlib
from typing import Any

from tgt_fast.errors import DependencyError


def optional(module: str, extra: str, who: str) -> Any:
    """The module, imported.

    Raises:
        DependencyError: it is not installed, or cannot be imported; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DependencyError(f"{who} needs {package}: pip install 'tgt-fast[{extra}]' ({error})") from error
