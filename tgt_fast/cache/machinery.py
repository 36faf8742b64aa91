"""The state of an object, and what of it is machinery that no output depends on."""

from __future__ import annotations

import contextvars
import logging
import re
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any, Final

import torch
from torch import nn

_MACHINERY: Final = (
    logging.Logger,
    logging.LoggerAdapter,
    logging.Handler,
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Condition,
    threading.Event,
    threading.Semaphore,
    threading.Thread,
    threading.local,
    weakref.ref,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
    contextvars.ContextVar,
    Executor,
    torch.Stream,
    torch.Event,
)
# Of modules: what is walked otherwise, the mode, and what says where a model came from.
_LEFT_OUT: Final = frozenset(
    {
        "training",
        "_parameters",
        "_buffers",
        "_modules",
        "_non_persistent_buffers_set",
        "_compiled_call_impl",
        "_is_hf_initialized",
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "transformers_version",
    }
)
_CACHE: Final = re.compile(r"(^|_)cache[ds]?$")


def is_machinery(thing: Any) -> bool:
    """Locks, loggers, threads, references that keep nothing alive, handles of a device."""
    return isinstance(thing, _MACHINERY)


def state(thing: Any) -> list[tuple[str, Any]] | None:
    """The attributes of an object, by name, without machinery; None where it hides them."""
    if type(thing).__module__.startswith("torch._dynamo"):  # what it compiles is a module inside it
        return []
    found: dict[str, Any] = {}
    slots = False
    for kind in type(thing).__mro__:
        names = kind.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            if name not in ("__dict__", "__weakref__"):
                slots = True
                mangled = f"_{kind.__name__.lstrip('_')}{name}" if name[:2] == "__" and name[-2:] != "__" else name
                if hasattr(thing, mangled):
                    found[mangled] = getattr(thing, mangled)
    attributes = getattr(thing, "__dict__", None)
    if attributes is None and not slots:
        return None
    found.update(attributes or {})
    kept = [(name, found[name]) for name in sorted(found)]
    return [(name, value) for name, value in kept if not _is_left_out(thing, name, value)]


def _is_left_out(thing: Any, name: str, value: Any) -> bool:
    if "hook" in name and not isinstance(value, (bool, int, float, str)):
        return True
    if name in _LEFT_OUT and (isinstance(thing, nn.Module) or name not in ("training",)):
        return True
    return bool(_CACHE.search(name)) and isinstance(value, (Mapping, list, set))
