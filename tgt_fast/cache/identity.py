"""The identity of a callable as seen from outside: its code, its settings, and the tensors that it computes with."""

from __future__ import annotations

import functools
import hashlib
import inspect
import operator
import types
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd import Function

from tgt_fast._origin import is_given
from tgt_fast.cache.machinery import attributes, entries, hides_state, is_machinery
from tgt_fast.cache.sources import compiled, is_bound, is_own, members, name_of, names_in, source_of
from tgt_fast.cache.values import (
    array_bytes,
    parts_of_tensor,
    plain,
    refuse_sharded,
    refuse_unusable,
    tensor_bytes,
    tokenizer_state,
)
from tgt_fast.teacher import Teacher, TeacherEnsemble

_BUILT_IN: Final = (types.BuiltinFunctionType, types.MethodWrapperType)
_BY_NAME: Final = (type, types.ModuleType, *_BUILT_IN, np.ufunc)
_GETTERS: Final = (operator.itemgetter, operator.attrgetter, operator.methodcaller)
_SEEN: Final = (*_BY_NAME, types.FunctionType, types.MethodType, functools.partial, Tensor, np.ndarray, nn.Module)
_DEEPEST: Final = 64  # levels of objects in objects
_LONGEST: Final = 80  # characters of a path in a message


