"""The modules that a callable computes with, seen or not: those that freezing must reach."""

from __future__ import annotations

import dataclasses
import dis
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from torch import nn

from tgt_fast._origin import is_given, is_installed

_DEEPEST: Final = 32  # levels of objects in objects
_CONTAINERS: Final = (list, tuple, set, frozenset)
_OF_MODULES: Final = frozenset(vars(nn.Module()))  # attributes that PyTorch keeps: parameters, hooks, the mode


class _Mentioned(NamedTuple):
    """Names in code."""

    globals: frozenset[str]
    attributes: frozenset[str]
    words: frozenset[str]  # its strings, such as the keys of dicts


_NOTHING: Final = _Mentioned(frozenset(), frozenset(), frozenset())


def modules_of(part: Any) -> list[nn.Module]:
    """The outermost modules that calling ``part`` may use, each once, in the order in which they are found.

    A module; the module of a bound method; what a ``functools.partial`` binds; what a function finds in its closure,
    its defaults, and the globals that it names; what is in lists, tuples, sets and dicts of these, in dataclasses, and
    in objects that are called or whose methods are. Of an object, and of a dict with keys of strings, only that is
    taken which the code names, where it names any of it: what else lies there, the student for one, is not used. A
    callable with an attribute ``teacher_modules``, a tuple or list of modules, is taken at its word instead.
    """
    search = _Search()
    search.walk(part, _NOTHING, 0)
    return list(search.found.values())


class _Search:
    def __init__(self) -> None:
        self.found: dict[int, nn.Module] = {}
        self._visited: list[Any] = []  # alive, or an id would be used twice
        self._ids: set[tuple[int, int]] = set()

    def walk(self, thing: Any, named: _Mentioned, depth: int) -> None:
        """``named``: by the code that holds the thing."""
        if depth > _DEEPEST or isinstance(thing, (type, types.ModuleType, str, bytes, int, float, type(None))):
            return
        place = id(thing), hash(named)
        if place in self._ids:
            return
        self._ids.add(place)
        self._visited.append(thing)
        for part, by in self._inside(thing, named):
            self.walk(part, by, depth + 1)

    def _inside(self, thing: Any, named: _Mentioned) -> Iterator[tuple[Any, _Mentioned]]:
        if isinstance(thing, nn.Module):
            self.found.setdefault(id(thing), thing)
            yield from _unregistered(thing)
        elif isinstance(said := getattr(thing, "teacher_modules", None), (tuple, list)):
            for part in said:
                yield part, _NOTHING
        elif isinstance(thing, functools.partial):
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                yield part, named
        elif isinstance(thing, types.MethodType):
            if isinstance(thing.__self__, nn.Module):
                yield thing.__self__, _NOTHING
            else:
                yield thing.__self__, _of_methods(type(thing.__self__), thing.__func__)
                yield thing.__func__, _NOTHING
        elif isinstance(thing, types.FunctionType):
            yield from _of_function(thing)
        elif isinstance(thing, Mapping):
            keys = [key for key in thing if key in named.words] if all(isinstance(key, str) for key in thing) else []
            for key in keys or list(thing):
                yield thing[key], named
        elif isinstance(thing, _CONTAINERS):
            for part in thing:
                yield part, named
        else:
            yield from _of_object(thing, named)


def _of_function(function: types.FunctionType) -> Iterator[tuple[Any, _Mentioned]]:
    named = _mentioned(function.__code__)
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        yield wrapped, _NOTHING
    for part in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield part, named
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents, named
        except ValueError:  # not assigned yet
            continue
    if is_given(function.__module__):
        return
    for name in named.globals:
        value = function.__globals__.get(name)
        # Of functions and modules of Python, this program's: the globals of installed packages are no teacher's part.
        if isinstance(value, types.ModuleType):
            if not _lies_installed(getattr(value, "__file__", None)):
                for inner in sorted(named.attributes & vars(value).keys()):
                    yield vars(value)[inner], named
        elif not isinstance(value, types.FunctionType) or not _lies_installed(value.__code__.co_filename):
            yield value, named


