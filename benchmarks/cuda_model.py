"""What a kernel's machine code allows: the time of its instructions against the time of its bytes.

A case is a call of the bench. Its kernel's loops and the way between them are found by the lines of the sources that
instructions come from, the cheapest way is taken wherever the code branches, and what is issued on it is added up over
a row's warps. Three bounds follow: issue slots, the special-function unit, memory. The largest is the least time that
the kernel can take, the floor is the time of plainly copying as many bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sass import Counts, Instruction, Kernel, Loop, Sources


@dataclass(frozen=True)
class Chip:
    """An H100 or H200 (sm_90)."""

    multiprocessors: int = 132
    clocks: tuple[float, float] = (1.755e9, 1.98e9)  # sustained, at most
    bytes_a_second: float = 4.3e12
    issued_a_clock: int = 4  # instructions of warps
    special_a_clock: float = 0.5  # of warps, at 16 lanes
    registers: int = 65536
    shared_bytes: int = 233472  # of which each block takes 1024 for the system
    threads: int = 2048
    blocks: int = 32
    latency: float = 700e-9  # of memory, under load

    @property
    def needed_in_flight(self) -> float:
        """Bytes that a multiprocessor must have asked for, to be served at full speed."""
        return self.bytes_a_second * self.latency / self.multiprocessors

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """Blocks that a multiprocessor takes at once."""
        a_warp = math.ceil(math.ceil(registers / 8) * 8 * 32 / 256) * 256
        by_registers = self.registers // (a_warp * math.ceil(threads / 32))
        return min(self.blocks, self.threads // threads, by_registers, self.shared_bytes // (shared + 1024))


CHIP = Chip()


@dataclass(frozen=True)
class Pass:
    """A loop over a row, known by a line of the sources that it holds."""

    name: str
    line: str  # a regular expression, of a line with its file's name before it
    item_bytes: int  # that a pair, or a number, has in what the loop loads by 16 bytes
    through: tuple[str, ...] = ()  # lines that every round comes by, in this order
    times: int = 1  # it runs a row, in a loop of pieces
    part: float = 1.0  # of the row's items that it takes


@dataclass(frozen=True)
class Mark:
    """A line on the way between the loops, where the cheapest way would go round it."""

    line: str
    after: int = 0  # passes that are over by then
    who: str = "lead"  # a warp a block comes by; "others": all but that; "all"


@dataclass(frozen=True)
class Case:
    """A call of the bench, and the least percentage of the copy floor that its bound may be."""

    title: str
    kernel: str  # a regular expression of its name
    rows: int
    items: int  # pairs or numbers a row
    moved: int  # bytes that the call has to read and to write
    passes: tuple[Pass, ...]
    threads: int
    marks: tuple[Mark, ...] = ()
    blocks: int = 1  # a row
    shared: int = 0  # bytes a block asks for
    asked: int = 0  # bytes that the kernel asks memory for; 0: no more than it has to
    fetched: int = 0  # bytes a block asks memory for at once; 0: what its threads load in a round
    item_bytes: int = 0  # without passes: that an item has in what a thread loads by 16 bytes
    unit: str = "pair"
    bench: tuple[str, str, str, str] = ("", "", "", "")  # the row of the bench: op, what it computes, shape, dtype
    leads: int = 1  # warps of a block that come by the marks which are the lead's
    bar: float | None = None


@dataclass
class Found:
    """What the model says of a case."""

    title: str
    kernel: str
    unit: str
    registers: int
    resident: int
    warps: int  # a multiprocessor
    in_flight: int
    passes: list[dict[str, Any]]
    outside: dict[str, float]
    floor_us: float
    issue_us: list[float]
    special_us: list[float]
    memory_us: float
    percent: list[float]  # of the copy floor, at both clocks
    bar: float | None
    limit: str  # what the largest bound is of
    bench: tuple[str, str, str, str]

    @property
    def missed(self) -> bool:
        return self.bar is not None and self.percent[0] < self.bar


class UnknownCodeError(Exception):
    """The code has no such place: the sources are others than the model was made for."""


@dataclass
class Reader:
    """Finds a case's loops and ways in its kernel."""

    kernel: Kernel
    sources: Sources
    _texts: dict[Any, str] = field(default_factory=dict)

    def blocks(self, line: str) -> frozenset[int]:
        wanted = re.compile(line)

        def here(one: Instruction) -> bool:
            if one.places not in self._texts:
                self._texts[one.places] = "\n".join(map(self.sources.text, one.places))
            return wanted.search(f"{one.op}\n{self._texts[one.places]}") is not None

        found = self.kernel.where(here)
        if not found:
            raise UnknownCodeError(f"{self.kernel.name}: no instruction comes from a line like {line!r}")
        return found

    def loops(self, one: Pass) -> list[tuple[Loop, Counts, float]]:
        """The innermost loops of a pass, with a round of each and the items of that: the widest first."""
        holding = self.blocks(one.line)
        through = [self.blocks(line) for line in one.through]
        found: list[tuple[Loop, Counts, float]] = []
        for loop in self.kernel.loops:  # inner ones first
            if not (loop.blocks & holding) or any(inner.blocks < loop.blocks for inner, _, _ in found):
                continue
            round_ = self.kernel.round(loop, [each & loop.blocks for each in through])
            items = round_.wide / one.item_bytes
            if items:
                found.append((loop, round_, items))
        if not found:
            raise UnknownCodeError(f"{self.kernel.name}: no loop has a line like {one.line!r}, and {one.through}")
        return sorted(found, key=lambda each: (-each[2], each[1].instructions))

    def outside(self, case: Case, loops: Sequence[list[tuple[Loop, Counts, float]]], lead: bool) -> Counts:
        """What a warp issues outside the passes."""
        free = frozenset(at for of_pass in loops for loop, _, _ in of_pass for at in loop.blocks)
        through: list[frozenset[int]] = []
        for number in range(len(case.passes) + 1):
            here = {"all", "lead" if lead else "others"}
            marks = [mark for mark in case.marks if mark.after == number and mark.who in here]
            through.extend(self.blocks(mark.line) for mark in marks)
            if number < len(loops):
                through.append(frozenset(loop.head for loop, _, _ in loops[number]))
        way = self.kernel.way(0, lambda at: self.kernel.blocks[at].ends, through, free)
        if way is None:
            raise UnknownCodeError(f"{self.kernel.name}: no way leads by the loops of {case.title}")
        total = sum((self.kernel.counts(at) for at in way if at not in free), Counts())
        for one, of_pass in zip(case.passes, loops, strict=True):
            outer = [each for each in self.kernel.loops if of_pass[0][0].blocks < each.blocks]
            if one.times > 1 and outer:
                heads = frozenset(loop.head for loop, _, _ in of_pass)
                total = total + self.kernel.round(outer[0], [heads], free) * (one.times - 1)
        return total


