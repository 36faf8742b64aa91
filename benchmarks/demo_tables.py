"""The tables of what the demos learned, from benchmarks/results/DEMO.json."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from table_parts import grid

DIGITS_NAMES = {
    "one-hot": "one-hot labels",
    "distillation": "distillation",
    "distillation-augmented": "distillation + best input augmentation",
    "tgt-prior": "teacher-guided, prior",
    "tgt-random": "teacher-guided, random",
    "tgt-gradient": "teacher-guided, gradient",
    "tgt-persistent": "teacher-guided, persistent",
}

GLYPHS_NAMES = {
    "one-hot": "one-hot labels",
    "distillation": "distillation",
    "distillation-mixup": "distillation + mixup",
    "distillation-augmented": "distillation + best input augmentation",
    "tgt-prior": "teacher-guided, prior",
    "tgt-random": "teacher-guided, random",
    "tgt-random-tail": "teacher-guided, random, tail-aware",
    "tgt-gradient": "teacher-guided, gradient",
    "tgt-random-replay": "teacher-guided, random, replay",
    "tgt-gradient-replay": "teacher-guided, gradient, replay",
    "tgt-gradient-augmented": "teacher-guided, gradient, replay, augmentation in turn",
}


LM_NAMES = {
    "one-hot": "one-hot labels",
    "distillation": "distillation, hidden states and heads",
    "distillation-records": "distillation, records made each step",
    "distillation-cached": "distillation, records from the cache",
    "one-hot-plenty": "one-hot labels, text in plenty",
    "distillation-plenty": "distillation, text in plenty",
}


DOCSTRINGS_NAMES = {
    "one-hot": "one-hot labels",
    "distillation": "distillation",
    "tgt-random": "teacher-guided, random",
    "tgt-gradient": "teacher-guided, gradient",
}

RETRIEVAL_NAMES = {
    "one-hot": "one-hot labels",
    "distillation": "distillation",
    "uniform-negatives": "distillation + real further passages",
    "tgt-random": "teacher-guided, random",
}


def _spread(value: dict[str, Any], digits: int = 1) -> str:
    return f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f}"


def _accuracy(name: str, method: dict[str, Any], *more: str) -> list[str]:
    """A row of a demo that classifies; ``more`` stands before the seconds."""
    parts = (f"{method[part]:.1f}" for part in ("head", "middle", "tail", "agreement"))
    return [name, _spread(method["accuracy"]), *parts, f"{method['mean_kl']:.3f}", *more, f"{method['seconds']:.1f}"]


def _made_by(record: dict[str, Any]) -> str:
    return f"torch {record['versions']['torch']}; commit {record['commit'][:7]}."


def digits(record: dict[str, Any]) -> str:
    rows = [_accuracy(name, record["methods"][key]) for key, name in DIGITS_NAMES.items()]
    seeds = len(record["seeds"])
    caption = (
        f"Test accuracy in percent (mean and standard deviation of {seeds} seeds), by class frequency, agreement and "
        "mean KL divergence with the teacher, seconds of training. 118 long-tailed labelled images; every method sees "
        "as many student examples a step. `tgt-fast demo digits`; " + _made_by(record)
    )
    return grid(["", "accuracy", "head", "middle", "tail", "agreement", "KL", "s"], rows) + "\n\n" + caption


def glyphs(record: dict[str, Any]) -> str:
    rows = [_accuracy(name, record["methods"][key]) for key, name in GLYPHS_NAMES.items()]
    drawn = record["pictures"]
    caption = (
        f"Test accuracy in percent (mean and standard deviation of {len(record['seeds'])} seeds), by class frequency, "
        f"agreement and mean KL divergence with the teacher (which is right in "
        f"{fmean(record['teacher']['labeler_accuracy']):.1f} %, {fmean(record['teacher']['tail_accuracy']):.1f} % on "
        f"the rarest third), processor seconds of training. {record['labels']} long-tailed labelled images of "
        f"{drawn['pool_families']} families, {drawn['test_images']:,} test images of {drawn['test_families']} others; "
        f"every method sees as many student examples a step. `{record['command']}`, "
        f"{record['processor_seconds']:.0f} processor seconds; " + _made_by(record)
    )
    table = grid(["", "accuracy", "head", "middle", "tail", "agreement", "KL", "s"], rows) + "\n\n" + caption
    return f"{table}\n\n{_glyphs_labels(record)}" if "sample_size_factors" in record else table


def glyphs_line(record: dict[str, Any]) -> str:
    """What the glyphs demo shows, in a sentence for the README."""
    methods, leads, drawn = record["methods"], record["leads"], record["pictures"]
    best, rare = (methods[leads[name]["over"]] for name in ("accuracy", "tail"))
    ours = methods[record["best_tgt"]]
    same = {f["method"]: _times(f) for f in record["sample_size_factors"] if f["labels"] == record["labels"]}
    return (
        f"With {record['labels']} long-tailed labels of letters and digits, tested on {drawn['test_families']} font "
        f"families that neither teacher nor student has seen, it gets {ours['accuracy']['mean']:.1f} % right, the best "
        f"method without exploration, augmentation included, {best['accuracy']['mean']:.1f} %; on the rarest third "
        f"{ours['tail']:.1f} % against {rare['tail']:.1f} %. For the same accuracy distillation needs "
        f"{same['distillation']} times as many labels, training without the teacher {same['one-hot']} times "
        f"(`{record['command']}`)."
    )


def _times(found: dict[str, Any]) -> str:
    return f"{'more than ' if any(found['beyond']) else ''}{fmean(found['factors']):.1f}"


def _glyphs_labels(record: dict[str, Any]) -> str:
    rows = []
    for found in record["sample_size_factors"]:
        low, high = min(found["factors"]), max(found["factors"])
        rows.append(
            [
                GLYPHS_NAMES[found["method"]],
                f"{found['labels']:,}",
                f"{found['accuracy']:.1f}",
                f"{_times(found)} ({low:.1f} to {high:.1f})",
            ]
        )
    most = max(point["labels"] for line in record["curve"].values() for point in line)
    caption = (
        f"Times the labels that a method needs for the accuracy of {GLYPHS_NAMES[record['best_tgt']]} (mean, lowest "
        f"and highest of {len(record['seeds'])} seeds). “More than”: in some seed it does not get there with {most:,}."
    )
    return grid(["", "TGT's labels", "its accuracy", "times as many"], rows) + "\n\n" + caption


_SERVED = {
    "fresh": "every example fresh",
    "replay": "replayed, drawn uniformly",
    "replay-disagreement": "replayed, by disagreement",
}


def replay(record: dict[str, Any]) -> str:
    rows = []
    for method in record["methods"]:
        students = {kind: record["students"][f"{method}, {kind}"] for kind in _SERVED}
        fresh = students["fresh"]
        for kind, called in _SERVED.items():
            reached = students[kind]["accuracy"]
            ahead = [a - b for a, b in zip(reached, fresh["accuracy"], strict=True)]
            share = sum(students[kind]["decoded"]) / sum(fresh["decoded"])
            rows.append(
                [
                    f"{method.removeprefix('tgt-')}, {called}",
                    f"{fmean(reached):.1f} ± {stdev(reached):.1f}",
                    "" if kind == "fresh" else f"{fmean(ahead):+.2f} ± {stdev(ahead) / len(ahead) ** 0.5:.2f}",
                    f"{fmean(students[kind]['decoded']):,.0f}",
                    f"{share:g}",
                ]
            )
    caption = (
        f"Test accuracy in percent (mean and standard deviation of {len(record['seeds'])} seeds, neither the demo's "
        "nor those it was tuned on), points ahead of fresh examples (paired by seed, with the standard error of the "
        f"mean), and rows that the teacher decoded. `SyntheticReplay(reuse={record['reuse']})`, by disagreement out of "
        f"{record['candidates']} times as many rows. `{record['command']}`; " + _made_by(record)
    )
    return grid(["", "accuracy", "ahead", "decoded rows", "of fresh"], rows) + "\n\n" + caption


_TAIL = {
    "tgt-batch": "batch anchors",
    "tgt-tail": "tail-aware",
    "tgt-batch-adjusted": "batch anchors, logit adjustment",
    "tgt-tail-adjusted": "tail-aware, logit adjustment",
}


def tail(record: dict[str, Any]) -> str:
    students = record["students"]
    first = students["tgt-batch"]

    def ahead(kind: str, part: str) -> str:
        if kind == "tgt-batch":
            return ""
        gaps = [a - b for a, b in zip(students[kind][part], first[part], strict=True)]
        return f"{fmean(gaps):+.2f} ± {stdev(gaps) / len(gaps) ** 0.5:.2f}"

    rows = [
        [
            called,
            f"{fmean(students[kind]['accuracy']):.1f} ± {stdev(students[kind]['accuracy']):.1f}",
            *(f"{fmean(students[kind][part]):.1f}" for part in ("head", "middle", "tail")),
            ahead(kind, "accuracy"),
            ahead(kind, "tail"),
        ]
        for kind, called in _TAIL.items()
    ]
    caption = (
        f"Test accuracy in percent (mean and standard deviation of {len(record['seeds'])} seeds, neither the demo's "
        "nor those it was tuned on), by class frequency, and points ahead of batch anchors, over all and in the rarest "
        "third (paired by seed, with the standard error of the mean). Random exploration of the digits demo, "
        f"{record['steps']} steps; five seeds share a teacher. Tail-aware: anchors drawn in proportion to n to the "
        f"power of -{record['power']:g}, noise up to {record['sigma']:g} times as wide for the rarest class. "
        f"`{record['command']}`; " + _made_by(record)
    )
    return grid(["", "accuracy", "head", "middle", "tail", "ahead", "ahead, tail"], rows) + "\n\n" + caption


def methods(record: dict[str, Any]) -> str:
    students, rows, group = record["students"], [], ""
    plain = students["plain"]
    for made in students.values():
        if made["group"] != group:
            group = made["group"]
            rows.append([f"*{group}*", *[""] * 8])
        cost = made["step_milliseconds"] / plain["step_milliseconds"]
        gaps = [a - b for a, b in zip(made["accuracy"]["per_seed"], plain["accuracy"]["per_seed"], strict=True)]
        ahead = "" if made is plain else f"{fmean(gaps):+.1f} ± {stdev(gaps) / len(gaps) ** 0.5:.1f}"
        parts = (f"{made[part]:.1f}" for part in ("head", "middle", "tail"))
        number = made["number"]
        chosen = "" if number is None else f"{number[0]} {number[1]:g}"
        chosen = f"({chosen})" if chosen and not made["chosen"] else chosen
        mean_kl = f"{made['mean_kl']:.2f}"
        rows.append([made["label"], chosen, _spread(made["accuracy"]), ahead, *parts, mean_kl, f"{cost:.1f}"])
    caption = (
        "What a method leaves open (in brackets: as its paper or a round number has it; else chosen on the validation "
        "split), test accuracy in percent (mean and standard deviation of "
        f"{len(record['seeds'])} seeds), points ahead of distillation (paired by seed, with the standard error of the "
        "mean), by class frequency, mean KL divergence from the teacher, and processor time of a step with that of "
        "distillation as 1, evaluation and second stages included, measured on a shared machine. "
        f"{record['steps']} steps; one teacher. `{record['command']}`; " + _made_by(record)
    )
    return grid(["", "chosen", "accuracy", "ahead", "head", "middle", "tail", "KL", "step"], rows) + "\n\n" + caption


def docstrings(record: dict[str, Any]) -> str:
    methods = record["methods"]
    rows = [
        _accuracy(name, methods[key], f"{methods[key]['synthetic']:,.0f}") for key, name in DOCSTRINGS_NAMES.items()
    ]
    texts, pool = record["texts"], record["pool"]
    caption = (
        f"Test accuracy in percent (mean and standard deviation of {len(record['seeds'])} seeds) over {texts['test']} "
        f"texts of other modules, by class frequency, agreement and mean KL divergence with the labeler (which is "
        f"right in {record['labeler_accuracy']:.1f} %), synthetic texts, seconds of training. {sum(texts['counts'])} "
        f"long-tailed labelled texts; every method sees as many texts a step. Writing and labelling "
        f"{pool['texts']:,} texts takes {pool['seconds']:.0f} s on one core. `tgt-fast demo docstrings`, "
        f"{record['total_seconds']:.0f} s; " + _made_by(record)
    )
    header = ["", "accuracy", "head", "middle", "tail", "agreement", "KL", "synthetic", "s"]
    return grid(header, rows) + "\n\n" + caption


def lm(record: dict[str, Any]) -> str:
    rows = []
    for key, name in LM_NAMES.items():
        method = record["methods"][key]
        rows.append(
            [
                name,
                _spread(method["bits_per_byte"], 3),
                f"{method['windows']:.0f}",
                f"{method['steps']:.0f}",
                f"{method['step_ms']:.0f}",
                f"{method['seconds']:.1f}",
            ]
        )
    teacher, settings, seeds = record["teacher"], record["settings"], len(record["seeds"])
    untrained = record["methods"]["one-hot"]["before"]
    peaks = record["loss_peak_bytes"]
    cached = record["methods"]["distillation-cached"]
    memory = (
        f"Peak memory of the loss of 8,192 tokens: {peaks['linear'] / 1e6:.0f} MB from hidden states, "
        f"{peaks['logits'] / 1e6:.0f} MB from logits, {peaks['eager'] / 1e6:.0f} MB in eager PyTorch. "
        if peaks
        else ""
    )
    caption = (
        f"Bits per byte of held-out modules of the standard library (mean and standard deviation of {seeds} seeds); "
        f"the four-layer teacher: {teacher['bits_per_byte']:.3f}, an untrained student: {untrained:.2f}. "
        f"{settings['tokens']:,} tokens, windows of {settings['length']}. A step: the median on one core, behind the "
        f"first epoch. The cache keeps {settings['k']} classes a token in {cached['cache_bytes'] / 1e6:.1f} MB. "
        f"{memory}`tgt-fast demo lm`; " + _made_by(record)
    )
    return grid(["", "bits per byte", "windows", "steps", "ms a step", "s"], rows) + "\n\n" + caption


def retrieval(record: dict[str, Any]) -> str:
    depths = list(record["teacher"])
    rows = []
    for key, name in RETRIEVAL_NAMES.items():
        method = record["methods"][key]
        found = [method["per_seed"][depth] for depth in depths]
        rows.append([name, *(_spread(one) for one in found), f"{method['seconds']:.1f}"])
    rows.append(["the teacher itself", *(f"{record['teacher'][depth]:.1f}" for depth in depths), ""])
    pairs = record["pairs"]
    caption = (
        f"Percent of {pairs['test']} summaries of other modules whose passage is among the first so many (mean and "
        f"standard deviation of {len(record['seeds'])} seeds), seconds of training. {pairs['labelled']} labelled "
        f"pairs; every method reads as many texts a step. Writing and labelling a seed's synthetic passages takes "
        f"{record['writing_seconds']:.0f} s on one core. `tgt-fast demo retrieval`, {record['total_seconds']:.0f} s; "
        + _made_by(record)
    )
    return grid(["", *(f"recall@{depth}" for depth in depths), "s"], rows) + "\n\n" + caption
