"""The typefaces there are: those of the installed ``fontpkg-NAME`` packages, in several weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tgt_fast.errors import ArgumentError

GROUP = "fontpkg.family"  # of entry points, one a family
WEIGHTS = 4  # of a family, at most


@dataclass(frozen=True)
class Face:
    """One weight of a family: a file and, of a variable one, the place on its axis of weight."""

    file: str
    weight: float | None = None  # None: the file has one


@dataclass(frozen=True)
class Family:
    """A family and its upright faces, from light to bold."""

    name: str
    version: str  # of its package
    faces: tuple[Face, ...]


def installed() -> list[Family]:
    """The families whose packages are installed, by name; one without an upright face, or broken, is not among them.

    Raises:
        ArgumentError: fewer than two; nothing could be tested on a family of its own.
    """
    found: dict[str, Family] = {}
    for entry in metadata.entry_points(group=GROUP):
        try:
            spec = find_spec(entry.value)  # nothing of the package is run
            root = Path(str(spec.origin if spec else None)).parent
            described = json.loads((root / "metadata.json").read_text(encoding="utf-8"))
            family = described_family(described, root, entry.dist.version if entry.dist else "")
        except (ImportError, OSError, ValueError, KeyError, TypeError):  # not of the form that is known here
            continue
        if family.faces:
            found[family.name] = family
    if len(found) < 2:
        raise ArgumentError(
            f"the demo needs font packages (fontpkg-NAME), two at least; found {len(found)}: "
            "pip install 'tgt-fast[glyphs]'"
        )
    return [found[name] for name in sorted(found)]


def described_family(described: dict[str, Any], root: Path, version: str) -> Family:
    """The family that a package's metadata.json describes."""
    upright = [file for file in described["files"] if file["style"] == "normal"]
    span = next(((axis["min"], axis["max"]) for axis in described["axes"] if axis["tag"] == "wght"), None)
    variable = [file for file in upright if file["variable"]]
    if variable:
        # Several variable files of a family are the same letters with other axes: the first has the shortest name.
        file = str(root / min((one["path"] for one in variable), key=lambda path: (len(path), path)))
        low, high = span or (None, None)
        weights = (
            [None]
            if low is None or high is None
            else [low + (high - low) * step / (WEIGHTS - 1) for step in range(WEIGHTS)]
        )
        faces = [Face(file, weight) for weight in dict.fromkeys(weights)]
    else:
        by_weight = {one["weight"]: str(root / one["path"]) for one in sorted(upright, key=lambda one: one["path"])}
        faces = [Face(by_weight[weight]) for weight in spread_over(sorted(by_weight), WEIGHTS)]
    return Family(described["family"], version, tuple(faces))


def spread_over(values: list[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[round(step * (len(values) - 1) / (most - 1))] for step in range(most)]


def by_word(names: Iterable[str], place: Callable[[str], Any]) -> list[list[str]]:
    """Names in groups that share their first word, as relatives do (Noto Sans, Noto Serif); groups by ``place``."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(name.split()[0], []).append(name)
    return [groups[word] for word in sorted(groups, key=place)]
