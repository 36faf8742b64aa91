"""The documentation strings of a folder of Python files, by ``ast``: nothing is imported, nothing is run."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests, other people's packages, and applications that happen to stand in the standard library.
_SKIPPED_FOLDERS = {
    *("__pycache__", "test", "tests", "_internal"),  # torch.testing._internal is a tenth of all source, and no text
    *("site-packages", "dist-packages", "_vendor", "externals"),
    *("idlelib", "lib2to3", "turtledemo", "pydoc_data"),
}
_DOCUMENTING_CALLS = {"add_docstr", "add_newdoc", "add_docstr_all"}  # how torch and numpy document what is written in C
_SCOPES = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Root:
    """A package and the folder of its files."""

    package: str
    folder: Path
    prefix: str  # of its modules' names: "numpy", or nothing

    def files(self) -> list[Path]:
        """Its Python files but tests, by name."""
        found: list[Path] = []
        folders = [self.folder]
        while folders:
            for path in folders.pop().iterdir():
                if path.is_dir():
                    # A name with a dot or a hyphen is no package: config-3.12-x86_64-linux-gnu.
                    if path.name not in _SKIPPED_FOLDERS and path.name.isidentifier():
                        folders.append(path)
                elif path.suffix == ".py" and not path.name.startswith(("test_", "conftest")):
                    found.append(path)
        return sorted(found, key=lambda path: path.relative_to(self.folder).parts)

    def module(self, file: Path) -> str:
        """A file's module."""
        parts = [*filter(None, [self.prefix]), *file.relative_to(self.folder).with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)

    def label(self, module: str) -> str:
        """The subpackage that a module belongs to."""
        return ".".join(module.split(".")[: 2 if self.prefix else 1])


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """``(qualified name, documentation string)`` in the order of the file; the module's own name is empty.

    >>> list(docstrings('class A:\\n    "An A."\\n    def b(self):\\n        "Its b."'))
    [('A', 'An A.'), ('A.b', 'Its b.')]
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in somebody else's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # templates, other versions' syntax
        return
    yield from _walk(tree, "")


def _walk(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node, clean=False)
    if text:
        yield name, text
    for statement in _statements(node.body):
        if isinstance(statement, _SCOPES):
            yield from _walk(statement, f"{name}.{statement.name}" if name else statement.name)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            yield from _documented(statement.value)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a body and of its conditions."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try)):
            yield from _statements([*statement.body, *statement.orelse])


def _documented(call: ast.Call) -> Iterator[tuple[str, str]]:
    """``add_docstr(torch.abs, "...")`` and ``add_newdoc("numpy", "dtype", "...")``."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function not in _DOCUMENTING_CALLS or len(call.args) < 2:
        return
    *what, text = call.args
    if isinstance(text, ast.Call) and isinstance(text.func, ast.Attribute) and text.func.attr == "format":
        text = text.func.value
    if isinstance(text, ast.Constant) and isinstance(text.value, str):
        target = what[-1]
        name = target.value if isinstance(target, ast.Constant) else ast.unparse(target)
        yield str(name), text.value
