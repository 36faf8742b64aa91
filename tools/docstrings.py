"""The way of docstrings of this package onto pages: a griffe extension, which reads them before they are parsed.

They are written to be read in a terminal: Sphinx roles for names, an indented block behind ``::`` for equations, and
examples for doctest that stand in the text. Here those become links, code blocks and fenced sessions.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|exc|data):`~?([\w.]+)`")
_LITERAL = re.compile(r"(?<!`)``([^`]+)``(?!`)")


class ReadableDocstrings(griffe.Extension):
    """Rewrites every docstring of the package as it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self._walk(pkg)

    def _walk(self, found: griffe.Object) -> None:
        if found.docstring is not None:
            found.docstring.value = readable(found.docstring.value)
        for member in found.members.values():
            if not member.is_alias:
                self._walk(member)


def readable(text: str) -> str:
    """The docstring as Markdown with Google's sections."""
    made = _blocks(inspect.cleandoc(text).splitlines())
    return _LITERAL.sub(r"`\1`", _ROLE.sub(_link, "\n".join(made)))


def _link(match: re.Match[str]) -> str:
    """Optional: names that have no page of their own stay plain code."""
    name = match[1]
    full = name if name.startswith("tgt_fast") else f"tgt_fast.{name}"
    return f'<autoref identifier="{full}" optional><code>{name.removeprefix("tgt_fast.")}</code></autoref>'


def _blocks(lines: list[str]) -> list[str]:
    made: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.lstrip().startswith(">>>"):
            indent = line[: len(line) - len(line.lstrip())]
            end = at
            while end < len(lines) and lines[end].strip():
                end += 1
            made += ["", f"{indent}```pycon", *lines[at:end], f"{indent}```"]
            at = end
        elif line.rstrip().endswith("::"):
            indent = len(line) - len(line.lstrip())
            said = line.rstrip()[:-1]
            made += [] if said.strip() == ":" else [said]
            at += 1
            while at < len(lines) and not lines[at].strip():
                at += 1
            end = at
            while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent):
                end += 1
            block = inspect.cleandoc("\n" + "\n".join(lines[at:end])).splitlines()
            space = " " * indent
            made += ["", f"{space}```text", *(f"{space}{each}".rstrip() for each in block), f"{space}```", ""]
            at = end
        elif match := re.match(r"^(Source): (.*)", line):  # a paragraph, which Google's style would take for a section
            made.append(f"**{match[1]}.** {match[2]}")
            at += 1
        else:
            made.append(line)
            at += 1
    return made
