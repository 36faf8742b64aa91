"""Weights under the names that a model has by itself, whichever parts of it ``torch.compile`` wraps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

from torch import nn

from tgt_fast.train.parallel import Replicated

T = TypeVar("T")

_INNER: Final = "_orig_mod"  # what torch.compile keeps a module as, and puts into the names below it
_PARALLEL: Final = "module"  # and DistributedDataParallel


def own_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _INNER)


def under_own_names(state: Mapping[str, T]) -> dict[str, T]:
    return {own_name(name): value for name, value in state.items()}


def under_names_of(here: Iterable[str], state: Mapping[str, T]) -> dict[str, T]:
    """The same under the names ``here``, of the same model compiled or not; others stay as they are."""
    known = {own_name(name): name for name in here}
    return {known.get(own_name(name), name): value for name, value in state.items()}


def take_own_names(model: nn.Module) -> None:
    """``load_state_dict`` of what wraps ``model``, or modules in it, takes a model's own names from now on, too."""
    for module in model.modules():
        hooks = [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]
        for inner, rename in ((_INNER, _rename_compiled), (_PARALLEL, _rename_parallel)):
            wraps = isinstance(module, Replicated) if inner == _PARALLEL else inner in module._modules
            if wraps and rename not in hooks:
                module._register_load_state_dict_pre_hook(rename)  # type: ignore[no-untyped-call]


def _rename_compiled(state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, prefix, _INNER)


def _rename_parallel(state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, prefix, _PARALLEL)


def _rename(state: dict[str, Any], prefix: str, inner: str) -> None:
    for name in list(state):
        if name.startswith(prefix) and not name.startswith(f"{prefix}{inner}."):
            state[f"{prefix}{inner}.{name.removeprefix(prefix)}"] = state.pop(name)
