"""Sentences about a result, made from its numbers: also those that say that something did not help."""

from __future__ import annotations

from tgt_fast.demos.lm.memory import ROWS
from tgt_fast.demos.lm.results import CACHED, RECORDS, DemoResult
from tgt_fast.report.numbers import Difference

LABELS = {
    "one-hot": "one-hot",
    "distillation": "distillation",
    "distillation-records": "distillation, records",
    "distillation-cached": "distillation, cache",
    "one-hot-plenty": "one-hot, plenty",
    "distillation-plenty": "distillation, plenty",
}


def difference(result: DemoResult, method: str, other: str) -> Difference:
    """Bits per byte that ``method`` saves against ``other``."""
    return Difference(result.ahead(other, method, "bits_per_byte"), "bits per byte", 3)


def findings(result: DemoResult) -> list[str]:
    """One comparison a sentence."""
    few = result.settings.few
    said = [
        f"With {few} windows of text, the teacher's soft labels against one-hot labels: "
        f"{difference(result, 'distillation', 'one-hot').verdict}.",
        f"With text in plenty, the same: {difference(result, 'distillation-plenty', 'one-hot-plenty').verdict}.",
        f"Records of the teacher's {result.settings.k} likeliest tokens of {result.settings.tokens:,}, against one-hot "
        f"labels: {difference(result, RECORDS, 'one-hot').verdict}. {_of_the_gain(result)}",
        _exactness(result),
    ]
    times = {name: result.mean(name, "step_ms") for name in (RECORDS, "distillation", CACHED)}
    megabytes = result.mean(CACHED, "cache_bytes") / 1e6
    said.append(
        f"A step takes {times[CACHED]:.0f} ms with the cache, {times[RECORDS]:.0f} ms when each record is made again "
        f"and {times['distillation']:.0f} ms with the teacher's hidden states and head; the cache holds "
        f"{megabytes:.1f} MB."
    )
    if result.memory is not None:
        linear, logits, eager = (result.memory[way] / 1e6 for way in ("linear", "logits", "eager"))
        said.append(
            f"Memory at the peak of the loss of {ROWS:,} tokens: {linear:.0f} MB from hidden states, {logits:.0f} MB "
            f"from logits, {eager:.0f} MB in PyTorch's way."
        )
    return said


def _of_the_gain(result: DemoResult) -> str:
    records, whole = (difference(result, name, "one-hot").mean for name in (RECORDS, "distillation"))
    if whole <= 0 or records <= 0:
        return "Beside the teacher's whole distribution there is nothing to compare."
    return f"That is {records / whole:.0%} of what the teacher's whole distribution gains."


def _exactness(result: DemoResult) -> str:
    if result.cache_is_exact:
        return "With and without the cache, the students are equally good to the last digit, as they should be."
    gap = max(abs(point) for point in difference(result, CACHED, RECORDS).points)
    return f"With and without the cache, the students differ by up to {gap:.6f} bits per byte; they should not."
