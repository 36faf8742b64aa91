"""The tables of the ops' speed, from benchmarks/results/OP-DEVICE.json, and of the runs on a GPU."""

from __future__ import annotations

from typing import Any

from table_parts import grid, measured, ms, source, times

TOP_K, TOP_P = 50, 0.95  # of tgt_fast/bench/tokens.py


def distill(record: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['divergence']} + CE, {row['rows']} x {row['classes']}, {row['dtype']}",
            ms(row["milliseconds"]["ours"]),
            times(row["over_eager"]),
            times(row["over_compile"]),
            f"{row['milliseconds']['copy'] / row['milliseconds']['ours']:.0%}",
        ]
        for row in measured(record)
    ]
    peak = next(row["peak_extra"] for row in record["rows"] if "peak_extra" in row)
    caption = (
        "Forward and backward, median milliseconds, and the speed relative to rivals in the same run. The last column "
        "is the time of plainly copying as many bytes. Peak extra memory of the first row, in units of the student's "
        f"logits: {peak['ours']:.2f}, eager {peak['eager']:.2f}. Liger's kernels need a GPU. " + source(record)
    )
    return grid(["distillation loss", "ms", "over eager", "over torch.compile", "copy"], rows) + "\n\n" + caption


def linear(record: dict[str, Any]) -> str:
    """On either device: the floor is arithmetic, so a rate of that and not of bytes."""
    caption = (
        "Forward and backward, rows x (hidden sizes of student and teacher) x classes: median milliseconds, TFLOP/s of "
        "the products that the loss and the gradients take, the speed relative to rivals in the same run, and the peak "
        "of memory beyond what is returned. Chunks: the loss of 256 rows at a time under `torch.utils.checkpoint`. "
        "`linear_cross_entropy`: both terms by PyTorch's own function, which has chunks for labels alone. In bfloat16 "
        "the rivals round logits before the softmax, and multiply faster for it; ours never rounds them. Peak of the "
        "first row with its gradients, in units of the student's logits: "
    )
    return _chunked(record, "distillation loss from hidden states", caption)


def contrast(record: dict[str, Any]) -> str:
    caption = (
        "Forward and backward to the student's towers, queries x (sizes of the student's and the teacher's vectors) x "
        "passages: median milliseconds, TFLOP/s of the products, the speed relative to rivals in the same run, and the "
        "peak of memory beyond what is returned. In bfloat16 the rivals round scores before the softmax, and multiply "
        "faster for it. Peak of the first row with its gradients, in units of the student's scores: "
    )
    return _chunked(record, "contrastive distillation loss", caption)


def _chunked(record: dict[str, Any], name: str, caption: str) -> str:
    found = measured(record)
    others = ("eager", "compile", "chunked", "linear_cross_entropy", *PEERS)
    shown = [(key, f"over {_CALLED.get(key, key)}") for key in others if any(row.get(f"over_{key}") for row in found)]
    rows = [
        [
            f"{row['op']}, {row['shape']}, {row['dtype']}",
            ms(row["milliseconds"]["ours"]),
            f"{row['flops'] / row['milliseconds']['ours'] / 1e9:.3g}",
            *(times(row.get(f"over_{key}")) for key, _ in shown),
            # Nothing: the peak of setting up was higher, so the call's own is not known.
            f"{extra / 2**20:.0f}" if (extra := row.get("extra_memory_bytes") or 0) > 0 else "-",
        ]
        for row in found
    ]
    peak = next((row["peak_extra"] for row in found if "peak_extra" in row), {})
    peaks = [f"{_CALLED.get(name, name)} {peak[name]:.2f}" for name in peak if name != "ours"]
    said = ", ".join([f"{peak['ours']:.2f}" if "ours" in peak else "not measured", *peaks])
    header = [name, "ms", "TFLOP/s", *(called for _, called in shown), "extra MiB"]
    return grid(header, rows) + "\n\n" + caption + said + ". " + source(record)


def topk(record: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['op']}, {row['shape']}, {row['dtype']}",
            ms(row["milliseconds"]["ours"]),
            times(row["over_eager"]),
            times(row["over_compile"]),
            f"{row['milliseconds']['copy'] / row['milliseconds']['ours']:.0%}",
        ]
        for row in measured(record)
    ]
    caption = (
        "Forward and backward, median milliseconds, beside the dense KL divergence from the teacher's logits, which is "
        "what there is without a record. The last column is the time of plainly copying as many bytes. "
    )
    header = ["loss against a top-k record", "ms", "over dense eager", "over dense torch.compile", "copy"]
    return grid(header, rows) + "\n\n" + caption + source(record)


