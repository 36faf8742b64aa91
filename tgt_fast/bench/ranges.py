"""The time of a step by its parts: the named ranges of a profile as a tree, whose own shares add up to the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from tgt_fast._ranges import PREFIX

ELSEWHERE = "elsewhere"


@dataclass
class Node:
    """A range, and those within it; times in milliseconds, of all its calls together."""

    name: str
    calls: int = 0
    spent: float = 0.0  # on the CPU, with what is within
    own_device: float = 0.0  # of the kernels that were launched in it, but not within an inner range
    within: dict[str, Node] = field(default_factory=dict)

    @property
    def own(self) -> float:
        return max(0.0, self.spent - sum(node.spent for node in self.within.values()))

    @property
    def device(self) -> float:
        return self.own_device + sum(node.device for node in self.within.values())

    def at(self, name: str) -> Node:
        return self.within.setdefault(name, Node(name))

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Node]]:
        """Those within, the longest first, each with its depth and before its own."""
        for node in sorted(self.within.values(), key=lambda node: -max(node.spent, node.device)):
            yield depth, node
            yield from node.walk(depth + 1)


def tree(events: Iterable[Any]) -> Node:
    """The ranges among a profiler's events, nested as they were in time; the root is what lies outside of all.

    Threads do not matter: while autograd works in threads of its own, the range round ``backward()`` waits for it.
    """
    root = Node(ELSEWHERE)
    open_: list[tuple[float, Node]] = [(float("inf"), root)]
    on_cpu = [event for event in events if not event.is_async and event.device_type.name == "CPU"]
    for event in sorted(on_cpu, key=lambda event: (event.time_range.start, -event.time_range.end)):
        while open_[-1][0] <= event.time_range.start:
            open_.pop()
        if event.name.startswith(PREFIX):
            node = open_[-1][1].at(event.name.removeprefix(PREFIX))
            node.calls += 1
            node.spent += (event.time_range.end - event.time_range.start) / 1e3
            open_.append((event.time_range.end, node))
        else:
            open_[-1][1].own_device += sum(kernel.duration for kernel in event.kernels) / 1e3
    root.spent = sum(node.spent for node in root.within.values())
    return root


def shares(values: Sequence[float]) -> list[float]:
    """Percentages with one decimal that add up to 100 exactly; zeros of nothing."""
    whole = sum(values)
    if not whole > 0:
        return [0.0] * len(values)
    exact = [1000 * value / whole for value in values]
    found = [int(value) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda place: found[place] - exact[place])
    for place in by_rest[: 1000 - sum(found)]:
        found[place] += 1
    return [value / 10 for value in found]


def print_ranges(console: Console, root: Node, steps: int, *, on_gpu: bool) -> None:
    """A table, a line a range, indented by what it lies in."""
    lines = list(root.walk())
    if on_gpu and root.own_device > 0:
        lines.append((0, Node(ELSEWHERE, own_device=root.own_device)))
    parts = shares([node.own_device if on_gpu else node.own for _, node in lines])
    table = Table(
        title=f"where the time of a step goes ({steps} step{'s' * (steps > 1)})",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("range", no_wrap=True)
    for name in ("calls", "CPU ms", *(("GPU ms",) if on_gpu else ()), "own ms", "own share"):
        table.add_column(name, justify="right", no_wrap=True)
    for (depth, node), part in zip(lines, parts, strict=True):
        own = node.own_device if on_gpu else node.own
        table.add_row(
            "  " * depth + node.name, f"{node.calls / steps:g}" if node.calls else "-",
            f"{node.spent / steps:.3f}", *((f"{node.device / steps:.3f}",) if on_gpu else ()),
            f"{own / steps:.3f}", f"{part:.1f} %",
        )  # fmt: skip
    console.print(table, markup=False, highlight=False)
    told = "own: without the ranges that are indented below"
    console.print(f"{told}; the shares add up to 100 %", markup=False, highlight=False, soft_wrap=True)
