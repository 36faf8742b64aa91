"""A teacher's top-k record: how one is made, what it is as an object, what is refused."""

from __future__ import annotations

import dataclasses
import math
import warnings
from types import ModuleType

import pytest
import torch
from emulated_gpu import tensors_on_an_emulated_gpu
from kernel_calls import forward, loss_and_gradients
from numerics import logits
from topk_kit import INF, dtypes, loss_and_gradient, peaked, tails
from torch.utils import _pytree as pytree

import tgt_fast as tgt
from tgt_fast import TeacherTopK
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.kernels.options import TOPK_DIVERGENCES, TopK
from tgt_fast.kernels.reference import topk as reference_topk
from tgt_fast.ops import topk

# Making a record


def test_a_record_of_logits_is_their_log_softmax() -> None:
    t = logits((2, 3), 40, 0, dtype=torch.float64)
    topk = tgt.topk_teacher(t, 7, 2.0)
    full = (t / 2.0).log_softmax(-1)
    torch.testing.assert_close(topk.log_probs, full.gather(-1, topk.ids))
    others = full.scatter(-1, topk.ids, -INF)
    torch.testing.assert_close(topk.tail_log_prob, others.logsumexp(-1))
    assert (full.topk(7).indices == topk.ids).all()
    assert (topk.shape, topk.k, topk.num_classes, len(topk)) == ((2, 3), 7, 40, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_in_pieces_are_the_rows_and_the_logits_stay(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    t = logits((3, 7), 40, 0, dtype=dtype)
    t[0, 2, 5], t[1, 3] = -INF, INF
    before = t.clone()
    whole = tgt.topk_teacher(t, 7, 2.0)
    monkeypatch.setattr(topk, "_CPU_PIECE", 100)  # two rows and a part
    pieces = tgt.topk_teacher(t, 7, 2.0)
    for name in ("ids", "log_probs", "tail_log_prob"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), equal_nan=True)
    assert torch.equal(t, before)
    assert whole.log_probs[1, 3].isnan().all()
    assert whole.log_probs[0].isfinite().all()


def test_a_tail_that_float32_could_not_hold_beside_the_largest() -> None:
    """exp(-150) is nothing beside 1, and a log-sum-exp relative to the largest of all would say -inf."""
    t = torch.tensor([[0.0, -150.0, -151.0, -INF]])
    topk = tgt.topk_teacher(t, 1)
    assert topk.tail_log_prob is not None
    torch.testing.assert_close(topk.tail_log_prob, torch.tensor([-150 + math.log1p(math.exp(-1))]))
    assert tgt.topk_teacher(t, 3).tail_log_prob.item() == -INF  # type: ignore[union-attr]


@dtypes
def test_the_tail_of_a_sure_teacher_keeps_its_digits(dtype: torch.dtype) -> None:
    t = peaked(8, 1000, 40.0, 0).to(dtype)
    topk = tgt.topk_teacher(t, 4, 1.0)
    full = t.double().log_softmax(-1)
    expected = full.scatter(-1, topk.ids, -INF).logsumexp(-1)
    assert expected.max() < -15  # one minus the listed mass would be rounding, or 0
    assert topk.tail_log_prob is not None
    torch.testing.assert_close(topk.tail_log_prob.double(), expected, rtol=1e-6, atol=1e-5)


def test_rows_that_are_short_or_no_distribution() -> None:
    t = logits(5, 6, 0)
    t[1, 1:] = -INF
    t[2], t[3, 2], t[4, 0] = -INF, math.nan, INF
    topk = tgt.topk_teacher(t, 3)
    assert topk.log_probs[1].tolist() == [0.0, -INF, -INF]
    assert topk.tail_log_prob is not None
    assert topk.tail_log_prob[1] == -INF
    assert topk.log_probs[2:].isnan().any(-1).all()
    everything = tgt.topk_teacher(t[:1], 6)
    assert everything.tail_log_prob is not None
    assert everything.tail_log_prob.tolist() == [-INF]


def test_a_record_from_elsewhere_derives_its_tail() -> None:
    ids = torch.tensor([[0, 1], [2, 3], [4, 5]])
    log_probs = torch.tensor([[0.5, 0.25], [0.6, 0.4], [1.0, 1e-3]]).log()  # the last two are all, or over
    topk = TeacherTopK(ids, log_probs, None, 1.0, 10)
    rest = topk.rest()
    assert rest is not None
    assert rest[0].item() == pytest.approx(math.log(0.25), rel=1e-5)
    assert rest[1:].isfinite().all()
    assert (rest[1:] < -14).all()
    assert TeacherTopK(ids[:1], log_probs[:1], None, 1.0, 2).rest().item() == -INF  # type: ignore[union-attr]
    assert TeacherTopK(ids, log_probs, None, 1.0, 10, "renormalize").rest() is None
    for divergence in TOPK_DIVERGENCES:
        loss = tgt.distillation_loss(logits(3, 10, 0), topk, divergence=divergence)
        assert loss.isfinite()
        assert loss > 0


# The record as an object


def test_a_record_is_a_tree_of_rows() -> None:
    topk = tgt.topk_teacher(logits((4, 3), 30, 1), 5, 2.0)
    part = topk[1:3]
    assert (part.shape, part.temperature, part.num_classes) == ((2, 3), 2.0, 30)
    assert torch.equal(part.ids, topk.ids[1:3])
    assert topk[torch.tensor([True, False, True, False])].shape == (2, 3)
    assert topk[0, 1].shape == ()
    with pytest.raises(ShapeError, match="selects rows"):
        topk[..., :2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        topk.tail = "uniform"  # type: ignore[misc]
    assert topk.to("meta").device.type == "meta"
    leaves, spec = pytree.tree_flatten(topk)
    assert [leaf.shape for leaf in leaves] == [(4, 3, 5), (4, 3, 5), (4, 3)]
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, TeacherTopK)
    assert again.tail == "bucket"
    doubled = pytree.tree_map(lambda x: x + x, {"a": topk})["a"]
    assert torch.equal(doubled.ids, 2 * topk.ids)


# What is refused


def test_a_record_cannot_be_brought_to_another_temperature() -> None:
    student, topk = logits(2, 9, 0), tgt.topk_teacher(logits(2, 9, 1), 3, 2.0)
    with pytest.raises(ArgumentError, match=r"temperature is 1, but the record was taken at 2.*cannot be brought"):
        tgt.distillation_loss(student, topk)
    with pytest.raises(ArgumentError, match=r"teacher_temperature is 3, but the record was taken at 2"):
        tgt.distillation_loss(student, topk, temperature=2.0, teacher_temperature=3.0)


def test_arguments() -> None:
    student, topk = logits(2, 9, 0), tgt.topk_teacher(logits(2, 9, 1), 3)
    for divergence in ("symmetric", "tvd", "mse"):
        with pytest.raises(ArgumentError, match=f"with a top-k record, got '{divergence}'"):
            tgt.distillation_loss(student, topk, divergence=divergence)
    with pytest.raises(ShapeError, match=r"student_logits have 8 classes, the record's ids point into 9"):
        tgt.distillation_loss(student[:, :8], topk)
    with pytest.raises(ShapeError, match=r"student_logits \(1, 9\) and the record's rows \(2,\)"):
        tgt.distillation_loss(student[:1], topk)
    with pytest.raises(ArgumentError, match="hard_weight is 1 but target is missing"):
        tgt.distillation_loss(student, topk, hard_weight=1.0)
    ids, log_probs = topk.ids, topk.log_probs
    for error, message, arguments in (
        (DTypeError, "integer class indices", (log_probs, log_probs, None, 1.0, 9)),
        (DTypeError, "log_probs must be float64", (ids, ids, None, 1.0, 9)),
        (ShapeError, r"\(2, 3\) and \(2, 2\)", (ids, log_probs[:, :2], None, 1.0, 9)),
        (ShapeError, "num_classes = 2 classes, got k = 3", (ids, log_probs, None, 1.0, 2)),
        (ShapeError, r"tail_log_prob \(3,\) does not match", (ids, log_probs, torch.zeros(3), 1.0, 9)),
        (ArgumentError, "temperature must be finite", (ids, log_probs, None, 0.0, 9)),
        (ArgumentError, "tail must be one of", (ids, log_probs, None, 1.0, 9, "ghost")),
        (ArgumentError, "log_probs requires grad", (ids, log_probs.clone().requires_grad_(), None, 1.0, 9)),
    ):
        with pytest.raises(error, match=message):
            TeacherTopK(*arguments)  # type: ignore[arg-type]
    for arguments in ((torch.zeros(2, 3), 4), (torch.zeros(2, 3), 0)):
        with pytest.raises(ArgumentError, match="topk_teacher: k must be in"):
            tgt.topk_teacher(*arguments)


def broken(kind: str) -> tuple[TeacherTopK, str]:
    topk = tgt.topk_teacher(logits(5, 70, 1), 4)
    if kind == "twice":
        topk.ids[3, 2] = topk.ids[3, 0]
        return topk, rf"ids\[3, 2\] = {int(topk.ids[3, 0])} is listed twice in its row"
    value = {"low": -1, "high": 70, "far": 1 << 40}[kind]
    topk.ids[3, 2] = value
    return topk, rf"ids\[3, 2\] = {value} is not in \[0, 70\)"


@pytest.mark.parametrize("kind", ["twice", "low", "high", "far"])
def test_ids_are_checked_on_a_cpu(host_backend: str, kind: str) -> None:
    student = logits(5, 70, 0)
    topk, message = broken(kind)
    with pytest.raises(ArgumentError, match=f"distillation_loss: {message}"):
        tgt.distillation_loss(student, topk, backend=host_backend)
    with pytest.raises(ArgumentError, match=f"TeacherTopK: {message}"):
        topk.check()
    target = torch.tensor([0, 0, 0, -100, 0])  # a dropped row may hold anything
    assert tgt.distillation_loss(student, topk, target, hard_weight=1.0, backend=host_backend).isfinite()
    topk.log_probs[3, 2] = -INF  # and so may padding
    assert tgt.distillation_loss(student, topk.check(), backend=host_backend).isfinite()


@tails
@pytest.mark.parametrize("kind", ["twice", "low", "high", "far"])
def test_the_reference_drops_such_an_entry_where_none_was_refused(kind: str, tail: str) -> None:
    topk, _ = broken(kind)
    topk = dataclasses.replace(topk, tail=tail)
    without = topk.log_probs.clone()
    without[3, 2] = -INF
    made = [
        forward(
            reference_topk.forward, logits(5, 70, 0), TopK(topk.ids, log_probs, topk.rest(), tail), wanted=(True, False)
        )
        for log_probs in (topk.log_probs, without)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*map(loss_and_gradients, made), strict=True))


