"""Weights under the names that a model has by itself, whichever parts of it ``torch.compile`` wraps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

from torch import nn

T = TypeVar("T")

_INNER: Final = "_orig_mod"  # what torch.compile keeps a module as, and puts into the names below it


def own_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _INNER)


def under_own_names(state: Mapping[str, T]) -> dict[str, T]:
    return {own_name(name): value for name, value in state.items()}


def under_names_of(here: Iterable[str], state: Mapping[str, T]) -> dict[str, T]:
    """The same under the names ``here``, of the same model compiled or not; others stay as they are."""
    known = {own_name(name): name for name in here}
    return {known.get(own_name(name), name): value for name, value in state.items()}


def take_own_names(model: nn.Module) -> None:
    """``load_state_dict`` of the compiled modules in ``model`` takes a model's own names from now on, too."""
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks.values()
        if _INNER in module._modules and not any(getattr(hook, "hook", hook) is _rename for hook in hooks):
            module._register_load_state_dict_pre_hook(_rename)  # type: ignore[no-untyped-call]


def _rename(state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in list(state):
        if name.startswith(prefix) and not name.startswith(f"{prefix}{_INNER}."):
            state[f"{prefix}{_INNER}.{name.removeprefix(prefix)}"] = state.pop(name)
