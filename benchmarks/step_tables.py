"""The tables of a whole training step, from benchmarks/results/step-DEVICE.json."""

from __future__ import annotations

from typing import Any

from table_parts import grid, measured, ms, source, times


def step(record: dict[str, Any]) -> str:
    rows = [
        [
            row["op"].replace("plain", "every example fresh"),
            ms(row["milliseconds"]["ours"]),
            f"{row['batch'] / row['milliseconds']['ours'] * 1e3:,.0f}",
            f"{row['batch'] / row['milliseconds']['eager'] * 1e3:,.0f}" if "eager" in row["milliseconds"] else "-",
            times(row.get("over_eager")),
        ]
        for row in measured(record)
    ]
    caption = (
        f"A whole training step on {measured(record)[0]['shape']}: residual labeler, convolutional autoencoder and "
        "student, loss, backward pass, Adam. Eager: the same step by hand, teacher frozen and without graphs, the "
        "gradient in the latents alone; it has every example fresh. Cache: labels and latents of real examples are "
        f"stored; replay: each synthetic one serves {_REUSE} times; prefetch: a thread explores ahead, where PyTorch "
        "leaves it a core. "
    )
    if load := record.get("load", {}).get("average"):
        caption += f"Load average at the start: {load:.1f}. "
    header = ["training step", "ms", "real examples/s", "eager examples/s", "over eager"]
    return grid(header, rows) + "\n\n" + caption + source(record) + "\n\n" + _step_parts(record)


def _step_parts(record: dict[str, Any]) -> str:
    """The networks' shares, of the contenders with most and least to do."""
    rows = []
    for row in measured(record):
        shown = {"eager": f"{row['mode']}, eager"} if row.get("parts") == "" else {}
        for name, called in {**shown, "ours": row["op"].replace("plain", "every example fresh")}.items():
            found = row.get("parts_milliseconds", {}).get(name, {})
            rows.append([called, *(ms(found[part]) if part in found else "-" for part in _STEP_PARTS)])
    caption = (
        "Milliseconds of a step by network, under a profiler, which takes some of them. Student: with its backward "
        "pass. Slope: of gradient mode, through decoder, labeler and student and back to the latents; of ours what "
        "goes back alone, the ways forward being those networks'."
    )
    return grid(["where the time goes", *_STEP_PARTS], rows) + "\n\n" + caption


_STEP_PARTS = ("encoder", "decoder", "labeler", "slope", "student", "loss", "optimizer", "else")
_REUSE = 8  # of tgt_fast/bench/step.py