@tails
@pytest.mark.parametrize("kind", ["twice", "low", "high", "far"])
def test_on_a_device_such_an_entry_is_dropped(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, tail: str
) -> None:
    for dtype in (torch.float32, torch.float64):
        student = logits(5, 70, 0, dtype=dtype)
        topk, message = broken(kind)
        topk = dataclasses.replace(topk, tail=tail)
        without = dataclasses.replace(topk, log_probs=topk.log_probs.clone())
        without.log_probs[3, 2] = -INF
        with tensors_on_an_emulated_gpu(emulated):
            out = loss_and_gradient(student, topk, divergence="forward_kl", reduction="none")
            wanted = loss_and_gradient(student, without, divergence="forward_kl", reduction="none")
            assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))
            monkeypatch.setenv("TGT_FAST_CHECK_RECORDS", "1")
            with pytest.raises(ArgumentError, match=message):
                tgt.distillation_loss(student, topk)
            monkeypatch.delenv("TGT_FAST_CHECK_RECORDS")


# What is no log-probability


def hand_made(values: str, scale: float = 3.0, shift: float = 0.0) -> TeacherTopK:
    """The top 4 of 70 classes, as logits, probabilities or what they should be."""
    t = scale * logits(5, 70, 1) + shift
    ids = t.topk(4).indices
    made = {"logits": t, "probabilities": t.softmax(-1), "log-probabilities": t.log_softmax(-1)}[values]
    return TeacherTopK(ids, made.gather(-1, ids), None, 1.0, 70)