class Identity:
    """Collects two digests: ``code`` (names, sources, structure, plain values) and ``weights`` (tensors).

    It follows methods, partials, closures, default arguments, the globals that a function names, and the attributes of
    objects and of modules, public and private, beside parameters and buffers. It takes PyTorch and the standard library
    by name, for what they compute is not this program's to version, and so are the registries and settings that an
    installed package keeps for itself. Machinery (hooks, locks, loggers, caches) is left out; what else it cannot look
    into is listed in ``unseen``.

    Args:
        latents: whether a Teacher is asked for latents, too; then its encoder belongs to what it is.
        generator: whether it makes examples; then so do its decoder, its prior and what students are shown.
    """

    def __init__(self, *, latents: bool = False, generator: bool = False) -> None:
        self.unseen: list[str] = []
        self._latents, self._generator = latents, generator
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
        value = plain(thing)
        if value is not None:
            self._say(value)
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
        for name, part in self._parts(path, thing, depth):
            self._walk(f"{path}.{name}" if name else path, part, depth + 1)

    def _visit(self, thing: Any) -> None:
        self._visited.setdefault(id(thing), len(self._visited))
        self._alive.append(thing)

    def _parts(self, path: str, thing: Any, depth: int) -> Iterator[tuple[str, Any]]:
        """Says what ``thing`` is, and gives what it consists of."""
        if isinstance(thing, Tensor):
            yield from self._tensor(path, thing)
        elif isinstance(thing, np.ndarray):
            if thing.dtype.hasobject:
                self._say("array", str(thing.shape))
                yield "", thing.tolist()
            else:
                self._add_bytes(path, array_bytes(thing))
            if isinstance(thing, np.ma.MaskedArray):
                yield "mask", np.ma.getmaskarray(thing)
            yield from self._beside(path, thing)
        elif isinstance(thing, Teacher):
            yield from self._teacher(thing)
        elif isinstance(thing, nn.Module):
            yield from self._module(path, thing)
        elif isinstance(thing, functools.partial):
            yield from (("func", thing.func), ("args", thing.args), ("keywords", thing.keywords))
        elif isinstance(thing, types.MethodType):
            yield from (("self", thing.__self__), ("func", thing.__func__))
            owner = thing.__self__
            yield from members(owner if isinstance(owner, type) else type(owner), thing.__func__.__name__)
        elif isinstance(thing, types.FunctionType):
            yield from self._function(thing)
        elif isinstance(thing, _BY_NAME):
            self._say("named", name_of(thing))
            if isinstance(thing, _BUILT_IN) and is_bound(thing):
                yield "self", thing.__self__
        elif isinstance(thing, _GETTERS):
            yield "reduced", thing.__reduce__()
        elif isinstance(thing, (OpOverload, OpOverloadPacket)):
            self._say("named", str(thing))
        elif isinstance(thing, Mapping):
            self._say(name_of(type(thing)))
            yield from self._items(thing)
            if isinstance(thing, defaultdict):
                yield "default", thing.default_factory
            yield from self._beside(path, thing)
        elif isinstance(thing, (list, tuple, deque)):
            self._say(name_of(type(thing)))
            yield from ((str(i), value) for i, value in enumerate(thing))
            yield from self._beside(path, thing)
        elif isinstance(thing, (set, frozenset)):
            self._say(name_of(type(thing)), *sorted(self._apart(path, value, depth) for value in thing))
            yield from self._beside(path, thing)
        elif isinstance(thing, torch.ScriptObject):
            yield from self._packed(path, thing)
        elif hasattr(thing, "cache_info") and hasattr(thing, "__wrapped__"):
            yield "wrapped", thing.__wrapped__
        elif type(thing).__module__.startswith("triton.") and isinstance(
            getattr(thing, "fn", None), types.FunctionType
        ):
            yield "kernel", thing.fn
        elif type(thing).__module__.partition(".")[0] == "tokenizers" and hasattr(thing, "to_str"):
            yield "tokenizer", tokenizer_state(thing)
        else:
            yield from self._object(path, thing)

    def _items(self, mapping: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
        for i, (key, value) in enumerate(entries(mapping)):
            name = plain(key)
            if name is None:  # an object, which prints its address
                yield f"{i}.key", key
            yield (f"{i}" if name is None else repr(key)), value

    def _beside(self, path: str, thing: Any) -> Iterator[tuple[str, Any]]:
        """The attributes of a user's kind of container, array or tensor, whose contents are taken in already."""
        if is_own(type(thing).__module__):
            yield from self._attributes(path, thing)

    def _apart(self, path: str, thing: Any, depth: int) -> str:
        """Digests of an element that has no place among the others."""
        other = Identity(latents=self._latents, generator=self._generator)
        other._visited, other._alive = dict(self._visited), self._alive
        other._walk(path, thing, depth + 1)
        self.unseen += other.unseen
        return f"{other.code} {other.weights}"

    def _teacher(self, teacher: Teacher) -> Iterator[tuple[str, Any]]:
        """Only what its answers depend on: a new decoder changes no label."""
        yield "labeler", teacher.labeler
        yield "labeler_transform", teacher.labeler_transform
        yield "modules", teacher.hidden_modules
        if teacher.logits_of is not None:
            yield "logits_of", teacher.logits_of
        if teacher.class_dim != -1:
            yield "class_dim", teacher.class_dim
        if isinstance(teacher, TeacherEnsemble):
            yield "members", teacher.members
            settings = (teacher.weights, teacher.combine, teacher.class_ids, teacher.route, teacher.num_classes)
            yield "combination", settings
        if self._latents:
            yield "encoder", teacher.encoder
        if self._generator:
            yield from (("decoder", teacher.decoder), ("prior", teacher.prior))
            yield "student_transform", teacher._parts["student_transform"]
        kind = type(teacher)
        if not is_own(kind.__module__):
            return
        self._say(name_of(kind))
        encoding = ("encode", "_encode") if self._latents else ()
        making = ("decode", "_decode", "join", "from_prior", "student_view") if self._generator else ()
        for entry in ("label", "_label", *encoding, *making):
            if is_own(getattr(kind, entry).__module__):
                yield entry, getattr(kind, entry)
                yield from members(kind, entry)
        held = {**teacher._modules, **teacher._parameters, **teacher._buffers}
        usual = _of_every_teacher()
        yield from sorted(held.items())
        yield from ((name, value) for name, value in self._attributes("teacher", teacher) if name not in usual)

    def _module(self, path: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
        inside = list(module.named_modules())
        place = {id(child): str(i) for i, (_, child) in enumerate(inside)}
        for name, child in inside:
            self._visit(child)
            self._say(name, name_of(type(child)), child.extra_repr())
            # A module that stands in several places is listed once, and the same module in one place is another model.
            self._say(*(f"{part} {place.get(id(held), '-')}" for part, held in child._modules.items()))
            refuse_sharded(f"{path}.{name}" if name else path, child)
            yield from ((f"{name}.{part}", value) for part, value in compiled(child))
            if not is_given(type(child).__module__):
                yield f"{name}.forward", type(child).forward
                yield from ((f"{name}.{member}", value) for member, value in members(type(child), "forward"))
        for name, child in inside:
            prefix = f"{name}." if name else ""
            yield from ((prefix + part, tensor) for part, tensor in child._parameters.items())
            yield from ((prefix + part, tensor) for part, tensor in child._buffers.items())
        for name, child in inside:
            prefix, where = (f"{name}.", f"{path}.{name}") if name else ("", path)
            yield from ((prefix + part, value) for part, value in self._state(where, child))

    def _state(self, path: str, thing: Any) -> Iterator[tuple[str, Any]]:
        if hides_state(thing):
            self._miss(path, thing)
        yield from self._attributes(path, thing)

    def _attributes(self, path: str, thing: Any) -> list[tuple[str, Any]]:
        found, doubtful = attributes(thing)
        # Not said, so that a cache that fills does not make another teacher.
        self.unseen += [f"{_shortened(path)}.{name} (what it holds)" for name in doubtful]
        return found

    def _packed(self, path: str, thing: Any) -> Iterator[tuple[str, Any]]:
        """Weights that quantisation packed, through what they pickle as."""
        try:
            yield "state", thing.__getstate__()
        except (AttributeError, RuntimeError):
            self._miss(path, thing)

    def _function(self, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
        original = getattr(function, "_torchdynamo_orig_callable", None)  # of a compiled function
        if original is not None:
            yield "", original
            return
        self._say("function", name_of(function))
        if is_given(function.__module__):
            return
        self._say(source_of(function))
        yield "defaults", (function.__defaults__, function.__kwdefaults__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not assigned yet
                self._say(name, "empty")
        yield from sorted(vars(function).items())
        names = names_in(function.__code__)
        own = is_own(function.__module__)
        for name in sorted(names & function.__globals__.keys()):
            yield from self._global(name, function.__globals__[name], names, own=own)

    def _global(self, name: str, value: Any, names: set[str], *, own: bool) -> Iterator[tuple[str, Any]]:
        """The object under a name of a function. What it asks of the user's modules and classes is seen as well."""
        if own or plain(value) is not None or isinstance(value, _SEEN) or hasattr(value, "__wrapped__"):
            yield name, value
        elif not is_machinery(value):  # a registry, a context: it belongs to the package, but for what was put in
            self._say(name, name_of(type(value)))
            yield from self._registered(name, value)
        if own and isinstance(value, (type, types.ModuleType)) and is_own(_module_of(value)):
            held = vars(value)
            asked = names | {"forward"} if isinstance(value, type) and issubclass(value, Function) else names
            for attribute in sorted(asked & held.keys()):
                inner = getattr(value, attribute)
                yield from self._global(f"{name}.{attribute}", inner, names - {attribute}, own=True)

    def _registered(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        held = (
            [value] if type(value) is dict else [*vars(type(value)).values(), *getattr(value, "__dict__", {}).values()]
        )
        for registry in held:
            if type(registry) is dict:
                for key, entry in registry.items():
                    if isinstance(key, str) and callable(entry) and is_own(_module_of(entry)):
                        yield f"{name}.{key}", entry

    def _object(self, path: str, thing: Any) -> Iterator[tuple[str, Any]]:
        self._say("object", name_of(type(thing)))
        call = inspect.getattr_static(type(thing), "__call__", None)
        if isinstance(call, types.FunctionType):
            yield "__call__", call
            yield from members(type(thing), "__call__")
        yield from self._state(path, thing)

    def _miss(self, path: str, thing: Any) -> None:
        self._say("unseen", name_of(type(thing)))
        self.unseen.append(f"{_shortened(path)} ({name_of(type(thing))})")

    def _tensor(self, path: str, tensor: Tensor) -> Iterator[tuple[str, Any]]:
        refuse_unusable(path, tensor)
        parts = parts_of_tensor(tensor)
        if parts is None:
            self._add_bytes(path, tensor_bytes(path, tensor))
            if not is_given(type(tensor).__module__):  # scales, tables and the like of packed weights
                yield from self._attributes(path, tensor)
        else:
            self._say(name_of(type(tensor)), str(tensor.layout))
            yield from parts

    def _add_bytes(self, path: str, pieces: Iterator[Any]) -> None:
        self._tensors += 1
        self._weights.update(f"{len(path)}:{path} ".encode())
        for piece in pieces:
            self._weights.update(piece)


@functools.cache
def _of_every_teacher() -> frozenset[str]:
    return frozenset(vars(Teacher(torch.tanh, torch.tanh, torch.tanh)))


def _shortened(path: str) -> str:
    return path if len(path) <= _LONGEST else f"{path[: _LONGEST // 2]}...{path[-_LONGEST // 2 :]}"


def _module_of(thing: Any) -> str | None:
    return thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None)
