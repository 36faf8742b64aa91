"""The files of a call: what was found, written as it comes, and what earlier calls have found of the same sources."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = "gpu"  # and the device
KEPT = ("kernels", "checks", "tests", "sanitizer", "profile")  # of the summary of an earlier call
SOURCES = (
    "tgt_fast/**/*.py", "csrc/**/*", "cmake/*", "CMakeLists.txt", "python_tests/**/*.py", "benchmarks/**/*.py",
    "benchmarks/*.sh",
)  # fmt: skip


def digest_of_sources(root: Path = ROOT) -> str:
    """Of all that a result depends on: it stands for a commit where there is no git."""
    found = {path for pattern in SOURCES for path in root.glob(pattern) if path.is_file()}
    return _digest(root, found)


def digest_of_core(root: Path = ROOT) -> str:
    """The ``build_info()["sources"]`` of a core of these sources (cmake/sources_digest.cmake)."""
    found = [
        path
        for path in (root / "csrc").rglob("*")
        if path.suffix in (".h", ".cpp", ".cu") and path.relative_to(root).parts[:2] != ("csrc", "emulator")
    ]
    return _digest(root, found)


def _digest(root: Path, paths: Iterable[Path]) -> str:
    lines = sorted(
        f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in paths
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def commit(given: str | None = None) -> str:
    """Of the checkout, with a + for changes; of a copy without git the one that the caller names."""
    try:
        command = ["git", "-C", str(ROOT)]
        head = subprocess.run([*command, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*command, "status", "--porcelain", "--untracked-files=no", "--", "tgt_fast", "csrc"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return head.stdout.strip() + ("+" if changes.stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return given or "unknown"


class Results:
    """NAME-cuda.json, a file a noun, and the summary gpu-cuda.json: in the folder of the call, and a copy of each in
    ``kept``, where a later call of the same sources finds them. All of them are whole at any moment.
    """

    def __init__(self, out: Path, kept: Path, device: str = "cuda") -> None:
        self.out, self.kept, self.device = out, kept, device
        self.sources = digest_of_sources()
        self._lock = threading.RLock()
        self._nouns: dict[str, dict[str, Any]] = {}
        self.summary: dict[str, Any]
        for folder in (out, kept):
            folder.mkdir(parents=True, exist_ok=True)
        self.earlier = self._of_earlier(f"{SUMMARY}-{device}")
        self.summary = {"sources": self.sources, **{key: self.earlier[key] for key in KEPT if key in self.earlier}}

    def _of_earlier(self, name: str) -> dict[str, Any]:
        """The results of an earlier call, if it ran these sources."""
        for folder in (self.out, self.kept, ROOT / "benchmarks" / "results"):
            try:
                found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
            except (OSError, ValueError):
                continue
            if isinstance(found, dict) and found.get("sources") == self.sources:
                return found
        return {}

    def update(self, **fields: Any) -> None:
        """Put fields into the summary, and write it."""
        with self._lock:
            self.summary.update(fields)
            self._write(f"{SUMMARY}-{self.device}", self.summary)

    def proven(self, *keys: str) -> Any:
        """A field of the earlier summary, such as ``proven("kernels", name)``; None where there is none."""
        found: Any = self.earlier
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def rows(self, noun: str) -> list[dict[str, Any]]:
        """Those of a noun, of this call and of earlier ones."""
        return list(self._noun(noun).get("rows", []))

    def put(self, noun: str, origin: dict[str, Any], case: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        """The rows of a case, in the place of what was known of it."""
        with self._lock:
            made = self._noun(noun)
            others = [row for row in made.get("rows", []) if not same_case(row, case)]
            found = [*others, *({**row, "number": case["number"]} for row in rows)]
            found.sort(key=lambda row: row["number"])  # stable: a case's backends stay in their order
            self._nouns[noun] = {**origin, "sources": self.sources, "rows": found}
            self._write(f"{noun}-{self.device}", self._nouns[noun])

    def _noun(self, noun: str) -> dict[str, Any]:
        with self._lock:
            if noun not in self._nouns:
                self._nouns[noun] = self._of_earlier(f"{noun}-{self.device}")
            return self._nouns[noun]

    def carry_over(self, nouns: Iterable[str]) -> None:
        """Write what earlier calls have measured beside what this one does."""
        with self._lock:
            for noun in nouns:
                if self._noun(noun):
                    self._write(f"{noun}-{self.device}", self._nouns[noun])

    def _write(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=1) + "\n"
        for folder in (self.out, self.kept):
            new = folder / f".{name}.new"
            new.write_text(text)
            os.replace(new, folder / f"{name}.json")


def same_case(row: dict[str, Any], case: dict[str, Any]) -> bool:
    """True if a row is of that case."""
    return all(row[key] == case[key] for key in ("op", "shape", "dtype"))
