"""Calls of the loss from hidden states, for its tests: inputs, the float64 truth, and the comparison of the two."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numerics import arithmetic_bar, assert_close, gradient_bar, magnitude
from torch import Tensor

import tgt_fast as tgt
from tgt_fast import TeacherTopK
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.kernels.reference import distillation_loss as reference_loss

BUDGETS = {"one row": 1, "three rows": 3 * 4 * 23 * 4, "all rows": 1 << 30}  # bytes, of seven rows of 23 classes
THREE_ROWS = 3 * (4 * 23 + 5 * 12)  # bytes, of a student's logits and a record of five classes
NAMES = ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias")
STUDENT = NAMES[:3]


@dataclass
class Heads:
    """Two linear heads and their hidden states. Without a weight the teacher's hidden states are its logits."""

    tensors: dict[str, Tensor | None]
    student: tuple[float, float | None] = (1.0, None)  # scale, softcap
    teacher: tuple[float, float | None] = (1.0, None)
    target: Tensor | None = None
    vocabulary: dict[str, Any] = field(default_factory=dict)
    topk: TeacherTopK | None = None  # in the place of the teacher's tensors

    @property
    def present(self) -> list[str]:
        return [name for name in NAMES if self.tensors.get(name) is not None]

    def options(self) -> dict[str, Any]:
        made: dict[str, Any] = {"student_scale": self.student[0], "student_softcap": self.student[1]}
        if self.tensors["teacher_weight"] is not None:
            made |= {"teacher_scale": self.teacher[0], "teacher_softcap": self.teacher[1]}
        return made | self.vocabulary


@dataclass
class Outcome:
    loss: Tensor
    grads: dict[str, Tensor]
    stats: Any = None


def heads(
    rows: int | tuple[int, ...] = 7, classes: tuple[int, int] = (23, 23), hidden: tuple[int, int] = (8, 6), *,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32), biased: bool = True, given: bool = False,
    labeled: bool = False, seed: int = 0, **options: Any,
) -> Heads:  # fmt: skip
    """Random heads whose second rows' logits are peaked: flat rows alone hide errors of large probabilities."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows,) if isinstance(rows, int) else rows

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    tensors: dict[str, Tensor | None] = {}
    for side, count, width, dtype in zip(("student", "teacher"), classes, hidden, dtypes, strict=True):
        states = draw(math.prod(shape), width)
        states[1::2] *= 4.0
        tensors[f"{side}_hidden"] = states.reshape(*shape, width).to(dtype)
        tensors[f"{side}_weight"] = (draw(count, width) / math.sqrt(width)).to(dtype)
        tensors[f"{side}_bias"] = draw(count).to(dtype) if biased else None
    if given:
        tensors["teacher_hidden"] = draw(*shape, classes[1]).to(dtypes[1]) * 2
        tensors["teacher_weight"] = tensors["teacher_bias"] = None
    target = torch.randint(0, min(classes), shape, generator=generator) if labeled else None
    return Heads(tensors, target=target, **options)


def topk_case(
    rows: int | tuple[int, ...] = 7, classes: tuple[int, int] = (23, 23), *, k: int = 5, tail: str = "bucket",
    temperature: float = 1.0, dtype: torch.dtype = torch.float32, log_probs: torch.dtype | None = None, **options: Any,
) -> Heads:  # fmt: skip
    """A student's head, and a record of a teacher that agrees with it more or less."""
    case = heads(rows, classes, (8, 6), dtypes=(dtype, torch.float64), given=True, **options)
    logits = case.tensors["teacher_hidden"]
    assert logits is not None
    topk = tgt.topk_teacher(logits.to(torch.float64 if dtype == torch.float64 else torch.float32), k, temperature)
    rest = topk.rest()
    assert rest is not None
    if log_probs is not None:
        topk = replace(topk, log_probs=topk.log_probs.to(log_probs), tail_log_prob=rest.to(log_probs))
    case.topk = replace(topk, tail=tail)
    case.tensors["teacher_hidden"] = None
    return case