def straight(reader: Reader, case: Case) -> tuple[Counts, float]:
    """Of a kernel without loops: what a warp issues on its way through, and the items of a thread."""
    blocks = reader.kernel.blocks
    way = reader.kernel.way(0, lambda at: blocks[at].ends, [reader.blocks(mark.line) for mark in case.marks])
    if way is None:
        raise UnknownCodeError(f"{reader.kernel.name}: no way leads by the lines of {case.title}")
    total = sum((reader.kernel.counts(at) for at in way), Counts())
    return total, total.wide / case.item_bytes


def judge(case: Case, kernel: Kernel, registers: int, sources: Sources, chip: Chip = CHIP) -> Found:
    """The bounds of a case."""
    reader = Reader(kernel, sources)
    warps = case.threads // 32
    passes: list[dict[str, Any]] = []
    a_block = Counts()
    if case.passes:
        loops = [reader.loops(one) for one in case.passes]
        part = math.ceil(case.items / case.blocks)
        width = 0.0
        for one, of_pass in zip(case.passes, loops, strict=True):
            (_, wide, most), (_, narrow, least) = of_pass[0], min(of_pass, key=lambda each: each[2])
            rounds = math.ceil(part / 32 / least)  # of warps, in the narrowest loop
            times = round(most / least)
            in_wide = math.floor(rounds / warps / times) * times * warps / rounds if times > 1 else 0.0
            an_item = wide * (in_wide / most) + narrow * ((1 - in_wide) / least)
            rounds = math.ceil(rounds * one.part)
            a_block = a_block + (wide * (in_wide / times) + narrow * (1 - in_wide)) * rounds
            passes.append({"pass": one.name, **_rounded(an_item)})
            width = max(width, most * one.item_bytes)
        lead, other = reader.outside(case, loops, True), reader.outside(case, loops, False)
        of_row = lead * case.leads + other * (warps - case.leads)
        a_block, outside = a_block + of_row, of_row * (1 / warps)
        blocks = case.rows * case.blocks
    else:
        outside, of_thread = straight(reader, case)
        width = of_thread * case.item_bytes
        passes.append({"pass": "all", **_rounded(outside * (1 / of_thread))})
        a_block = outside * warps
        blocks = math.ceil(case.rows * case.items / of_thread / case.threads)

    resident = chip.resident(case.threads, registers, case.shared)
    usable = chip.multiprocessors // case.blocks * case.blocks  # a cluster lies within a group of multiprocessors
    busiest = math.ceil(blocks / usable)  # blocks of the busiest multiprocessor
    fetched = case.fetched or int(width) * case.threads
    in_flight = resident * fetched
    floor = case.moved / chip.bytes_a_second
    memory = (case.asked or case.moved) / chip.bytes_a_second / min(1.0, in_flight / chip.needed_in_flight)
    issue = [busiest * a_block.instructions / chip.issued_a_clock / clock for clock in chip.clocks]
    special = [busiest * a_block.special / chip.special_a_clock / clock for clock in chip.clocks]
    worst = [max(i, s, memory) for i, s in zip(issue, special, strict=True)]
    names = {issue[0]: "issue", special[0]: "MUFU", memory: "memory"}
    return Found(
        case.title, kernel.name, case.unit, registers, resident, resident * warps, in_flight, passes,
        _rounded(outside), _us(floor), [_us(one) for one in issue], [_us(one) for one in special], _us(memory),
        [round(100 * floor / one, 1) for one in worst], case.bar, names[worst[0]], case.bench,
    )  # fmt: skip


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def _rounded(counts: Counts) -> dict[str, float]:
    return {
        "instructions": round(counts.instructions, 2),
        "special": round(counts.special, 2),
        "double": round(counts.double, 2),
        "barriers": round(counts.barriers, 2),
    }


