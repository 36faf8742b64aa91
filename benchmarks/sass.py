"""Machine code of a device as the disassembler prints it: basic blocks, loops, and the cheapest ways through them.

What is counted is what a warp issues: an instruction that its predicate turns off takes its slot like any other.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_SECTION = re.compile(r"\s*\.section\s+\.text\.([\w$.]+)")
_LABEL = re.compile(r"(?P<label>[.$\w]+):$")
_PLACE = re.compile(r'//## File "(?P<file>[^"]+)", line (?P<line>\d+)(?P<inlined> inlined at)?')
_CODE = re.compile(r"/\*(?P<at>[0-9a-f]{4,})\*/\s+(?P<text>[^;]+);")
_PARTS = re.compile(r"(?:@(?P<guard>!?U?P[\dT]+)\s+)?(?P<op>[A-Z][\w.]*)\s*(?P<rest>.*)")
_TARGET = re.compile(r"`\(([^)]+)\)")
_WIDE_LOAD = re.compile(r"(LDG|LDS|LD)\b.*\.128\b")

Place = tuple[str, int]  # a source file and a line


@dataclass(frozen=True)
class Instruction:
    """One instruction, with the places in the sources that it comes from: its own, then where that was inlined."""

    op: str
    guard: str = ""
    rest: str = ""
    places: tuple[Place, ...] = ()

    @property
    def always(self) -> bool:
        return self.guard in {"", "PT", "UPT"}

    @property
    def special(self) -> bool:
        """Of the special-function unit."""
        return self.op.startswith("MUFU")

    @property
    def double(self) -> bool:
        """Of double precision."""
        return self.op.split(".")[0] in {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"} or "F64" in self.op

    @property
    def barrier(self) -> bool:
        """Waits for other threads."""
        return self.op.split(".")[0] in {"BAR", "UCGABAR_ARV", "UCGABAR_WAIT", "MEMBAR", "ERRBAR"}

    @property
    def wide(self) -> int:
        """Bytes a thread loads from global or shared memory, where it takes 16 at a time."""
        return 16 if _WIDE_LOAD.match(self.op) else 0


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow. A block without any ends a thread."""

    code: list[Instruction] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    called: int = -1  # the block that a call runs before what follows
    ends: bool = False  # the thread may end here


@dataclass(frozen=True)
class Counts:
    """What a warp issues."""

    instructions: float = 0
    special: float = 0
    double: float = 0
    barriers: float = 0
    wide: float = 0  # bytes a thread loads by 16

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __mul__(self, factor: float) -> Counts:
        return Counts(*(value * factor for value in self.values()))

    def values(self) -> tuple[float, ...]:
        return self.instructions, self.special, self.double, self.barriers, self.wide


def counts_of(code: Iterable[Instruction]) -> Counts:
    code = list(code)
    return Counts(
        len(code),
        sum(one.special for one in code),
        sum(one.double for one in code),
        sum(one.barrier for one in code),
        sum(one.wide for one in code),
    )


@dataclass(frozen=True)
class Loop:
    """A natural loop: its first block, and all its blocks."""

    head: int
    blocks: frozenset[int]


class Kernel:
    """The blocks of a function, the first of which is its entry."""

    def __init__(self, name: str, blocks: list[Block]) -> None:
        self.name = name
        self.blocks = blocks
        self.loops = _loops(blocks)
        self._calls: dict[int, Counts] = {}

    def counts(self, block: int) -> Counts:
        """Of one run through a block, with what it calls."""
        found = counts_of(self.blocks[block].code)
        called = self.blocks[block].called
        if called >= 0:
            if called not in self._calls:
                self._calls[called] = Counts()  # a function that calls itself
                way = self.way(called, lambda at: self.blocks[at].ends)
                self._calls[called] = sum((self.counts(at) for at in way or ()), Counts())
            found = found + self._calls[called]
        return found

    def way(
        self,
        start: int,
        finished: Callable[[int], bool],
        through: Sequence[frozenset[int]] = (),
        free: frozenset[int] = frozenset(),
        within: frozenset[int] | None = None,
    ) -> list[int] | None:
        """The cheapest way from a block to one that is finished, through one block of each set, in their order.

        Blocks of ``free`` cost nothing. ``within`` holds the way, but for its end, in these blocks.
        """
        weight = [0.0 if at in free else self.counts(at).instructions for at in range(len(self.blocks))]

        def passed(at: int, stage: int) -> int:
            first = stage
            while (
                stage < len(through) and at in through[stage] and (stage == first or through[stage] != through[first])
            ):
                stage += 1  # a set that is named twice is come by twice
            return stage

        first = (start, passed(start, 0))
        best: dict[tuple[int, int], float] = {first: weight[start]}
        before: dict[tuple[int, int], tuple[int, int]] = {}
        heap = [(weight[start], *first)]
        while heap:
            cost, at, stage = heapq.heappop(heap)
            if cost > best[at, stage]:
                continue
            if stage == len(through) and finished(at):
                way = [(at, stage)]
                while way[-1] in before:
                    way.append(before[way[-1]])
                return [block for block, _ in reversed(way)]
            for following in self.blocks[at].after:
                if within is not None and following not in within:
                    continue
                state = (following, passed(following, stage))
                if cost + weight[following] < best.get(state, float("inf")):
                    best[state] = cost + weight[following]
                    before[state] = (at, stage)
                    heapq.heappush(heap, (best[state], *state))
        return None

    def round(self, loop: Loop, through: Sequence[frozenset[int]] = (), free: frozenset[int] = frozenset()) -> Counts:
        """Of the cheapest way round a loop, through one block of each set."""
        back = frozenset(at for at in loop.blocks if loop.head in self.blocks[at].after)
        way = self.way(loop.head, lambda at: at in back, through, free, loop.blocks)
        if way is None:
            return Counts()
        return sum((self.counts(at) for at in way if at not in free), Counts())

    def where(self, wanted: Callable[[Instruction], bool]) -> frozenset[int]:
        """The blocks that hold such an instruction."""
        return frozenset(at for at, block in enumerate(self.blocks) if any(map(wanted, block.code)))


