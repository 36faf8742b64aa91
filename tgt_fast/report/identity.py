"""The machine and the versions that a result was made with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import tgt_fast


def commit() -> str:
    """The checkout's commit ("-dirty" with changes), or, outside a checkout of this project, the package's version."""
    package = Path(tgt_fast.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # A package installed below somebody else's repository is not tracked by it.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return f"tgt-fast {tgt_fast.__version__}"
    head = git("rev-parse", "HEAD")
    if head is None:
        return f"tgt-fast {tgt_fast.__version__}"
    return head + ("-dirty" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