def constants(root: Path) -> dict[str, int]:
    """The integer constants of the kernels' sources."""
    found: dict[str, int] = {}
    folder = root / "csrc" / "cuda"
    texts = [path.read_text() for kind in ("*.h", "*.cu") for path in sorted(folder.glob(kind))]
    pending = [match.groups() for text in texts for match in re.finditer(r"\bconstexpr int (k\w+) = ([^;]+);", text)]
    for text in texts:
        for several in re.finditer(r"\bconstexpr int (k\w+ = [^;(]+(?:, k\w+ = [^;(]+)+);", text):
            pending.extend(tuple(each.split(" = ")) for each in several[1].split(", "))
    for _ in range(len(pending)):
        for name, words in pending:
            if name not in found and re.fullmatch(r"[\w\s+*/()-]+", words):
                known = re.sub(r"k[A-Z]\w*", lambda match: str(found.get(match[0], match[0])), words)
                if re.fullmatch(r"[\d\s+*/()-]+", known):
                    found[name] = int(eval(known.replace("/", "//")))
    return found


def lines(found: Iterable[Found]) -> Iterator[str]:
    """A line a case."""
    for one in found:
        loops = "  ".join(
            f"{each['pass']} {each['instructions']:.1f}" + (f" ({each['special']:.1f})" if each["special"] else "")
            for each in one.passes
        )
        bar = f"bar {one.bar:.0f} %" if one.bar is not None else "no bar"
        low, high = one.percent
        yield (
            f"{one.title}: {low:.0f} % of the copy floor, {high:.0f} % at the highest clock, by {one.limit} ({bar}); "
            f"instructions (MUFU) a {one.unit}: {loops}; outside, a warp and row: {one.outside['instructions']:.0f} "
            f"({one.outside['double']:.0f} double, {one.outside['barriers']:.0f} barriers); "
            f"{one.registers} registers, {one.resident} blocks, {one.in_flight / 1024:.0f} KiB in flight; "
            f"floor {one.floor_us:.0f} us, issue {one.issue_us[0]:.0f}, MUFU {one.special_us[0]:.0f}, "
            f"memory {one.memory_us:.0f}" + (" <-- " if one.missed else "")
        )