def _loops(blocks: list[Block]) -> list[Loop]:
    """The natural loops, an inner one before those round it. Loops with the same head are one."""
    order: list[int] = []
    state = {0: 1}
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(blocks[0].after if blocks else ()))]
    back: list[tuple[int, int]] = []
    while stack:
        at, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            state[at] = 2
            order.append(at)
            stack.pop()
        elif following not in state:
            state[following] = 1
            stack.append((following, iter(blocks[following].after)))
        elif state[following] == 1:
            back.append((at, following))
    before: dict[int, list[int]] = {at: [] for at in order}
    for at in order:
        for following in blocks[at].after:
            before[following].append(at)
    found: dict[int, set[int]] = {}
    for tail, head in back:
        body, todo = found.setdefault(head, {head}), [tail]
        while todo:
            at = todo.pop()
            if at not in body:
                body.add(at)
                todo.extend(before[at])
    return sorted((Loop(head, frozenset(body)) for head, body in found.items()), key=lambda loop: len(loop.blocks))


def parse(text: str, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[Kernel]:
    """The kernels of what ``nvdisasm -c -gi`` prints, by their mangled names."""
    sections: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if found := _SECTION.match(line):
            sections.append((found[1], []))
        elif line.lstrip().startswith(".section"):
            sections.append(("", []))
        elif sections:
            sections[-1][1].append(line)
    for mangled, lines in sections:
        if mangled and wanted(mangled):
            yield Kernel(mangled, _blocks(lines))


def _blocks(lines: Iterable[str]) -> list[Block]:
    blocks = [Block()]
    at_label: dict[str, int] = {}
    jumps: list[tuple[int, str, bool]] = []  # a block, where it jumps to, whether that is a call
    places: list[Place] = []
    fresh = falls = True  # the next place starts a new list; the next block follows the last one

    def start() -> None:
        nonlocal falls
        if blocks[-1].code:
            if falls:
                blocks[-1].after.append(len(blocks))
            blocks.append(Block())
            falls = True

    for line in lines:
        line = line.strip()
        if found := _PLACE.match(line):
            if fresh:
                places, fresh = [], False
            places.append((found["file"], int(found["line"])))
            continue
        if found := _LABEL.match(line):
            start()
            falls = True
            at_label[found["label"]] = len(blocks) - 1
            continue
        found = _CODE.match(line)
        parts = _PARTS.match(found["text"].strip()) if found else None
        if parts is None:
            continue
        fresh = True
        op, guard = parts["op"], parts["guard"] or ""
        one = Instruction(op, guard, parts["rest"], tuple(places))
        blocks[-1].code.append(one)
        kind, target = op.split(".")[0], _TARGET.search(parts["rest"])
        if kind in {"BRA", "CALL"} and target:
            jumps.append((len(blocks) - 1, target[1], kind == "CALL"))
        if kind in {"EXIT", "RET"}:
            blocks[-1].ends = True
        if kind in {"BRA", "EXIT", "RET", "CALL"}:
            # A branch may have its condition as an operand, too: BRA.DIV, BRA P0.
            sure = one.always and not (kind == "BRA" and (".DIV" in op or not parts["rest"].startswith("`")))
            falls = kind == "CALL" or not sure
            start()
            if not falls and blocks[-1].code:
                falls = True
    for block, label, is_call in jumps:
        if label not in at_label:
            continue
        if is_call:
            blocks[block].called = at_label[label]
        elif at_label[label] not in blocks[block].after:
            blocks[block].after.append(at_label[label])
    return blocks


class Sources:
    """The lines of the sources that instructions come from."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lines: dict[str, list[str]] = {}

    def text(self, place: Place) -> str:
        """A line, with its file's name before it."""
        file, line = place
        if file not in self._lines:
            below = self._root / "csrc" / file.rpartition("/csrc/")[2]
            self._lines[file] = below.read_text().splitlines() if below.is_file() else []
        lines = self._lines[file]
        return f"{Path(file).name}: {lines[line - 1].strip() if line <= len(lines) else ''}"
