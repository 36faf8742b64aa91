"""Entries without duplicates, split by module."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tgt_fast.demos.artifacts import Artifacts
from tgt_fast.demos.corpus import clean as _clean
from tgt_fast.demos.corpus import parse as _parse
from tgt_fast.demos.corpus.clean import clean, normalised
from tgt_fast.demos.corpus.entry import Entry
from tgt_fast.demos.corpus.parse import Root, docstrings

PACKAGES = ("stdlib", "numpy", "sklearn", "torch")
SHORTEST_TEXT = 20  # characters of a summary
SHARES = {"test": 0.2, "validation": 0.1}  # of a label's entries, the others are for training


@dataclass(frozen=True)
class Corpus:
    """Three lists of entries. No module has entries in two of them, and no text stands twice."""

    train: tuple[Entry, ...]
    validation: tuple[Entry, ...]
    test: tuple[Entry, ...]

    def __len__(self) -> int:
        return len(self.train) + len(self.validation) + len(self.test)

    @property
    def fingerprint(self) -> str:
        """Equal for equal entries in equal splits: a key for what is made from them."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for entry in split:
                digest.update(json.dumps(asdict(entry)).encode())
            digest.update(b"|")
        return digest.hexdigest()[:16]

    def capped(self, limit: int) -> Corpus:
        """About ``limit`` entries: from each split its share, chosen by their names' hashes, in the same order."""
        share = min(1.0, limit / max(1, len(self)))

        def some(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
            kept = sorted(entries, key=lambda e: _hash(f"{e.module}:{e.name}"))[: round(share * len(entries))]
            chosen = {(e.module, e.name, e.summary) for e in kept}
            return tuple(e for e in entries if (e.module, e.name, e.summary) in chosen)

        return Corpus(some(self.train), some(self.validation), some(self.test))


def installed(packages: Sequence[str] = PACKAGES) -> list[Root]:
    """Folders of packages; one that is not installed is left out."""
    roots = []
    for package in packages:
        if package == "stdlib":
            roots.append(Root(package, Path(sysconfig.get_paths()["stdlib"]), ""))
            continue
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots.append(Root(package, Path(next(iter(spec.submodule_search_locations))), package))
    return roots


def load_corpus(
    roots: Sequence[Root] | None = None, *, limit: int | None = None, artifacts: Artifacts | None = None
) -> Corpus:
    """The corpus of ``roots``, by default the standard library, numpy, scikit-learn and torch as installed.

    Args:
        limit: about how many entries to keep; None keeps all.
        artifacts: where a corpus of the same files is looked for, and kept.
    """
    roots = installed() if roots is None else roots
    files = [(root, file) for root in roots for file in root.files()]

    def gathered() -> list[dict[str, str]]:
        return [asdict(entry) for entry in gather(files)]

    if artifacts is None:
        entries = [Entry(**fields) for fields in gathered()]
    else:
        entries = [Entry(**fields) for fields in artifacts.json("corpus", _identity(files), gathered)]
    corpus = split(entries)
    return corpus if limit is None else corpus.capped(limit)


def gather(files: Iterable[tuple[Root, Path]]) -> list[Entry]:
    """The entries of files, in order; of texts with the same words, only the first."""
    seen: set[str] = set()
    entries = []
    with _no_garbage_collection():
        for root, file in files:
            module = root.module(file)
            for name, docstring in docstrings(file.read_text(encoding="utf-8", errors="replace")):
                summary, rest = clean(docstring)
                entry = Entry(root.package, module, name, root.label(module), summary, rest)
                key = normalised(entry.text)
                if len(summary) >= SHORTEST_TEXT and key not in seen:
                    seen.add(key)
                    entries.append(entry)
    return entries


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees have no cycles: to look for some among millions of nodes takes as long as parsing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def split(entries: Sequence[Entry]) -> Corpus:
    """Whole modules go to the test entries until these are a fifth of their label's, then to the validation entries.

    The order in which a label's modules are taken is that of the hashes of their names. A label of one module is all
    training.
    """
    sizes: dict[str, dict[str, int]] = {}
    for entry in entries:
        modules = sizes.setdefault(entry.label, {})
        modules[entry.module] = modules.get(entry.module, 0) + 1
    place: dict[str, str] = {}
    for modules in sizes.values():
        total = sum(modules.values())
        filled = dict.fromkeys(SHARES, 0)
        for module in sorted(modules, key=_hash):
            for name, share in SHARES.items():
                # A module too large for what is left of a share is passed over, so that no share is overfilled.
                if filled[name] + modules[module] <= 1.2 * share * total:
                    filled[name] += modules[module]
                    place[module] = name
                    break
    parts: dict[str, list[Entry]] = {"train": [], "validation": [], "test": []}
    for entry in entries:
        parts[place.get(entry.module, "train")].append(entry)
    return Corpus(*(tuple(parts[name]) for name in ("train", "validation", "test")))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(files: Sequence[tuple[Root, Path]]) -> list[object]:
    """The inputs of the entries: the files, as far as their sizes and times tell, and this code."""
    stats = [(root.package, str(file), file.stat().st_size, file.stat().st_mtime_ns) for root, file in files]
    code = [Path(str(module.__file__)).read_text() for module in (_clean, _parse)] + [Path(__file__).read_text()]
    return [stats, code]
