"""The tables of docs/scaling.md, from benchmarks/results/scaling-cpu.json."""

from __future__ import annotations

from typing import Any

from table_parts import grid

_CALLED = {"gradients": "gradients of 4 Mi weights", "count": "a count of rows", "gather": "a gather of 4 Mi numbers"}


def _size(count: float) -> str:
    for unit, word in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {word}"
    return f"{count:.0f} B"


def points(record: dict[str, Any]) -> str:
    """Calculated bytes beside those that went through the loopback device."""
    rows = [
        [
            _CALLED[row["what"]],
            str(row["world"]),
            _size(row["calculated"]),
            _size(row["sent"]),
            f"{row['seconds'] * 1e3:.3g}",
        ]
        for row in sorted(record["points"], key=lambda row: list(_CALLED).index(row["what"]))
    ]
    caption = (
        "A process and call, gloo over the loopback device. What is sent has the headers of TCP and gloo's own "
        "messages in it, and what other programs sent meanwhile; of gradients the time is that of the whole call, "
        f"with its matrix products. `{record['command']}`, {record['hardware']}; "
        f"torch {record['versions']['torch']}; commit {record['commit']}, {record['date']}."
    )
    return grid(["", "processes", "calculated", "sent", "ms"], rows) + "\n\n" + caption


def calculated(record: dict[str, Any]) -> str:
    """By number of GPUs."""
    rows = []
    for row in record["rows"]:
        ways = [row[way] for way in ("replicated", "sharded", "teacher_sharded", "vocabulary_sharded", "counts")]
        cells = [f"{_size(way['bytes'])}, {way['messages']:,.0f}, {way['seconds'] * 1e3:,.3g}" for way in ways]
        rows.append([f"{row['gpus']:,}", *cells, _share(row, "replicated"), _share(row, "sharded")])
    first = record["rows"][0]
    caption = (
        "Bytes that a GPU sends, messages, and milliseconds a step; calculated, not measured. Every GPU computes "
        f"{first['flops'] / 1e12:,.0f} TFLOP, {first['compute'] * 1e3:,.0f} ms. The last two columns: the share of "
        "computation in a step if nothing overlaps. Assumed: "
        + ", ".join(f"{name} {value:,.4g}" for name, value in (record["step"] | record["machine"]).items())
        + "."
    )
    head = ["GPUs", "DDP", "FSDP2", "teacher in shards", "vocabulary in shards", "counts", "share, DDP", "share, FSDP2"]
    return grid(head, rows) + "\n\n" + caption


def _share(row: dict[str, Any], way: str) -> str:
    return f"{row['compute'] / (row['compute'] + row[way]['seconds'] + row['counts']['seconds']):.0%}"


def limits(record: dict[str, Any]) -> str:
    """The points at which each way of spreading stops paying, by the rows of the table above."""
    rows, step, machine = record["rows"], record["step"], record["machine"]

    def first(holds: Any) -> str:
        found = next((row["gpus"] for row in rows if holds(row)), None)
        return "none of these numbers of GPUs" if found is None else f"{found:,} GPUs"

    def shorter(way: str) -> str:
        return first(lambda row: row[way]["seconds"] > row["compute"])

    def gathers_less(row: dict[str, Any]) -> bool:
        return bool(row["gpus"] > 1 and row["head_gathered"]["bytes"] < row["vocabulary_sharded"]["bytes"])

    last = rows[-1]
    parts = {way: last[way]["messages"] * machine["latency_outside"] for way in ("replicated", "sharded")}
    lines = [
        "Data, DDP: communication takes longer than computation, and cannot hide behind it, from "
        f"{shorter('replicated')} on. At {last['gpus']:,} GPUs "
        f"{parts['replicated'] / last['replicated']['seconds']:.0%} of it is waiting for "
        "messages, whose number grows with the GPUs while the bytes do not: trees instead of rings, or a hierarchy of "
        "nodes, take that away.",
        f"Data, FSDP2: from {shorter('sharded')} on; at {last['gpus']:,} GPUs "
        f"{parts['sharded'] / last['sharded']['seconds']:.0%} of it is waiting for messages.",
        f"A teacher in shards: from {shorter('teacher_sharded')} on. It needs no gradient, so a shard per node "
        f"({machine['node']} GPUs) costs {rows[3]['teacher_sharded']['seconds'] * 1e3:,.0f} ms a step and never grows.",
        "A vocabulary in shards sends every row to every GPU, so its bytes grow with the GPUs. Gathering the head "
        f"(`linear_distillation_loss` of a DTensor) sends less from {first(gathers_less)} on, "
        f"with {step['tokens']:,} tokens a GPU and {step['classes']:,} classes.",
        f"The counts never matter: {last['counts']['seconds'] * 1e3:.3g} ms of latency at {last['gpus']:,} GPUs, and "
        "no host waits for them.",
    ]
    return "\n".join(f"- {line}" for line in lines)
