"""Triton's interpreter without what it does again and again: more than half of its time.

Whenever a kernel calls a jitted function, the interpreter puts its own functions into ``triton.language``, looking
through all of that module, though they have stood there since the kernel was launched. Here it does so once a launch.
"""

from __future__ import annotations

import inspect
from typing import Any


def put_its_functions_in_once_a_launch() -> None:
    """Changes the interpreter of this process for good. Nothing where this version of Triton works otherwise."""
    from triton.runtime import interpreter

    plain, scope_type = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if plain is None or scope_type is None or hasattr(plain, "once"):
        return
    done: set[frozenset[int]] = set()  # the modules, by which functions reach the language, of the launch that runs

    class Launch(scope_type):  # type: ignore[misc, valid-type]
        def restore(self) -> None:
            done.clear()
            super().restore()

    keys: dict[str, frozenset[int]] = {}

    def seen_by(function: Any) -> frozenset[int]:
        language = (interpreter.tl, interpreter.tl.core)
        every = function.__globals__.values()
        return frozenset(id(value) for value in every if inspect.ismodule(value) and value in language)

    def patch(function: Any) -> Any:
        key = keys.get(function.__module__)
        if key is None:
            key = keys.setdefault(function.__module__, seen_by(function))
        scope = Launch() if not done else scope_type()
        if key not in done:
            scope._changes = plain(function)._changes
            done.add(key)
        return scope

    patch.once = True  # type: ignore[attr-defined]
    interpreter._patch_lang = patch
