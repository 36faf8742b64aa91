"""A look at what a sampler makes for a student: pictures, a climb, and the diagnostics of the bound."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any, Final

import torch
from torch import Tensor, nn

from tgt_fast._png import png
from tgt_fast._rng import isolated_rng
from tgt_fast.explore import LatentSampler, SyntheticReplay
from tgt_fast.explore.by_class import label_argument
from tgt_fast.explore.twin import twin
from tgt_fast.losses.distill import DistillationLoss
from tgt_fast.teacher import Teacher, tree
from tgt_fast.teacher.batches import Batch
from tgt_fast.teacher.modes import eval_mode
from tgt_fast.teacher.returned import LogitsOf
from tgt_fast.train.diagnostics import ascent, measured
from tgt_fast.train.pictures import images_of

NAME: Final = "exploration.json"
EXAMPLES: Final = 64  # that are looked at
SHOWN: Final = 8
ASCENT_STEPS: Final = 8
ASCENT_STEP_SIZE: Final = 0.5  # of a sampler that takes no steps of its own
_SIDE: Final = 96  # pixels of an image, at most
_LETTERS: Final = 400


def probe(
    sampler: LatentSampler | SyntheticReplay,
    student: nn.Module,
    batch: Batch,
    loss: Any = None,
    logits_of: LogitsOf = None,
) -> Any:
    """The findings, as JSON: ``pictures``, ``ascent`` and ``sources``; of a replay, ``replay``, its statistics.

    Sampler, student and the global generators are left as they are. A part that cannot be made holds its ``error``.

    Args:
        batch: real examples, the first of which are shown.
        loss: a :class:`DistillationLoss`, whose soft term is measured; in the place of any other the divergence that
            the sampler climbs.
        logits_of: where they are in what the student returns; by default as the sampler has it.
    """
    replay = sampler if isinstance(sampler, SyntheticReplay) else None
    if isinstance(sampler, SyntheticReplay):
        sampler = sampler.sampler
    if logits_of is not None:
        sampler = twin(sampler, logits_of=logits_of)
    options = sampler.options
    if not isinstance(loss, DistillationLoss):
        loss = DistillationLoss(divergence=options.divergence, beta=options.beta, temperature=options.temperature)
    soft = DistillationLoss(
        divergence=loss.options.divergence, beta=loss.options.beta, temperature=loss.options.temperature,
        reduction="none",
    )  # fmt: skip
    ids, x, y = (None if part is None else _first(part, EXAMPLES) for part in batch)
    with isolated_rng(), eval_mode(student):
        made = {
            "pictures": _tried(lambda: _pictures(sampler, student, ids, x, y)),
            "ascent": _tried(lambda: _ascend(sampler, student, x, y)),
            "sources": _tried(lambda: _sources(sampler, student, ids, x, y, soft)),
        }
        if replay is not None:
            made["replay"] = _tried(lambda: replay.statistics(student, logits_of=logits_of))
    return {"mode": sampler.mode, "examples": tree.batch_size(x), **made}


def _tried(work: Any) -> Any:
    try:
        return work()
    except Exception as error:  # a report shows what it can
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _first(part: Any, count: int) -> Any:
    return tree.map_batched(lambda leaf: leaf[:count], part)


def _explored(
    sampler: LatentSampler, student: nn.Module, ids: Tensor | None, x: Any, y: Tensor | None, **changes: Any
) -> Any:
    made = twin(sampler, **changes)
    if made.options.needs_scale and made.scale is None:
        made.calibrate([x], progress=False)
    if made.mode == "persistent" and ids is None:
        ids = torch.arange(tree.batch_size(x))
    with torch.enable_grad():
        of_rows = label_argument(made, y, tree.batch_size(x), tree.first_device(x))
        return tree.detach(made(x, student=student, sample_ids=ids, **of_rows).x)


def _sources(
    sampler: LatentSampler, student: nn.Module, ids: Tensor | None, x: Any, y: Tensor | None, loss: DistillationLoss
) -> list[dict[str, Any]]:
    teacher = sampler.teacher
    sources: dict[str, tuple[Any, Tensor | None]] = {"real": (x, y)}
    with torch.no_grad():
        sources["reconstruction"] = (teacher.decode(teacher.encode(x)), None)
    sources[f"synthetic, {sampler.mode}"] = (_explored(sampler, student, ids, x, y), None)
    for mode in ("random", "gradient"):  # to compare with
        if mode != sampler.mode and sampler.mode != "prior":
            sources[mode] = (_explored(sampler, student, ids, x, y, mode=mode, record_disagreement=False), None)
    return [
        dataclasses.asdict(measured(name, made, labels, teacher, student, x, loss, sampler.options.logits_of))
        for name, (made, labels) in sources.items()
    ]


def _ascend(sampler: LatentSampler, student: nn.Module, x: Any, y: Tensor | None) -> dict[str, Any]:
    size = sampler.step_size if sampler.mode in ("gradient", "persistent") else ASCENT_STEP_SIZE
    values = ascent(sampler, student, x, y, steps=ASCENT_STEPS, step_size=size)
    return {"step_size": size, "units": sampler.units, "values": list(values)}


@torch.no_grad()
def _pictures(
    sampler: LatentSampler, student: nn.Module, ids: Tensor | None, x: Any, y: Tensor | None
) -> dict[str, Any]:
    """``{"kind": "images" or "texts", "rows": [[name, tiles]]}``: the same examples in each row."""
    rows = _of_all_classes(y, tree.batch_size(x))
    x = tree.take(x, rows)
    ids = None if ids is None else ids[rows.to(ids.device)]
    teacher = sampler.teacher
    labels = None if y is None or y.ndim != 1 else y[rows.to(y.device)]
    made = _explored(sampler, student, ids, x, labels, anchors="batch", replicas=1)
    batches = {"anchor": x, "reconstruction": teacher.decode(teacher.encode(x)), f"synthetic, {sampler.mode}": made}
    kinds = {name: _shown(teacher, of_name, x) for name, of_name in batches.items()}
    if any(shown is None for shown in kinds.values()):
        return {"error": "examples of this kind are neither images nor texts"}
    known = None if labels is None else labels.tolist()
    lines = []
    for name, shown in kinds.items():
        opinions = _opinions(teacher.label(batches[name]), known)
        lines.append([name, [{**tile, **opinion} for tile, opinion in zip(shown or [], opinions, strict=True)]])
    kind = "images" if "image" in lines[0][1][0] else "texts"
    return {"kind": kind, "rows": lines}


def _of_all_classes(y: Tensor | None, size: int) -> Tensor:
    """The places of the examples to show: one of each class first."""
    places = list(range(size))
    if y is not None and y.ndim == 1:
        labels, seen = y.tolist(), set()
        firsts = [place for place in places if labels[place] not in seen and not seen.add(labels[place])]  # type: ignore[func-returns-value]
        firsts = sorted(firsts[:SHOWN], key=lambda place: labels[place])
        places = firsts + [place for place in places if place not in firsts]
    return torch.tensor(places[:SHOWN])


def _shown(teacher: Teacher, x: Any, like: Any) -> list[dict[str, str]] | None:
    texts: Any = getattr(teacher, "texts", None)
    if texts is not None:
        return [{"text": text[:_LETTERS]} for text in texts(x)]
    images = images_of(x, like=like, most=_SIDE)
    if images is not None:
        return [{"image": base64.b64encode(png(image)).decode("ascii")} for image in images]
    tokens = [leaf for leaf in tree.batched_leaves(x) if not leaf.is_floating_point() and leaf.ndim == 2]
    if tokens:  # no tokenizer to read them by
        return [{"text": " ".join(map(str, row))[:_LETTERS]} for row in tokens[0].tolist()]
    return None


def _opinions(logits: Tensor, known: list[int] | None) -> list[dict[str, Any]]:
    """The labeler's classes of examples, and whether each is another than it should be."""
    if logits.ndim != 2:
        return [{}] * len(logits)
    confidence, opinion = logits.softmax(-1).max(-1)
    return [
        {"opinion": o, "confidence": c, "differs": known is not None and known[place] >= 0 and known[place] != o}
        for place, (o, c) in enumerate(zip(opinion.tolist(), confidence.tolist(), strict=True))
    ]
