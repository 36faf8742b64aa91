"""manifest.json: whose outputs a folder holds, and what a row is. Written once, by whoever stores the first row."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tgt_fast._files import sync, write_text
from tgt_fast.cache.fingerprint import Fingerprint, differences
from tgt_fast.cache.layout import Layout
from tgt_fast.cache.shard import FORMAT, TEMPORARY
from tgt_fast.errors import CacheError, StaleCacheError

NAME: Final = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    fingerprint: Fingerprint
    layout: Layout

    @staticmethod
    def read(folder: Path) -> Manifest | None:
        """That of a folder; None where there is none.

        Raises:
            CacheError: it cannot be read, or is of another version of the format.
        """
        path = folder / NAME
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            parts, version = dict(found["fingerprint"]), str(found["format"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"cannot read {path}: {error}") from error
        if version != FORMAT:
            raise CacheError(f"{path} is of format {version}; this version of tgt_fast reads format {FORMAT}")
        digest = parts.pop("sha256", "")
        fingerprint = Fingerprint(parts)
        if fingerprint != digest:
            raise CacheError(f"{path} was changed: its fingerprint is not that of its parts")
        return Manifest(fingerprint, Layout.from_json(found.get("rows")))

    def create(self, folder: Path) -> Manifest:
        """Write it unless another process was first; returns the one that stands.

        Raises:
            OSError: it cannot be written.
        """
        path = folder / NAME
        text = json.dumps(self.to_json(), indent=1) + "\n"
        temporary = folder / f".{NAME}-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}"
        try:
            write_text(temporary, text)
            try:
                os.link(temporary, path)  # fails where the name is taken, so of several writers one wins
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links: the window between question and answer stays
                if not path.exists():
                    os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(folder)
        standing = Manifest.read(folder)
        assert standing is not None
        return standing

    def to_json(self) -> dict[str, Any]:
        fingerprint = {"sha256": str(self.fingerprint), **self.fingerprint.parts}
        return {"format": FORMAT, "fingerprint": fingerprint, "rows": self.layout.to_json()}

    def accept(self, folder: Path, given: Fingerprint) -> None:
        """
        Raises:
            StaleCacheError: the rows are of another fingerprint than ``given``.
        """
        if self.fingerprint != given:
            raise StaleCacheError(
                f"the cache in {folder} was made under fingerprint {self.fingerprint}, but here it is {given}: "
                f"{differences(self.fingerprint, given)}. Use another folder, or delete this one"
            )
