"""One documentation string, cleaned."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """The text of one documentation string and where it stands."""

    package: str  # "stdlib", "numpy", ...
    module: str  # "numpy.linalg.linalg"
    name: str  # qualified name within the module; empty: the module itself
    label: str  # the subpackage, or of the standard library the module: "numpy.linalg", "asyncio"
    summary: str  # the first sentence or paragraph
    rest: str  # what follows it, one line; may be empty

    @property
    def text(self) -> str:
        """Summary and rest."""
        return f"{self.summary} {self.rest}".rstrip()