def _of_object(thing: Any, named: _Mentioned) -> Iterator[tuple[Any, _Mentioned]]:
    kind = type(thing)
    if is_given(kind.__module__) and kind is not types.SimpleNamespace:
        return
    call = getattr(kind, "__call__", None)  # noqa: B004, its code is wanted
    by = _joined(named, _of_methods(kind, call if isinstance(call, types.FunctionType) else None))
    by = _joined(by, _of_methods(kind, *(getattr(kind, name, None) for name in named.attributes)))
    attributes = getattr(thing, "__dict__", None)
    if attributes is None:
        attributes = {name: getattr(thing, name) for name in _slots(kind) if hasattr(thing, name)}
    chosen = [name for name in attributes if name in by.attributes]
    if not chosen and dataclasses.is_dataclass(thing):
        chosen = list(attributes)
    for name in chosen:
        yield attributes[name], by
    if isinstance(call, types.FunctionType):
        yield call, _NOTHING


def _unregistered(root: nn.Module) -> Iterator[tuple[Any, _Mentioned]]:
    """Modules that those inside ``root`` hold in plain attributes that their code names, such as a list of modules."""
    for module in root.modules():
        attributes = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
        held = {name: value for name, value in attributes.items() if _may_hold(value)}
        if held:
            by = _of_class(type(module))  # type: ignore[arg-type]  # nn.Module's hash is declared without self
            for name in held:
                if name in by.attributes:
                    yield held[name], _NOTHING
        forward = type(module).forward
        if isinstance(forward, types.FunctionType) and not _lies_installed(forward.__code__.co_filename):
            yield forward, _NOTHING  # for the globals that it names


def _may_hold(value: Any) -> bool:
    """True if an attribute of a module is looked into; objects of other kinds may lead anywhere, as to a trainer."""
    if isinstance(value, Mapping):
        return any(_may_hold(part) for part in value.values())
    if isinstance(value, _CONTAINERS):
        return any(_may_hold(part) for part in value)
    return isinstance(value, (nn.Module, functools.partial, types.MethodType, types.FunctionType))


@functools.lru_cache(maxsize=1024)
def _of_class(kind: type) -> _Mentioned:
    """Names in any function of a class, those of PyTorch's own classes excepted."""
    named = _NOTHING
    for base in kind.__mro__:
        if not is_given(base.__module__):
            for value in vars(base).values():
                if isinstance(value, types.FunctionType) and value.__name__ != "__init__":
                    named = _joined(named, _mentioned(value.__code__))
    return named


def _of_methods(kind: type, *functions: Any) -> _Mentioned:
    """Names in functions of a class, and in the functions of the class that those name."""
    named, left, seen = _NOTHING, [f for f in functions if isinstance(f, types.FunctionType)], set()
    while left:
        function = left.pop()
        if function in seen:
            continue
        seen.add(function)
        more = _mentioned(function.__code__)
        named = _joined(named, more)
        for name in more.attributes:
            value = getattr(kind, name, None)
            value = value.fget if isinstance(value, property) else value
            if isinstance(value, types.FunctionType):
                left.append(value)
    return named


def _joined(one: _Mentioned, other: _Mentioned) -> _Mentioned:
    return _Mentioned(*(a | b for a, b in zip(one, other, strict=True)))


@functools.lru_cache(maxsize=4096)
def _mentioned(code: types.CodeType) -> _Mentioned:
    """Names in code, and in functions inside it."""
    named_globals, attributes, words = set(), set(), set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            named_globals.add(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            attributes.add(step.argval)
    found = _NOTHING
    for constant in code.co_consts:
        if isinstance(constant, str):
            words.add(constant)
        elif isinstance(constant, types.CodeType):
            found = _joined(found, _mentioned(constant))
    return _joined(found, _Mentioned(frozenset(named_globals), frozenset(attributes), frozenset(words)))


def _slots(kind: type) -> list[str]:
    found: list[str] = []
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        found += [names] if isinstance(names, str) else list(names)
    return found


def _lies_installed(file: str | None) -> bool:
    """True if code is an installed package's; what is compiled into Python has no file."""
    return file is None or is_installed(file)