def listwise(record: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['shape']}, {row['dtype']}",
            ms(row["milliseconds"]["ours"]),
            times(row["over_eager"]),
            f"{row['milliseconds']['copy'] / row['milliseconds']['ours']:.0%}",
        ]
        for row in measured(record)
    ]
    caption = (
        "Forward and backward with labels, median milliseconds, beside a sort, a gather and a log-cumsum-exp in "
        "PyTorch. The last column is the time of plainly copying as many bytes. "
    )
    load = record.get("load", {})
    if load.get("busy"):
        caption += (
            f"Other processes used {load['others']:.1f} cores meanwhile: the ratios hold, the milliseconds do not. "
        )
    return grid(["listwise loss", "ms", "over eager", "copy"], rows) + "\n\n" + caption + source(record)


def loss_options(record: dict[str, Any]) -> str:
    rows = [
        [
            f"`{row['option']}`",
            ms(1e3 * row["seconds"]),
            f"{row['ratio']:.2f}x",
            f"{row['processor_ratio']:.2f}x",
        ]
        for row in record["rows"]
    ]
    caption = (
        f"Forward and backward of float32, {record['shape']}, median milliseconds, beside the same loss without the "
        "option, which takes turns with it in one process; `skew` beside jsd. The second ratio is that of the "
        f"processor's time. {record['load']:.1f} processes wanted the processor at the end. "
    )
    return grid(["option", "ms", "time", "processor"], rows) + "\n\n" + caption + source(record)


def latent(record: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['op']}, {row['samples']} x {row['size']}",
            ms(row["milliseconds"]["ours"]),
            times(row["over_eager"]),
            times(row["over_compile"]),
        ]
        for row in measured(record)
    ]
    return grid(["latent op, float32", "ms", "over eager", "over torch.compile"], rows) + "\n\n" + source(record)


def explore(record: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['op']}, batch {row['batch']}",
            ms(row["milliseconds"]["ours"]),
            ms(row["milliseconds"]["eager"]) if "eager" in row["milliseconds"] else "-",
            times(row.get("over_eager")),
        ]
        for row in measured(record)
    ]
    caption = (
        "Gradient exploration, convolutional decoder, labeler and student: encode, climb one step, decode, label. "
        "Eager: the same written with `loss.backward()`. "
    )
    return grid(["exploration", "ms", "eager ms", "over eager"], rows) + "\n\n" + caption + source(record)


def cache(record: dict[str, Any]) -> str:
    rows = [
        [
            row["case"],
            row["order"],
            f"{row['rows_per_second']:,.0f}",
            f"{row['bytes_per_second'] / 1e6:,.0f}",
            *("-" if row.get(name) is None else f"{row[name]:.2f}x" for name in CACHE_RIVALS),
        ]
        for row in measured(record)
    ]
    caption = (
        "`TeacherCache.read` in batches, and its speed relative to plain reads of rows of as many bytes in the same "
        "run: `numpy.memmap` indexed by the ids, `os.pread` and safetensors' `safe_open` a row, `read()` of a file. In "
        "order and shuffled: out of the page cache. Cold: a cache is opened and read once in order, from the disk, "
        f"checksums included. Load average at the start: {record['load']:.1f}. "
    )
    header = ["teacher cache", "order", "rows/s", "MB/s", "over memmap", "over pread", "over safe_open", "over read()"]
    return grid(header, rows) + "\n\n" + caption + source(record)


def tokens(record: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['op']}, {row['shape']}",
            ms(row["milliseconds"]["ours"]),
            ms(row["milliseconds"]["eager"]),
            times(row["over_eager"]),
        ]
        for row in measured(record)
    ]
    peak = next(row["peak_extra"] for row in record["rows"] if "peak_extra" in row)
    share = (peak["ours"] - 1) / (peak["eager"] - 1)
    caption = (
        f"Sampling, top-k {TOP_K} and top-p {TOP_P}, against a sort, a cut and `torch.multinomial`; a soft embedding, "
        "forward and backward to the logits, against `F.gumbel_softmax(logits) @ table` (plain: `torch.softmax`). Peak "
        f"extra memory of the one with noise, beyond its gradient: {share:.0%} of eager's. "
    )
    return grid(["tokens, float32", "ms", "eager ms", "over eager"], rows) + "\n\n" + caption + source(record)


