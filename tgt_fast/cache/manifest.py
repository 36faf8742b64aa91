"""manifest.json: whose outputs a folder holds, and what a row is. Written once, by whoever stores the first row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tgt_fast._files import new_file, sync
from tgt_fast._opening import open_file, parse_json
from tgt_fast.cache.fingerprint import Fingerprint, differences
from tgt_fast.cache.layout import Layout
from tgt_fast.cache.shard import FORMAT
from tgt_fast.errors import CacheError, StaleCacheError

NAME: Final = "manifest.json"
_LARGEST: Final = 4 << 20  # bytes
_REMEDY: Final = "the shards beside it are as they were: put its copy back, or fill another folder"


@dataclass(frozen=True)
class Manifest:
    fingerprint: Fingerprint
    layout: Layout
    notes: Mapping[str, Any] = field(default_factory=dict)  # what else is to be known, and need not agree

    @staticmethod
    def read(folder: Path) -> Manifest | None:
        """That of a folder; None where there is none.

        Raises:
            CacheError: it cannot be read, was changed, or is of another version of the format.
        """
        path = folder / NAME
        try:
            with open_file(path) as file:
                raw = file.read(_LARGEST + 1)
            if len(raw) > _LARGEST:
                raise ValueError(f"it is larger than {_LARGEST} bytes")
            found = parse_json(raw)
            parts, version = dict(found["fingerprint"]), str(found["format"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"cannot read {path}: {error or type(error).__name__}; {_REMEDY}") from error
        if version != FORMAT:
            raise CacheError(
                f"{path} is of format {version[:20]}; this version of tgt_fast reads format {FORMAT}. Rows of an "
                "older format are computed again, in another folder: "
                "tgt-fast cache build FOLDER --teacher MODULE:FACTORY --data MODULE:FACTORY"
            )
        checksum = found.pop("checksum", None)
        # The text itself as well: what a parser passes over, such as a blank or a key that comes twice, is a change.
        if checksum != _checksum(found) or raw != _text({**found, "checksum": checksum}).encode():
            raise CacheError(f"{path} was changed: its checksum is not that of its contents; {_REMEDY}")
        digest = parts.pop("sha256", "")
        fingerprint = Fingerprint(parts)
        if fingerprint != digest:
            raise CacheError(f"{path} was changed: its fingerprint is not that of its parts")
        try:
            return Manifest(fingerprint, Layout.from_json(found.get("rows")), dict(found.get("notes", {})))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CacheError(f"{path} does not say what a row is: {error!r}; {_REMEDY}") from error

    def create(self, folder: Path) -> Manifest:
        """Write it unless another process was first; returns the one that stands.

        Raises:
            OSError: it cannot be written.
        """
        path = folder / NAME
        text = _text(self.to_json())
        with new_file(folder) as new:
            new.file.write(text.encode())
            new.sync()
            new.take_free_name(path)
        sync(folder)
        standing = Manifest.read(folder)
        assert standing is not None
        return standing

    def to_json(self) -> dict[str, Any]:
        fingerprint = {"sha256": str(self.fingerprint), **self.fingerprint.parts}
        contents: dict[str, Any] = {"format": FORMAT, "fingerprint": fingerprint, "rows": self.layout.to_json()}
        if self.notes:
            contents["notes"] = dict(self.notes)
        return {**contents, "checksum": _checksum(contents)}

    def accept(self, folder: Path, given: Fingerprint) -> None:
        """
        Raises:
            StaleCacheError: the rows are of another fingerprint than ``given``.
        """
        if self.fingerprint != given:
            raise StaleCacheError(
                f"the {self.layout.keys.rows} in {folder} was made under fingerprint {self.fingerprint}, but here "
                f"it is {given}: "
                f"{differences(self.fingerprint, given)}. Use another folder, or delete this one"
            )


def _text(contents: dict[str, Any]) -> str:
    return json.dumps(contents, indent=1) + "\n"


def _checksum(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
