"""The state of an object, and what of it is machinery that no output depends on."""

from __future__ import annotations

import contextvars
import functools
import inspect
import logging
import random
import re
import struct
import sys
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tgt_fast.cache.sources import is_own

_MACHINERY: Final = (
    logging.Logger,
    logging.LoggerAdapter,
    logging.Handler,
    logging.Filter,
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Condition,
    threading.Event,
    threading.Semaphore,
    threading.Thread,
    threading.local,
    weakref.ref,
    weakref.ProxyType,
    weakref.CallableProxyType,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
    weakref.WeakSet,
    weakref.finalize,
    contextvars.ContextVar,
    Executor,
    random.Random,
    np.random.Generator,
    np.random.RandomState,
    torch.Stream,
    torch.Event,
    RemovableHandle,
)
# What every module has: parameters, buffers and modules are walked elsewhere; the rest are hooks and the mode.
_OF_MODULES: Final = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_is_accelerate_prepared"}
# By package and class: where a model or its settings came from, what loading it left behind, who trains it, and what a
# graph or a script is kept as, which is taken in as code.
_PROVENANCE: Final = {
    (
        "transformers",
        "PreTrainedModel",
    ): "_is_hf_initialized _commit_hash name_or_path _weight_conversions _use_kernels",
    ("transformers", "GenerationConfig"): (
        "_commit_hash _from_model_config _original_object_hash transformers_version"
    ),
    ("peft", "PeftConfigMixin"): "auto_mapping base_model_name_or_path inference_mode peft_version revision",
    ("transformers", "PreTrainedConfig"): (
        "_commit_hash _name_or_path architectures dtype model_type transformers_version"
    ),
    ("lightning", "LightningModule"): "_trainer _fabric _device _metric_attributes _param_requires_grad_state",
    ("pytorch_lightning", "LightningModule"): "_trainer _device _metric_attributes _param_requires_grad_state",
    ("torch", "GraphModule"): "_graph _code _lineno_map _prologue_start _tracer_cls _tracer_extras meta shape_env",
    ("torch", "ScriptModule"): "_c _concrete_type _initializing forward",
}
_WRAPPERS: Final = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # what they compute is a module inside them
_POINTER: Final = struct.calcsize("P")
_CONTAINERS: Final = (dict, OrderedDict, defaultdict, list, tuple, set, frozenset, deque)
_CACHE: Final = re.compile(r"(^|_)cache[ds]?$")


def is_machinery(thing: Any) -> bool:
    """Locks, loggers, threads, hooks, random generators, references that keep nothing alive, handles of a device."""
    return (
        isinstance(thing, _MACHINERY)
        or type(thing).__module__ == "accelerate.hooks"
        or any(thing is stream for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__) if stream)
    )


def hides_state(thing: Any) -> bool:
    """True if an object keeps something that is no attribute, in another language."""
    if _is_wrapper(thing):
        return False
    slots = _slots(thing)
    # What it has beside its header, a dict, weak references and slots.
    base = next((kind for kind in type(thing).__mro__ if kind in _CONTAINERS), object)
    hidden = type(thing).__basicsize__ - base.__basicsize__ - _POINTER * (2 + len(slots or ()))
    return (not hasattr(thing, "__dict__") and slots is None) or hidden > 0


def attributes(thing: Any) -> tuple[list[tuple[str, Any]], list[str]]:
    """The attributes of an object by name, without machinery.

    The second part names the attributes of a user's class that are caches by their name and not empty: whether what
    they hold belongs to the state, nobody can tell from outside. Those of installed packages are caches.
    """
    if _is_wrapper(thing):
        return [], []
    found = {name: getattr(thing, name) for name in _slots(thing) or () if hasattr(thing, name)}
    found |= getattr(thing, "__dict__", {})
    if "_hf_hook" in found:  # accelerate moves inputs to where weights are, in a forward around that of the module
        found |= {"forward": found.pop("_old_forward", None)}
        del found["_hf_hook"]
        if getattr(found["forward"], "__func__", None) is getattr(type(thing), "forward", None):
            del found["forward"]
    left_out, own = _left_out(type(thing)), is_own(type(thing).__module__)
    is_settings = ("transformers", "PreTrainedConfig") in _bases(type(thing))
    kept, doubtful = [], []
    for name in sorted(found):
        value = found[name]
        derived = isinstance(inspect.getattr_static(type(thing), name, None), functools.cached_property)
        if name in left_out or derived or is_machinery(value):
            continue
        if not (_CACHE.search(name) and _is_cache(value, own)):
            kept.append((name, _as_saved(value) if is_settings else value))
        elif own and value:
            doubtful.append(name)
    return kept, doubtful


def _is_wrapper(thing: Any) -> bool:
    return isinstance(thing, _WRAPPERS) or type(thing).__module__.startswith("torch._dynamo")


def _is_cache(value: Any, own: bool) -> bool:
    """Of an attribute that is called one."""
    if own:
        return isinstance(value, (Mapping, list, set))
    return not isinstance(value, (type(None), bool, int, float, str, Tensor, np.ndarray))


def _slots(thing: Any) -> list[str] | None:
    """The names of its members; None where its classes have no slots."""
    found: list[str] | None = None
    for kind in type(thing).__mro__:
        if "__slots__" in kind.__dict__:
            members = [n for n, value in kind.__dict__.items() if isinstance(value, types.MemberDescriptorType)]
            found = [*(found or []), *members]
    return found


def _bases(kind: type) -> list[tuple[str, str]]:
    return [(base.__module__.partition(".")[0], base.__name__) for base in kind.__mro__]


def _left_out(kind: type) -> frozenset[str]:
    found = _OF_MODULES if issubclass(kind, nn.Module) else frozenset()
    for base in _bases(kind):
        found |= frozenset(_PROVENANCE.get(base, "").split())
    return found


def entries(mapping: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """Those of a mapping, without what it says of itself."""
    if type(mapping).__module__.partition(".")[0] == "diffusers":  # a configuration; which of it was default, and where
        return [(key, _as_saved(value)) for key, value in mapping.items() if not str(key).startswith("_")]
    return list(mapping.items())


def _as_saved(value: Any) -> Any:
    """A setting as it comes back from a file of settings, in which a tuple is a list."""
    return list(value) if type(value) is tuple else value