def run(
    case: Heads, *, wanted: tuple[str, ...] | None = None, upstream: Tensor | float | None = None, **options: Any
) -> Outcome:
    """The public function and the gradients that are wanted, by default all."""
    wanted = tuple(case.present) if wanted is None else wanted
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_(name in wanted)
        for name, tensor in case.tensors.items()
    }
    arguments: dict[str, Any] = dict(leaves)
    if case.topk is not None:
        arguments["teacher_logits"] = case.topk
    elif leaves["teacher_weight"] is None:
        arguments = {**leaves, "teacher_logits": leaves["teacher_hidden"], "teacher_hidden": None}
    out = tgt.linear_distillation_loss(target=case.target, **arguments, **case.options(), **options)  # type: ignore[arg-type, misc]
    loss, stats = out if isinstance(out, tuple) else (out, None)
    return _differentiate(loss, {name: leaves[name] for name in wanted}, upstream, stats)  # type: ignore[misc]


def truth(
    case: Heads, *, wanted: tuple[str, ...] | None = None, upstream: Tensor | float | None = None, **options: Any
) -> Outcome:
    """All logits in float64; classes that are left out are cut out, and nothing is masked."""
    wanted = tuple(case.present) if wanted is None else wanted
    t: dict[str, Any] = {
        name: None if x is None else x.detach().double().requires_grad_(name in wanted)
        for name, x in case.tensors.items()
    }
    rows = t["student_hidden"].shape[:-1]
    student = _logits(t["student_hidden"], t["student_weight"], t["student_bias"], *case.student)
    teacher = t["teacher_hidden"]
    if t["teacher_weight"] is not None:
        teacher = _logits(teacher, t["teacher_weight"], t["teacher_bias"], *case.teacher)
    teacher_classes = teacher.shape[-1] if case.topk is None else case.topk.num_classes
    student_ids, teacher_ids = shared_ids(case, student.shape[-1], teacher_classes)
    student = student[..., student_ids]
    target = case.target
    if target is not None:
        place = torch.full((int(max(student_ids)) + 1,), -1)
        place[student_ids] = torch.arange(len(student_ids))
        target = torch.where(target >= 0, place[target.clamp(0, len(place) - 1)], target)
        target = target.reshape(-1)
    weight, normalizer = options.pop("sample_weight", None), options.pop("normalizer", None)
    weight = None if weight is None else weight.reshape(-1)
    student, stats = student.reshape(-1, student.shape[-1]), None
    if case.topk is not None:
        loss: Any = tgt.distillation_loss(
            student, _cut(case.topk, teacher_ids), target, sample_weight=weight, normalizer=normalizer,
            backend="reference", **options,
        )  # fmt: skip
    else:
        teacher = teacher[..., teacher_ids].reshape(-1, len(teacher_ids))
        options.setdefault("teacher_temperature", options.get("temperature", 1.0))
        loss, stats = reference_loss(
            student, teacher, target, weight, normalizer, DistillOptions(**options), want_stats=True
        )
    if options.get("reduction") == "none":
        loss = loss.reshape(rows)
    return _differentiate(loss, {name: t[name] for name in wanted}, upstream, stats)


def _cut(topk: TeacherTopK, kept: list[int]) -> TeacherTopK:
    """The record in float64, over the classes that are kept, entry by entry; its rows in one dimension."""
    place = {own: new for new, own in enumerate(kept)}
    ids, log_probs = topk.ids.reshape(-1, topk.k).clone(), topk.log_probs.reshape(-1, topk.k).double().clone()
    for entry in itertools.product(*map(range, ids.shape)):
        new = place.get(int(ids[entry]))
        ids[entry] = 0 if new is None else new
        log_probs[entry] = -math.inf if new is None else log_probs[entry]
    rest = topk.rest()
    rest = None if rest is None else rest.double().reshape(-1)
    return TeacherTopK(ids, log_probs, rest, topk.temperature, len(kept), topk.tail)


