"""``tgt-fast doctor``: what was built, what can run on this machine, and why the rest cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from tgt_fast._threads import cores
from tgt_fast.kernels.select import DEFAULT_VARIABLE, backends

_OPTIONAL = ("scikit-learn", "matplotlib", "triton", "transformers", "diffusers", "timm")


def facts() -> list[tuple[str, str]]:
    """Versions, processor and threads, as (name, value)."""
    rows = [(name, _version(name)) for name in ("tgt-fast", "torch", "numpy", "safetensors")]
    rows.insert(1, ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"))
    rows += [(name, _version(name)) for name in _OPTIONAL]
    rows.append(("processor", f"{torch.backends.cpu.get_cpu_capability()}, {cores()} cores for this process"))
    rows.append(("threads", f"{torch.get_num_threads()} (torch.get_num_threads(); the core uses as many)"))
    rows.append(("CUDA devices", _cuda()))
    default = os.environ.get(DEFAULT_VARIABLE)
    rows.append((DEFAULT_VARIABLE, default or "not set"))
    return rows


def print_doctor(console: Console) -> None:
    """Both tables."""
    _print(console, "Backends", ("backend", "runs here", "devices", "details"), _backend_rows())
    console.print()
    _print(console, "Environment", ("", ""), facts())


def _backend_rows() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for row in backends():
        detail = row.detail if row.available else row.reason
        rows.append((row.name, "yes" if row.available else "no", ", ".join(row.devices) or "-", detail))
    return rows


def _print(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(header))
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False, highlight=False)


def _version(name: str) -> str:
    if name == "torch":
        return torch.__version__  # with the build's tag, which the metadata may lack
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "tgt-fast":
            import tgt_fast

            return f"{tgt_fast.__version__} (not installed: run from its source folder)"
        return "not installed"


def _cuda() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return f"none ({'torch was built for the CPU' if built is None else f'torch was built for CUDA {built}'})"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
