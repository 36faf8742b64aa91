"""What a shared library of ELF needs and exports, read from the file: no readelf, no ldd, nothing is loaded."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

_DYNAMIC, _DYNSYM, _VERNEED = 6, 11, 0x6FFFFFFE  # types of sections
_NEEDED, _RPATH, _RUNPATH = 1, 15, 29  # tags of the dynamic section
MACHINES = {62: "x86_64", 183: "aarch64"}


@dataclass
class Library:
    """Names that a library needs, the versions of symbols it asks them for, and the symbols that it exports."""

    machine: str
    needed: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)  # RPATH and RUNPATH
    exports: list[str] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)  # "GLIBC_2.14", "GLIBCXX_3.4.21", ...

    def floor(self, prefix: str) -> tuple[int, ...]:
        """The highest version asked for under a prefix; () where none is."""
        found = (name[len(prefix) + 1 :] for name in self.versions if name.startswith(prefix + "_"))
        return max((tuple(map(int, number.split("."))) for number in found if number[0].isdigit()), default=())


def read(data: bytes) -> Library:
    """Reads a 64-bit little-endian library; ValueError for anything else."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"not a 64-bit little-endian ELF file: it begins with {data[:6]!r}")
    (machine,) = struct.unpack_from("<H", data, 18)
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    # (type, offset, size, link, info, entry size)
    sections = [
        tuple(struct.unpack_from("<IIQQQQIIQQ", data, table + size * i)[k] for k in (1, 4, 5, 6, 7, 9))
        for i in range(count)
    ]
    library = Library(MACHINES.get(machine, str(machine)))
    for kind, offset, length, link, info, entry in sections:
        if kind not in (_DYNAMIC, _DYNSYM, _VERNEED):
            continue
        _, names, names_size, *_ = sections[link]
        strings = data[names : names + names_size]
        if kind == _DYNAMIC:
            for tag, value in struct.iter_unpack("<qQ", data[offset : offset + length]):
                if tag == _NEEDED:
                    library.needed.append(_text(strings, value))
                elif tag in (_RPATH, _RUNPATH):
                    library.paths.append(_text(strings, value))
        elif kind == _DYNSYM:
            for at in range(offset, offset + length, entry):
                name, _, _, section, _, _ = struct.unpack_from("<IBBHQQ", data, at)
                if section:  # defined here
                    library.exports.append(_text(strings, name))
        else:
            _read_versions(library, data, offset, info, strings)
    library.exports = sorted(filter(None, library.exports))
    return library


def _read_versions(library: Library, data: bytes, at: int, count: int, strings: bytes) -> None:
    for _ in range(count):
        _, auxiliaries, _, first, following = struct.unpack_from("<HHIII", data, at)
        entry = at + first
        for _ in range(auxiliaries):
            _, _, _, name, next_entry = struct.unpack_from("<IHHII", data, entry)
            library.versions.add(_text(strings, name))
            entry += next_entry
        at += following


def _text(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode()