def shared_ids(case: Heads, student_classes: int, teacher_classes: int) -> tuple[list[int], list[int]]:
    """The classes that both sides have, by the rule alone."""
    size, ids, mask = (case.vocabulary.get(name) for name in ("vocab_size", "vocab_map", "vocab_mask"))
    if ids is not None:
        pairs = sorted((int(own), other) for other, own in enumerate(ids) if own >= 0)
    else:
        pairs = [(own, own) for own in range(min(student_classes, teacher_classes) if size is None else size)]
    if mask is not None:
        pairs = [pair for pair in pairs if mask[pair[0]]]
    return [own for own, _ in pairs], [other for _, other in pairs]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    made = scale * torch.nn.functional.linear(hidden, weight, bias)
    return made if softcap is None else softcap * torch.tanh(made / softcap)


def _differentiate(loss: Tensor, leaves: dict[str, Tensor], upstream: Tensor | float | None, stats: Any) -> Outcome:
    if not leaves:
        return Outcome(loss.detach(), {}, stats)
    factor = torch.ones_like(loss) if upstream is None else torch.as_tensor(upstream).to(loss.dtype).expand_as(loss)
    grads = torch.autograd.grad(loss, list(leaves.values()), factor)
    return Outcome(loss.detach(), dict(zip(leaves, grads, strict=True)), stats)


def largest_logit(case: Heads, temperature: float) -> float:
    t = case.tensors
    assert t["student_hidden"] is not None
    assert t["student_weight"] is not None
    return magnitude(
        _logits(
            t["student_hidden"].double(),
            t["student_weight"].double(),
            None if t["student_bias"] is None else t["student_bias"].double(),
            *case.student,
        )
        / min(1.0, temperature)
    )


def assert_matches(case: Heads, found: Outcome, expected: Outcome, *, temperature: float = 1.0, per_row: float) -> None:
    """Loss and gradients within the bars of their dtypes. ``per_row``: the upstream gradient that a row sees."""
    present = [x for x in case.tensors.values() if x is not None]
    present += [] if case.topk is None else [case.topk.log_probs]
    is_fp64 = any(x.dtype == torch.float64 for x in present)
    loss_dtype = torch.float64 if is_fp64 else torch.float32
    assert found.loss.dtype == loss_dtype
    largest = largest_logit(case, temperature)
    assert case.tensors["student_hidden"] is not None
    rows = math.sqrt(max(1, math.prod(case.tensors["student_hidden"].shape[:-1])))
    floor = 1e-2 * max(1.0, temperature**2) * rows * per_row
    assert_close("loss", found.loss, expected.loss, bar=arithmetic_bar(loss_dtype, largest), floor=floor)
    assert found.grads.keys() == expected.grads.keys()
    for name, grad in found.grads.items():
        tensor, reference = case.tensors[name], expected.grads[name]
        assert tensor is not None
        assert grad.dtype == tensor.dtype
        small = 1e-2 * temperature * rows * per_row
        bar = gradient_bar(grad.dtype, loss_dtype, largest, reference, small)
        assert_close(name, grad, reference, bar=bar, floor=small)


def check(
    case: Heads, *, backend: str, per_row: float | None = None, upstream: Tensor | float | None = None,
    memory_budget: int | None = None, wanted: tuple[str, ...] | None = None, **options: Any,
) -> Outcome:  # fmt: skip
    """Evaluates one call and holds it against the truth."""
    found = run(
        case, backend=backend, upstream=upstream, memory_budget=memory_budget, wanted=wanted, **options
    )  # fmt: skip
    expected = truth(case, upstream=upstream, wanted=wanted, **options)
    assert case.tensors["student_hidden"] is not None
    if per_row is None:
        count = math.prod(case.tensors["student_hidden"].shape[:-1])
        per_row = 1.0 / max(1, count) if options.get("reduction", "mean") == "mean" else 1.0
    assert_matches(case, found, expected, temperature=options.get("temperature", 1.0), per_row=per_row)
    return found