def cuda(record: dict[str, Any]) -> str:
    """Ops on a GPU whose floor is the bytes that move; rivals as far as they were measured."""
    rows = measured(record)
    several = len({row["backend"] for row in rows}) > 1
    lines = []
    for row in rows:
        name = f"{row['op']}, {row['shape']}, {row['dtype']}" + (f", {row['backend']}" if several else "")
        others = {key.removeprefix("over_"): row[key] for key in row if key.startswith("over_") and row[key]}
        eager, compiled = others.pop("eager", None), others.pop("compile", None)
        best = min(others, key=others.__getitem__, default=None)  # the fastest of them: least ahead of it are we
        lines.append(
            [
                name,
                ms(row["milliseconds"]["ours"]),
                f"{row['bytes_per_second'] / 1e9:.0f}",
                f"{row['of_copy']:.0%}",
                times(eager),
                times(compiled),
                "-" if best is None else f"{best} {others[best]:.1f}x",
            ]
        )
    peers = [f"{name} {found}" for name, found in record["versions"].items() if name in PEERS]
    caption = (
        "Median milliseconds of a call (of the loss: forward and backward) with a cold L2 cache, the bytes that have "
        "to move (each input read once, each result written once) by that time, the share of a plain copy's "
        f"{record['copy_bytes_per_second'] / 1e9:.0f} GB/s in the same run, and the speed relative to rivals"
        + (f" ({', '.join(peers)})" if peers else "")
        + f". Driver {record['driver']}. "
        + source(record)
    )
    header = ["", "ms", "GB/s", "of copy", "over eager", "over torch.compile", "best other"]
    return grid(header, lines) + "\n\n" + caption


def gpu(record: dict[str, Any]) -> str:
    """Runs on a GPU and their results: ``benchmarks/gpu.sh``."""
    kernels, checks, tests = (record.get(name, {}) for name in ("kernels", "checks", "tests"))
    bad = [f"{name}: {found['status']}" for name, found in kernels.items() if found["status"] != "ok"]
    wrong = [f"{name}: {status}" for name, status in checks.items() if status not in ("ok", "skipped")]
    left = [f"{tests[key]} {called}" for key, called in _OF_TESTS.items() if tests.get(key)]
    left += [each["test"] for each in tests.get("failures", [])]
    found = [
        ["calls that reach every kernel", f"{len(kernels) - len(bad)} of {len(kernels)}", "; ".join(bad)],
        ["tests", str(tests.get("passed", 0)), "; ".join(left)],
        ["benchmark cases against float64", f"{len(checks) - len(wrong)} of {len(checks)}", "; ".join(wrong)],
    ]
    for tool, one in record.get("sanitizer", {}).items():
        found.append([tool, f"{one['calls']} calls", one["note"] or one["outcome"]])
    return grid(["on a GPU", "well", "and else"], found) + f"\n\nDriver {record['driver']}. " + source(record)


_OF_TESTS = {"failed": "failed", "skipped": "skipped", "missing": "not reached"}
PEERS = ("liger", "orda", "quack", "cce")
_CALLED = {"compile": "torch.compile", "chunked": "chunks", "linear_cross_entropy": "`linear_cross_entropy`"}
CACHE_RIVALS = ("over_memmap", "over_pread", "over_safe_open", "over_file")


def vocab_parallel(record: dict[str, Any]) -> str:
    """One process with all classes beside two with half of them each."""
    rows = []
    for point in record["points"]:
        time, worked = point["time"], point["processor"]
        seconds = (f"{time[one]:.3f}" for one in ("one", "two"))
        rows.append([point["call"], *seconds, f"{time['factor']:.2f}", f"{worked['factor']:.2f}"])
    header = [f"{record['rows']} x {record['classes']}", "one process, s", "two, s", "factor", "processor's, factor"]
    caption = f"The machine's load was {record['load'][0]:.0f} at the end. " + source(record)
    return grid(header, rows) + "\n\n" + caption
