"""A wheel under a version that says what is inside: 0.1.0+cpu, 0.1.0+cu130.

    python tools/label_wheel.py WHEEL [LABEL]      writes the labelled wheel beside it, removes WHEEL, prints the name
    python tools/label_wheel.py --kind OBJECTS     the label of what TGT_PREBUILD=ON has built in a folder

A local part of the version and no build tag: pip takes `tgt-fast==0.1.0+cpu` for one of them and `tgt-fast==0.1.0` for
either; of two in a folder the CUDA wheel comes first, which runs on machines without a GPU as well.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import sys
import zipfile
from pathlib import Path


def label_of(objects: Path) -> str:
    """Of the objects' CUDA."""
    said = dict(re.findall(r"set\((\w+) \[==\[(.*?)\]==\]\)", (objects / "tgt_objects.cmake").read_text()))
    if said["TGT_HAVE_CUDA"] != "TRUE":
        return "cpu"
    return "cu" + "".join(said["TGT_CUDA_VERSION"].split(".")[:2])


def relabel(wheel: Path, label: str) -> Path:
    """The same wheel with ``+label`` behind its version, in the name, the metadata and the record."""
    project, version, *tags = wheel.name.split("-")
    if "+" in version:
        raise ValueError(f"{wheel.name} has a label already")
    if not re.fullmatch(r"[a-z0-9]+", label):
        raise ValueError(f"a label is letters and digits, got {label!r}")
    named = f"{version}+{label}"
    old, new = f"{project}-{version}.dist-info/", f"{project}-{named}.dist-info/"
    made = wheel.with_name("-".join((project, named, *tags)))
    rows = []
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            if entry.is_dir():
                continue
            data = source.read(entry)
            record = entry.filename == f"{old}RECORD"
            if entry.filename == f"{old}METADATA":
                data, count = re.subn(rb"(?m)^Version: .*$", f"Version: {named}".encode(), data, count=1)
                assert count == 1
            if entry.filename.startswith(old):
                entry.filename = new + entry.filename[len(old) :]
            if record:
                continue
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append((entry.filename, f"sha256={digest}", len(data)))
            target.writestr(entry, data, zipfile.ZIP_DEFLATED)
        written = io.StringIO()
        csv.writer(written, lineterminator="\n").writerows([*rows, (f"{new}RECORD", "", "")])
        target.writestr(f"{new}RECORD", written.getvalue())
    wheel.unlink()
    return made


def main() -> int:
    arguments = sys.argv[1:]
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    if arguments[0] == "--kind":
        print(label_of(Path(arguments[1])))
    else:
        print(relabel(Path(arguments[0]), arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
