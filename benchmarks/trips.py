"""Files that a reader of the package opens on the way of a call: those that it runs through, by their imports.

    python benchmarks/trips.py [--source FOLDER] [--files]

A trip begins in a public module and follows the imports that stand in its files, those inside functions too. It stops
at what is beside the way: other families of ops, other backends, names that only annotations use. `--source` is a
checkout to look at, this one by default; `--files` lists what was counted.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple


class Trip(NamedTuple):
    """Its beginning, and what is beside its way."""

    start: tuple[str, ...]  # modules, of which the first that exists is taken
    beside: tuple[str, ...]  # what names of modules begin with


_NO_DEVICE: Final = ("kernels.native.cuda", "kernels.triton")
_OPS: Final = ("ops.latent", "ops._latent", "ops.tokens", "ops._tokens", "ops._noise", "ops.vocabulary", "ops.contrast")
_FORMS: Final = ("ops.linear", "ops._linear", "kernels.linear", "kernels.vocabulary", "kernels.reference.linear")
_RECORDS: Final = (
    "ops.sparse", "ops._sparse", "ops._record", "ops.topk", "kernels.native.sparse", "kernels.native.cuda_sparse",
    "kernels.native.topk", "kernels.reference.sparse", "kernels.reference.topk",
)  # fmt: skip
# What a backend is chosen among, and what is asked for by name alone.
_CHOICE: Final = (
    "kernels.reference", "kernels.triton", "kernels.native.latent", "kernels.native.tokens", "ops.vocab_parallel",
)  # fmt: skip
_NATIVE: Final = {
    "ops.distill": ("kernels.native.distill",), "ops.linear": ("kernels.native.distill",),
    "explore.sampler": ("kernels.native.latent",),
}  # fmt: skip

TRIPS: Final = {
    "loss, CPU": Trip(("ops.distill",), (*_NO_DEVICE, *_OPS, *_FORMS, *_CHOICE)),
    "loss, CUDA": Trip(("ops.distill",), ("kernels.triton", *_OPS, *_FORMS, *_CHOICE)),
    "loss from hidden states": Trip(("ops.linear",), (*_NO_DEVICE, *_OPS[:-2], *_CHOICE)),
    "exploration along the gradient": Trip(
        ("explore.sampler",),
        (
            *_NO_DEVICE,
            *_FORMS,
            *_RECORDS,
            "ops.tokens",
            "kernels.reference",
            "losses",
            "teacher",
            "ops.vocab_parallel",
            "cache",
            "explore.replay",
            "explore.prefetch",
        ),
    ),
    "read of a cache": Trip(("cache.cache",), ("kernels", "ops", "explore", "losses", "teacher", "features")),
}


def modules(package: Path) -> dict[str, Path]:
    """Files by the names of their modules, without the package's."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, names: dict[str, Path]) -> Iterator[str]:
    """The package's modules that a file imports, apart from those that only annotations name."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("tgt_fast"):
            continue
        module = (node.module or "").removeprefix("tgt_fast").removeprefix(".")
        for alias in node.names:
            inside = f"{module}.{alias.name}".removeprefix(".")
            yield inside if inside in names else module


def followed(trip: Trip, package: Path) -> list[Path]:
    """The files of a trip, in the order in which they are met."""
    names = modules(package)
    start = next(name for name in trip.start if name in names)
    waiting, met = [start, *(name for name in _NATIVE.get(start, ()) if name in names)], {}
    while waiting:
        name = waiting.pop(0)
        if not name or name in met or name.startswith(trip.beside):
            continue
        met[name] = names[name]
        waiting += list(imported(names[name], names))
    return [path for path in met.values() if path.stat().st_size]


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--files", action="store_true")
    given = parser.parse_args()
    package = given.source / "tgt_fast"
    print("| trip | files | lines |\n| --- | ---: | ---: |")
    for name, trip in TRIPS.items():
        paths = followed(trip, package)
        print(f"| {name} | {len(paths)} | {lines(paths):,} |")
        for path in paths if given.files else ():
            print(f"|   {path.relative_to(package)} | | {lines([path])} |")


if __name__ == "__main__":
    main()
