"""Calls of models and what they return, by one rule for teachers, students and caches.

A mapping goes into a model as keywords where the model names its keys. Of what comes out (a tensor, a tuple, a dict, an
output object of transformers or diffusers) the logits, latents or data are taken.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError, DTypeError, ShapeError

LogitsOf: TypeAlias = "str | int | Callable[[Any], Tensor] | None"

# By the names of their classes, as these libraries are not imported for it. A PeftModel's forward names no parameters.
_OF_KEYWORDS: Final = frozenset({"PreTrainedModel", "PeftModel"})
_WRAPPERS: Final = frozenset({"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"})
_NAMED: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_logits_of(op: str, logits_of: Any) -> LogitsOf:
    """
    Raises:
        ArgumentError: it is neither a name nor an index nor a function.
    """
    fits = logits_of is None or isinstance(logits_of, (str, int)) or callable(logits_of)
    if not fits or isinstance(logits_of, bool):
        raise ArgumentError(
            f"{op}: logits_of must be a name, an index or a function of what the model returned, got {logits_of!r:.200}"
        )
    return logits_of  # type: ignore[no-any-return]


def checked_class_dim(op: str, class_dim: Any) -> int:
    """
    Raises:
        ArgumentError: it is no dimension that classes can be in; the first is the batch's.
    """
    if isinstance(class_dim, bool) or not isinstance(class_dim, int) or class_dim == 0:
        raise ArgumentError(f"{op}: class_dim must be a dimension behind the batch, such as 1 or -1, got {class_dim!r}")
    return class_dim


def call(model: Callable[..., Any], x: Any) -> Any:
    """``model(x)``; ``model(**x)`` of a mapping whose keys the model names.

    That is a model of transformers or peft, and any callable of more than one parameter which names every key, or which
    takes any keyword and names one of them at least, or nothing else. A callable of one parameter gets the whole.
    """
    if isinstance(x, Mapping) and x and all(isinstance(key, str) for key in x) and _takes(model, tuple(x)):
        return model(**x)
    return model(x)


def _takes(model: Callable[..., Any], keys: tuple[str, ...]) -> bool:
    bound = 0
    if isinstance(model, functools.partial):
        bound, model = len(model.args), model.func
    if isinstance(model, nn.Module):
        model = _inside(model)
        if any(kind.__name__ in _OF_KEYWORDS for kind in type(model).__mro__):
            return True
        model = model.forward
    try:
        parameters = dict(list(_parameters(model).items())[bound:])
    except (TypeError, ValueError):  # a built-in without a signature
        return False
    named = {name for name, parameter in parameters.items() if parameter.kind in _NAMED}
    known = sum(key in named for key in keys)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return known > 0 or len(parameters) == 1
    return known == len(keys) and len(parameters) > 1


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    # Of a method, those of its function, which stays the same from call to call.
    inner = getattr(function, "__func__", None)
    if torch.compiler.is_compiling():  # which does not look for what is cached
        return inspect.signature(function).parameters
    if inner is None:
        try:
            return _signature(function)
        except TypeError:  # a callable that cannot be hashed
            return inspect.signature(function).parameters
    found = dict(_signature(inner))
    found.pop(next(iter(found), ""), None)
    return found


@functools.lru_cache(maxsize=256)
def _signature(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _inside(module: nn.Module) -> nn.Module:
    """The model that ``torch.compile`` and data parallel wrappers were given."""
    while True:
        inner = module._modules.get("_orig_mod")
        if inner is None and type(module).__name__ in _WRAPPERS:
            inner = getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def logits_in(who: str, made: Any, logits_of: LogitsOf = None, class_dim: int = -1) -> Tensor:
    """The logits in what a model returned, with their classes in the last dimension.

    A tensor is them. Else they are what ``logits_of`` says: a name (an attribute or key), an index (of a tuple, or of
    the values of a mapping), or a function of what was returned; by default what is named ``logits``, or the first
    floating-point tensor of two dimensions at least, which a loss in front of it has not. A function is asked in any
    case: what returns a tensor in eval mode may return more in train mode, and a name or an index serves both.

    Raises:
        DTypeError: there are none.
        ShapeError: they have no dimension ``class_dim``.
    """
    found = _logits_in(who, made, logits_of)
    if class_dim == -1:
        return found
    if not -found.dim() < class_dim < found.dim():
        raise ShapeError(f"{who}: class_dim is {class_dim}, but the logits are {tuple(found.shape)}")
    return found.movedim(class_dim, -1)


def _logits_in(who: str, made: Any, logits_of: LogitsOf) -> Tensor:
    if logits_of is not None and not isinstance(logits_of, (str, int)):
        found = logits_of(made)
    elif isinstance(made, Tensor):
        return made
    else:
        found = _first(made, "logits") if logits_of is None else _at(made, logits_of)
    if not isinstance(found, Tensor):
        raise DTypeError(
            f"{who} must return a tensor of logits, or a tuple, dict or output that holds them, got {_shown(made)}"
            + (
                "; say by logits_of= where they are: a name, an index or a function of what it returned"
                if logits_of is None
                else f", where logits_of={logits_of!r} finds {'nothing' if found is None else type(found).__name__}"
            )
        )
    return found


def latents_in(made: Any) -> Any:
    """The latents in what an encoder returned: of an autoencoder's posterior its mode.

    An output object, and a distribution in it or alone, or in a tuple of one, as diffusers' autoencoders return; what
    is none of these stays as it is.
    """
    if isinstance(made, (tuple, list)) and len(made) == 1 and type(made) in (tuple, list):
        made = made[0]
    if _is_output(made):
        posterior = getattr(made, "latent_dist", None)
        made = _first(made, "latents") if posterior is None else posterior
    if not isinstance(made, (Tensor, Mapping)) and hasattr(made, "sample"):  # a distribution
        mode = getattr(made, "mode", None)
        mode = mode() if callable(mode) else mode
        return mode if isinstance(mode, Tensor) else getattr(made, "mean", made)
    return made


def data_in(made: Any) -> Any:
    """The data in what a decoder returned: of an output object its ``sample``, or its first floating-point tensor."""
    return _first(made, "sample") if _is_output(made) else made


def _is_output(made: Any) -> bool:
    """True if it is an output object of transformers or diffusers, which are dicts with declared fields."""
    return isinstance(made, dict) and dataclasses.is_dataclass(made)


def _first(made: Any, name: str) -> Any:
    named = _at(made, name)
    if isinstance(named, Tensor):
        return named
    for part in _contents(made):
        if isinstance(part, Tensor) and part.is_floating_point() and part.dim() > 1:
            return part
    return None


def _at(made: Any, where: str | int) -> Any:
    if isinstance(made, Mapping) and where in made:
        return made[where]
    if isinstance(where, str):
        return getattr(made, where, None)
    parts = list(_contents(made))
    return parts[where] if -len(parts) <= where < len(parts) else None


def _contents(made: Any) -> Iterator[Any]:
    if isinstance(made, Mapping):
        yield from made.values()
    elif isinstance(made, (tuple, list)):
        yield from made
    elif dataclasses.is_dataclass(made) and not isinstance(made, type):
        yield from (getattr(made, field.name) for field in dataclasses.fields(made))


def _shown(made: Any) -> str:
    kind = type(made).__name__
    if isinstance(made, Mapping):
        return f"{kind} of {sorted(map(str, made))}"
    return f"{kind} of {len(made)}" if isinstance(made, (tuple, list)) else kind
