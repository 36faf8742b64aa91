"""From a documentation string to what a reader would call its text."""

from __future__ import annotations

import inspect
import re

LONGEST_SUMMARY = 40  # words; a longer first paragraph is cut after its first sentence
LONGEST_REST = 2000  # characters

_CUT_SECTIONS = {"examples", "example", "references", "see also", "usage", "doctest"}
_RULE = re.compile(r"^\s*([-=~^*#+.`'\"])\1{2,}\s*$")
_SECTION = re.compile(r"^([A-Z][A-Za-z ]{2,24}?):*\s*$")
_SIGNATURE = re.compile(r"^[\w.]+\(.*\)\s*(->.*)?$")
_DIRECTIVE = re.compile(r"^\s*\.\.(\s|$)")
_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`~?([^`<]*?)(?:\s*<[^>]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^>]*>`_{1,2}")
_PLACEHOLDER = re.compile(r"[{%][\w()]*[}s]")
_WORD = re.compile(r"[a-z0-9]+")


def clean(docstring: str) -> tuple[str, str]:
    """(summary, rest): each one line of words.

    Gone are doctests, directives with what is indented under them, the sections of examples and references, rules,
    signatures on the first line, and the marks of reStructuredText.

    >>> clean("Sort a list.\\n\\nStable, by :func:`sort`.\\n\\n>>> sort([2, 1])\\n[1, 2]\\n\\nSee there.")
    ('Sort a list.', 'Stable, by sort. See there.')
    """
    paragraphs = [text for text in map(_plain, _paragraphs(inspect.cleandoc(docstring))) if text]
    if not paragraphs:
        return "", ""
    summary, rest = paragraphs[0], paragraphs[1:]
    if len(summary.split()) > LONGEST_SUMMARY:
        summary, _, more = summary.partition(". ")
        summary = f"{summary}." if more else summary
        rest = [more, *rest] if more else rest
    return summary, _at_word(" ".join(rest), LONGEST_REST)


def normalised(text: str) -> str:
    """The lower-case words: what two copies of a text have in common.

    >>> normalised("Sort, a  LIST!")
    'sort a list'
    """
    return " ".join(_WORD.findall(text.lower()))


def _paragraphs(text: str) -> list[str]:
    """The lines that are text, a paragraph in one line."""
    lines = text.splitlines()
    while lines and (_SIGNATURE.match(lines[0]) or not lines[0].strip()):
        lines.pop(0)
    found: list[list[str]] = [[]]
    skipping: int | None = None  # inside a directive: lines deeper than this are its content
    code = cut = False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            code = False
            found.append([])
            continue
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if _starts_section(line, following):
            cut = line.strip().rstrip(":").lower() in _CUT_SECTIONS
            found.append([])
            if cut or _RULE.match(following):
                skipping = None
                if not cut:
                    found[-1].append(line.strip().rstrip(":") + ":")
                continue
        if cut:
            continue
        if skipping is not None and indent > skipping:
            continue
        skipping = None
        if _DIRECTIVE.match(line):
            skipping = indent
        elif line.lstrip().startswith(">>>"):
            code = True
        elif not code and not _RULE.match(line):
            found[-1].append(line.strip())
            if line.rstrip().endswith("::"):
                skipping = indent
    return [" ".join(paragraph) for paragraph in found if paragraph]


def _starts_section(line: str, following: str) -> bool:
    heading = _SECTION.match(line)
    return heading is not None and (line.rstrip().endswith(":") or _RULE.match(following) is not None)


def _plain(text: str) -> str:
    text = _ROLE.sub(lambda found: found[1].lstrip("!").split(".")[-1], text)
    text = _LINK.sub(r"\1", text)
    text = _PLACEHOLDER.sub("", text.replace("`", "").replace("::", ":").replace("**", ""))
    return " ".join(text.split())


def _at_word(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most].rpartition(" ")[0]
