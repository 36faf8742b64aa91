"""What can be seen of a callable from outside: its code, its settings, and the tensors that it computes with."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from tgt_fast.cache.machinery import is_machinery, state
from tgt_fast.errors import DTypeError
from tgt_fast.teacher import Teacher

_PLAIN: Final = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.Size,
    Enum,
    PurePath,
)
_DEEPEST: Final = 64  # levels of objects in objects
_PIECE: Final = 16 << 20  # elements brought to the host at a time


class Identity:
    """Collects two digests: ``code`` (names, sources, structure, plain values) and ``weights`` (tensors).

    It follows methods, partials, closures, default arguments, the globals that a function names, and the attributes of
    objects and of modules, public and private, beside parameters and buffers. It takes PyTorch and the standard library
    by name, for what they compute is not this program's to version. Machinery (hooks, locks, loggers, caches) is left
    out; what else it cannot look into is listed in ``unseen``.

    Args:
        latents: whether a Teacher is asked for latents, too; then its encoder belongs to what it is.
    """

    def __init__(self, *, latents: bool = False) -> None:
        self.unseen: list[str] = []
        self._latents = latents
        self._code, self._weights = hashlib.sha256(), hashlib.sha256()
        self._visited: dict[int, int] = {}
        self._alive: list[Any] = []  # objects made on the way, or an id would be used twice
        self._tensors = 0

    @property
    def code(self) -> str:
        return self._code.hexdigest()

    @property
    def weights(self) -> str | None:
        """None where no tensor was found."""
        return self._weights.hexdigest() if self._tensors else None

    def add(self, name: str, thing: Any) -> None:
        """Take ``thing`` in under a name."""
        self._walk(name, thing, 0)

    def _say(self, *words: str) -> None:
        for word in words:
            self._code.update(f"{len(word)}:{word}".encode(errors="surrogatepass"))

    def _walk(self, path: str, thing: Any, depth: int) -> None:
        self._say(path)
        if isinstance(thing, _PLAIN):
            self._say(type(thing).__qualname__, repr(thing))
            return
        if type(thing) in (tuple, list) and all(isinstance(value, _PLAIN) for value in thing):
            self._say(_name(type(thing)), repr(thing))  # equal ones are equal, whether or not they are one object
            return
        if is_machinery(thing):
            return
        if id(thing) in self._visited:  # in a circle, or shared
            self._say("again", str(self._visited[id(thing)]))
            return
        self._visit(thing)
        if depth > _DEEPEST:
            self._miss(path, thing)
            return
        for name, part in self._parts(path, thing):
            self._walk(f"{path}.{name}" if name else path, part, depth + 1)

    def _visit(self, thing: Any) -> None:
        self._visited.setdefault(id(thing), len(self._visited))
        self._alive.append(thing)

    def _parts(self, path: str, thing: Any) -> Iterator[tuple[str, Any]]:
        """Says what ``thing`` is, and gives what it consists of."""
        if isinstance(thing, Tensor) or (isinstance(thing, np.ndarray) and not thing.dtype.hasobject):
            self._add_tensor(path, torch.from_numpy(thing) if isinstance(thing, np.ndarray) else thing)
        elif isinstance(thing, Teacher):
            yield from self._teacher(thing)
        elif isinstance(thing, nn.Module):
            yield from self._module(path, thing)
        elif isinstance(thing, functools.partial):
            yield from (("func", thing.func), ("args", thing.args), ("keywords", thing.keywords))
        elif isinstance(thing, types.MethodType):
            yield from (("self", thing.__self__), ("func", thing.__func__))
        elif isinstance(thing, types.FunctionType):
            yield from self._function(path, thing)
        elif isinstance(thing, (type, types.ModuleType, types.BuiltinFunctionType, np.ufunc)):
            self._say("named", _name(thing))
        elif isinstance(thing, Mapping):
            self._say(_name(type(thing)))
            yield from ((repr(key), value) for key, value in thing.items())
        elif isinstance(thing, (list, tuple)):
            self._say(_name(type(thing)))
            yield from ((str(i), value) for i, value in enumerate(thing))
        elif isinstance(thing, (set, frozenset)):
            self._say(_name(type(thing)), *sorted(repr(value) for value in thing if isinstance(value, _PLAIN)))
            if not all(isinstance(value, _PLAIN) for value in thing):  # they have no order of their own
                self._miss(path, thing)
        elif isinstance(thing, torch.ScriptObject):
            yield from self._packed(path, thing)
        elif hasattr(thing, "cache_info") and hasattr(thing, "__wrapped__"):
            yield "wrapped", thing.__wrapped__
        else:
            yield from self._object(path, thing)

    def _teacher(self, teacher: Teacher) -> Iterator[tuple[str, Any]]:
        """Only what its answers depend on: a new decoder changes no label."""
        yield "labeler", teacher.labeler
        yield "labeler_transform", teacher.labeler_transform
        yield "modules", teacher.hidden_modules
        if self._latents:
            yield "encoder", teacher.encoder

    def _module(self, path: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
        inside = list(module.named_modules())
        for name, child in inside:
            self._visit(child)
            self._say(name, _name(type(child)), child.extra_repr())
            if not _is_given(type(child).__module__):
                yield f"{name}.forward", type(child).forward
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            self._visit(tensor)
            self._add_tensor(f"{path}.{name}", tensor)
        for name, child in inside:
            for attribute, value in state(child) or ():
                yield f"{name}.{attribute}" if name else attribute, value

    def _packed(self, path: str, thing: Any) -> Iterator[tuple[str, Any]]:
        """Weights that quantisation packed, through what they pickle as."""
        try:
            yield "state", thing.__getstate__()
        except (AttributeError, RuntimeError):
            self._miss(path, thing)

    def _function(self, path: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
        self._say("function", _name(function))
        if _is_given(function.__module__):
            return
        self._say(_source(function))
        yield "defaults", (function.__defaults__, function.__kwdefaults__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not assigned yet
                self._say(name, "empty")
        for name in sorted(_names(function.__code__)):
            if name in function.__globals__:
                value = function.__globals__[name]
                if is_machinery(value):
                    continue
                if _is_data(value) or isinstance(value, (nn.Module, functools.partial)) or callable(value):
                    yield name, value
                else:  # a logger, a file: walking through it would say little of what is computed
                    self._miss(f"{path}.{name}", value)

    def _object(self, path: str, thing: Any) -> Iterator[tuple[str, Any]]:
        self._say("object", _name(type(thing)))
        call = inspect.getattr_static(type(thing), "__call__", None)
        if isinstance(call, types.FunctionType):
            yield "__call__", call
        attributes = state(thing)
        if attributes is None:
            self._miss(path, thing)
        else:
            yield from attributes

    def _miss(self, path: str, thing: Any) -> None:
        self._say("unseen", _name(type(thing)))
        if not isinstance(thing, types.ModuleType):
            self.unseen.append(f"{path} ({_name(type(thing))})")

    def _add_tensor(self, path: str, tensor: Tensor) -> None:
        if type(tensor).__name__ == "DTensor":
            raise DTypeError(
                f"teacher_fingerprint: {path} is a DTensor, of which a process holds a part; name the teacher by "
                "version= and give no teacher, or take the fingerprint before it is sharded"
            )
        self._tensors += 1
        self._weights.update(f"{len(path)}:{path} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        if tensor.is_quantized:
            self._weights.update(_quantization(tensor).encode())
            tensor = tensor.int_repr()
        flat = tensor.detach().reshape(-1)
        for start in range(0, flat.numel(), _PIECE):
            piece = flat[start : start + _PIECE]
            raw = piece.to("cpu").contiguous().view(torch.uint8)
            self._weights.update(raw.numpy().data)


def _quantization(tensor: Tensor) -> str:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return f"{tensor.qscheme()} {tensor.q_scale()!r} {tensor.q_zero_point()} "
    scales, zeros = tensor.q_per_channel_scales().tolist(), tensor.q_per_channel_zero_points().tolist()
    return f"{tensor.qscheme()} {scales} {zeros} {tensor.q_per_channel_axis()} "


def _is_data(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_data, value))
    if isinstance(value, Mapping):
        return all(map(_is_data, value.values()))
    return isinstance(value, (*_PLAIN, Tensor, np.ndarray, type, types.ModuleType))


def _is_given(module: str | None) -> bool:
    """Whether code belongs to PyTorch or the standard library."""
    top = (module or "").partition(".")[0]
    return top != "__main__" and (top == "torch" or top in sys.stdlib_module_names)


def _name(thing: Any) -> str:
    module = getattr(thing, "__module__", None)
    return f"{module}.{getattr(thing, '__qualname__', None) or getattr(thing, '__name__', repr(type(thing)))}"


def _source(function: types.FunctionType) -> str:
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


def _names(code: types.CodeType) -> set[str]:
    """The globals that code may use, in functions inside it as well."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found