def taken(topk: TeacherTopK, linear: bool, backend: str, **options: object) -> torch.Tensor:
    student = logits(5, 70, 0)
    if linear:
        return tgt.linear_distillation_loss(student, torch.eye(70), teacher_logits=topk, backend=backend, **options)  # type: ignore[arg-type, call-overload, no-any-return]
    return tgt.distillation_loss(student, topk, backend=backend, **options)  # type: ignore[arg-type, call-overload, no-any-return]


@tails
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden states"])
@pytest.mark.parametrize("values", ["logits", "probabilities"])
def test_logits_and_probabilities_in_a_record_are_refused(
    host_backend: str, values: str, linear: bool, tail: str
) -> None:
    topk = dataclasses.replace(hand_made(values), tail=tail)
    message = (
        "seem to be probabilities: pass their log" if values == "probabilities" else r"are they logits\? Pass log_soft"
    )
    with pytest.raises(ArgumentError, match=rf"log_probs\[0\] = \[.*no log-probabilities.*{message}"):
        taken(topk, linear, host_backend)
    with pytest.raises(ArgumentError, match=message):
        topk.check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = dataclasses.replace(hand_made("log-probabilities"), tail=tail)
        assert taken(right.check(), linear, host_backend).isfinite()
        narrow = dataclasses.replace(right, log_probs=right.log_probs.to(torch.bfloat16))
        assert taken(narrow.check(), linear, host_backend).isfinite()


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden states"])
def test_rows_that_do_not_count_may_hold_anything(host_backend: str, linear: bool) -> None:
    topk = hand_made("log-probabilities")
    topk.log_probs[2] = 0.0  # what a collate function pads with
    topk.log_probs[4, 1] = 7.0
    counted = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    loss = taken(topk, linear, host_backend, sample_weight=counted)
    assert torch.equal(loss, taken(hand_made("log-probabilities"), linear, host_backend, sample_weight=counted))
    target = torch.where(counted > 0, 0, -100)
    assert taken(topk, linear, host_backend, target=target, hard_weight=1.0).isfinite()
    with pytest.raises(ArgumentError, match=r"log_probs\[2\] = \[0, 0, 0, 0\]"):
        taken(topk, linear, host_backend)
    topk.log_probs[:] = math.nan
    assert taken(topk, linear, host_backend).isnan()


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden states"])
def test_logits_that_are_all_negative_warn(linear: bool) -> None:
    """As those of some language models: their mass is nearly 0, and what a record derives as its tail nearly 1."""
    topk = hand_made("logits", shift=-60.0)
    with pytest.warns(UserWarning, match=r"below log\(1 / 70\).*are log_probs logits\?"):
        taken(topk, linear, "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken(
            dataclasses.replace(topk, tail="renormalize"), linear, "auto"
        )  # the right loss: rows are divided by their sum
        flat = torch.zeros(5, 70, dtype=torch.bfloat16).log_softmax(-1)  # each class its share, rounded
        taken(TeacherTopK(torch.arange(4).expand(5, 4), flat[:, :4], None, 1.0, 70), linear, "auto")


def test_a_compiled_call_looks_at_the_entries_too() -> None:
    with pytest.raises(ArgumentError, match="no log-probabilities"):
        torch.compile(tgt.distillation_loss, backend="eager", fullgraph=True)(logits(5, 70, 0), hand_made("logits"))
