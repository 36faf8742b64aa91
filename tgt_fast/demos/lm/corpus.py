"""The standard library's source with its documentation strings: text that lies on every machine with Python."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tgt_fast.errors import ArgumentError

# Not the library itself, tables of numbers rather than text, or gone from later versions of Python.
LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "distutils", "encodings", "pydoc_data",
    "ensurepip", "lib-dynload", "turtledemo", "__pycache__",
}  # fmt: skip
NEEDED_BYTES = 2 << 20
# Hundredths of the modules, by a hash of their names.
_TEST, _VALIDATION = range(10), range(10, 18)


@dataclass(frozen=True)
class Module:
    """The text of one module, or of a package with all its modules."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Modules in the order of a hash of their names, so that any beginning of a part is a sample of it."""

    train: tuple[Module, ...]
    validation: tuple[Module, ...]
    test: tuple[Module, ...]


def load_corpus(folder: Path | None = None) -> Corpus:
    """The library in ``folder``, by default that of the running Python, split by module.

    ``_pydecimal`` and ``_pyio`` repeat what ``decimal`` and ``io`` document, so names that differ in such a beginning
    alone go to the same part; a file that is there twice is taken once.

    Raises:
        ArgumentError: the library's source is not there, as in a Python that carries it compiled or zipped.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    texts: dict[str, list[str]] = {}
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if LEFT_OUT & set(inside.parts):
            continue
        text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
        if text.strip() and text not in seen:
            seen.add(text)
            texts.setdefault(family(inside.parts[0]), []).append(text)
    total = sum(len(text) for parts in texts.values() for text in parts)
    if total < NEEDED_BYTES:
        raise ArgumentError(
            f"the demo reads the standard library's source, but {root} holds {total / 2**20:.1f} MiB of it, "
            f"{NEEDED_BYTES / 2**20:.0f} MiB are needed"
        )
    modules = [Module(name, "\n".join(texts[name])) for name in sorted(texts, key=_place)]

    def part(hundredths: range) -> tuple[Module, ...]:
        return tuple(module for module in modules if _place(module.name) % 100 in hundredths)

    rest = range(_VALIDATION.stop, 100)
    return Corpus(part(rest), part(_VALIDATION), part(_TEST))


def family(name: str) -> str:
    """The name that a module shares with its variants: ``_pydecimal.py`` -> ``decimal``."""
    return name.removesuffix(".py").lstrip("_").removeprefix("py")


def _place(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
