"""The committed reports on what compilers made of the kernels: the same is not compiled again.

A report names what it was made of by a hash: of the sources, of the flags, and of the compiler's version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def digest(root: Path, files: Iterable[Path], *pins: str) -> str:
    """SHA-256 of files, by their names below ``root``, and of whatever else decides."""
    made = hashlib.sha256(repr(pins).encode())
    for path in sorted(files):
        made.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return made.hexdigest()


def known(name: str, made_of: str, bad: bool = False) -> dict[str, Any] | None:
    """The committed report of that name, if it is of the same, and nothing in it is bad or ``bad`` lets that pass."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    report: dict[str, Any] = json.loads(path.read_text())
    return report if report.get("made_of") == made_of and (bad or report.get("bad") == 0) else None


def save(name: str, made_of: str, by: str, rows: Sequence[dict[str, Any]], bad: int) -> None:
    """Writes the report, a row a line."""
    head = json.dumps({"made_of": made_of, "by": by, "kernels": len(rows), "bad": bad})
    lines = ",\n".join(json.dumps(row) for row in rows)
    (RESULTS / f"{name}.json").write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')


def words(report: dict[str, Any]) -> str:
    return f"unchanged since the report on {report['kernels']} kernels by {report['by']}"
