"""Whose code something is, and what it says."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import fx, nn

from tgt_fast._origin import is_given, is_installed, top_of

_MANGLED: Final = re.compile(r"___torch_mangle_\d+\.")  # a count of what the process has compiled before


@functools.lru_cache(maxsize=4096)
def is_own(module: str | None) -> bool:
    """True if code is the user's: neither given nor of an installed package, such as this one, wherever it lies."""
    if is_given(module) or top_of(module) == top_of(__name__):
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is None or not is_installed(file)


def name_of(thing: Any) -> str:
    module = getattr(thing, "__module__", None)
    return f"{module}.{getattr(thing, '__qualname__', None) or getattr(thing, '__name__', repr(type(thing)))}"


def is_bound(function: types.BuiltinFunctionType | types.MethodWrapperType) -> bool:
    """True if a function in another language is a method of some object, as ``table.get`` is."""
    owner = getattr(function, "__self__", None)
    if owner is None or isinstance(owner, (type, types.ModuleType)):
        return False
    kind = type(owner)
    return kind.__name__ != "PyCapsule" and kind.__module__ != "pybind11_builtins"  # where their own code is kept


def source_of(function: types.FunctionType) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(function))
        if function.__name__ == "<lambda>" and source.count("lambda") > 1:  # on one line: which of them is it?
            source += _instructions(function.__code__)
        return source
    except (OSError, TypeError):  # typed at a prompt: the instructions say as much, for one version of Python
        return _instructions(function.__code__)


def _instructions(code: types.CodeType) -> str:
    constants = [_instructions(x) if isinstance(x, types.CodeType) else repr(x) for x in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names} {code.co_varnames}"


def names_in(code: types.CodeType) -> set[str]:
    """The globals and attributes that code may use, in functions inside it as well."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= names_in(constant)
    return found


def members(kind: type, entry: str) -> Iterator[tuple[str, Any]]:
    """Of what a user's classes define, all that the method ``entry`` names, and what that names in turn.

    A constant of a class and a method that is called on ``self`` belong to what the entry computes, and neither is in
    its source.
    """
    wanted, seen = [entry], {entry}
    while wanted:
        name = wanted.pop()
        owner = next((base for base in kind.__mro__ if name in base.__dict__), object)
        if not is_own(owner.__module__):
            continue
        value = owner.__dict__[name]
        function = _function_of(value)
        if function is not None:
            named = sorted(names_in(inspect.unwrap(function).__code__) - seen)
            wanted += named
            seen.update(named)
        if name != entry and not isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType)):
            yield name, value if function is None else function


def _function_of(member: Any) -> types.FunctionType | None:
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    elif isinstance(member, property):
        member = member.fget
    elif isinstance(member, functools.cached_property):
        member = member.func
    return member if isinstance(member, types.FunctionType) else None


def compiled(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The code, the attributes and the constants of a module that was scripted, traced or exported, if it was."""
    if isinstance(module, fx.GraphModule):
        yield "code", module.code
    held = vars(module).get("_c")
    if not isinstance(held, torch.ScriptModule):
        return
    inner: Any = held  # of whose methods the type says little
    for name in sorted(inner._method_names()):
        code, constants = inner._get_method(name).code_with_constants
        code = _MANGLED.sub("", code)
        yield f"code of {name}", code
        yield f"constants of {name}", constants
        for attribute in sorted(set(re.findall(r"[A-Za-z_]\w*", code))):
            if inner.hasattr(attribute) and not isinstance(inner.getattr(attribute), torch.ScriptModule):
                yield attribute, inner.getattr(attribute)
