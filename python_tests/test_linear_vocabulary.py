"""The loss from hidden states where the vocabularies of student and teacher differ."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from heads import BUDGETS, THREE_ROWS, check, heads, run, topk_case

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.options import TAILS

pytestmark = pytest.mark.usefixtures("one_thread")

MAP = torch.tensor([4, -1, 0, 19, 22, -1, 7, 8, 9, 1, 2, 3, -1, 12, 20, 5])
MASK = torch.arange(23) % 5 != 2
VOCABULARIES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "padded teacher": ((23, 27), {"vocab_size": 23}),
    "padded student": ((27, 23), {"vocab_size": 23}),
    "padded both": ((25, 27), {"vocab_size": 20}),
    "mask": ((23, 23), {"vocab_mask": MASK}),
    "padding and mask": ((23, 27), {"vocab_size": 21, "vocab_mask": MASK}),
    "map": ((23, 16), {"vocab_map": MAP}),
    "map and mask": ((23, 16), {"vocab_map": MAP, "vocab_mask": MASK}),
    "map of int32": ((23, 16), {"vocab_map": MAP.to(torch.int32)}),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies(way: str, name: str, softcap: float | None, given: bool) -> None:
    """As if the classes that are left out were cut out of both heads."""
    classes, vocabulary = VOCABULARIES[name]
    case = heads(
        classes=classes,
        vocabulary=vocabulary,
        student=(1.0, softcap),
        teacher=(1.0, softcap),
        given=given,
        labeled=True,
    )
    ids = MAP[MAP >= 0] if "vocab_map" in vocabulary else torch.arange(20)
    ids = ids[MASK[ids]] if "vocab_mask" in vocabulary else ids
    case.target = ids[torch.arange(7) % len(ids)].clone()
    case.target[3] = -1
    for divergence in ("forward_kl", "jsd", "mse"):
        check(case, backend=way, divergence=divergence, hard_weight=0.5, memory_budget=BUDGETS["three rows"])


@pytest.mark.parametrize("name", VOCABULARIES)
def test_no_phantom_mass(way: str, name: str) -> None:
    """A vocabulary padded with logits of 0 gives mass to tokens that do not exist, and every other one less.

    What the heads hold for classes that are left out changes nothing, and its gradient is exactly 0.
    """
    classes, vocabulary = VOCABULARIES[name]
    case = heads(classes=classes, vocabulary=vocabulary)
    found = run(case, backend=way)
    ids = MAP[MAP >= 0] if "vocab_map" in vocabulary else torch.arange(vocabulary.get("vocab_size", 23))
    keep = torch.zeros(classes[0], dtype=torch.bool)
    keep[ids] = True
    if "vocab_mask" in vocabulary:
        keep[:23] &= MASK
    for tensor in ("student_weight", "student_bias"):
        assert not found.grads[tensor][~keep].any()
        assert case.tensors[tensor] is not None
        case.tensors[tensor][~keep] = 50.0  # type: ignore[index]
    assert torch.equal(run(case, backend=way).loss, found.loss)


def test_a_label_that_is_left_out(native: str) -> None:
    """An error where values may be looked at; elsewhere such a row is dropped."""
    case = heads(4, (23, 16), vocabulary={"vocab_map": MAP}, labeled=True)
    case.target = torch.tensor([0, 6, -1, -100])
    for backend in (native, "reference"):
        with pytest.raises(tgt.errors.ArgumentError, match=r"target\[1\] = 6 .*vocab_map.*unlabeled_index \(-1\)"):
            run(case, backend=backend, hard_weight=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tgt_fast.ops._linear_arguments.check_labels_exist", lambda *_: None)
        unchecked = run(case, backend=native, hard_weight=1.0)
    case.target[1] = -100
    dropped = run(case, backend=native, hard_weight=1.0)
    assert torch.equal(unchecked.loss, dropped.loss)


def test_align_logits_serves_the_loss_on_logits() -> None:
    student, teacher = torch.randn(2, 3, 23, requires_grad=True), torch.randn(2, 3, 16, requires_grad=True)
    aligned = tgt.align_logits(student, teacher, vocab_map=MAP)
    found = torch.autograd.grad(tgt.distillation_loss(*aligned), (student, teacher))
    own, other = MAP[MAP >= 0], (MAP >= 0).nonzero()[:, 0]
    cut = tgt.distillation_loss(student[..., own], teacher[..., other])
    torch.testing.assert_close(found, torch.autograd.grad(cut, (student, teacher)))
    padded = tgt.align_logits(student, torch.randn(2, 3, 27), vocab_size=20)
    assert [x.shape[-1] for x in padded] == [20, 20]
    assert padded[0].data_ptr() == student.data_ptr()


# Against a record, whose ids are the teacher's

ONTO = torch.tensor([4, 6, 0, 19, 22, 10, 7, 8, 9, 1, 2, 3, 11, 12, 20, 5])  # every class of the teacher's has one
SOUND: dict[str, tuple[tuple[int, int], dict[str, Any], tuple[str, ...]]] = {
    "padded student": ((27, 23), {"vocab_size": 23}, TAILS),
    "padded teacher": ((23, 27), {"vocab_size": 23}, ("renormalize",)),
    "padded both": ((25, 27), {"vocab_size": 20}, ("renormalize",)),
    "mask": ((23, 23), {"vocab_mask": MASK}, ("renormalize",)),
    "mask of a class that the teacher lacks": (
        (23, 16), {"vocab_map": ONTO, "vocab_mask": torch.arange(23) != 13}, TAILS,
    ),
    "map onto": ((23, 16), {"vocab_map": ONTO}, TAILS),
    "map": ((23, 16), {"vocab_map": MAP}, ("renormalize",)),
    "map and mask": ((23, 16), {"vocab_map": MAP.to(torch.int32), "vocab_mask": MASK}, ("renormalize",)),
}  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("name", "tail"), [(name, tail) for name, given in SOUND.items() for tail in given[2]])
def test_vocabularies_of_a_record(way: str, name: str, tail: str, softcap: float | None) -> None:
    """As if the classes that are left out were cut out of the head and of the record."""
    classes, vocabulary, _ = SOUND[name]
    case = topk_case(classes=classes, k=9, tail=tail, student=(1.0, softcap), vocabulary=vocabulary, labeled=True)
    case.target = torch.tensor([0, 1, 3, -1, -100, 4, 1])
    for divergence in ("forward_kl", "jsd"):
        found = check(case, backend=way, divergence=divergence, hard_weight=0.5, memory_budget=THREE_ROWS)
        assert found.loss.isfinite()


@pytest.mark.parametrize("name", SOUND)
def test_no_phantom_mass_with_a_record(way: str, name: str) -> None:
    """A class that one side lacks must not share in the other's mass, as a logit of 0 for padding would."""
    classes, vocabulary, tails = SOUND[name]
    case = topk_case(classes=classes, k=9, tail=tails[0], vocabulary=vocabulary)
    found = run(case, backend=way)
    assert case.topk is not None
    ids = vocabulary.get("vocab_map", torch.arange(vocabulary.get("vocab_size", 23)))
    keep = torch.zeros(classes[0], dtype=torch.bool)
    keep[ids[ids >= 0].long()] = True
    keep &= vocabulary.get("vocab_mask", torch.tensor(True))
    for tensor in ("student_weight", "student_bias"):
        assert not found.grads[tensor][~keep].any()
        case.tensors[tensor][~keep] = 50.0  # type: ignore[index]
    assert torch.equal(run(case, backend=way).loss, found.loss)


@pytest.mark.parametrize("name", [name for name, given in SOUND.items() if given[2] != TAILS])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_a_tail_over_classes_that_are_not_shared_is_refused(way: str, name: str, tail: str) -> None:
    classes, vocabulary, _ = SOUND[name]
    case = topk_case(classes=classes, tail=tail, vocabulary=vocabulary)
    with pytest.raises(ArgumentError, match=r"^linear_distillation_loss: .*its tail does not say.*renormalize"):
        run(case, backend=way)


def test_a_row_none_of_whose_entries_is_shared_is_no_distribution(way: str) -> None:
    case = topk_case(2, (23, 16), k=1, tail="renormalize", vocabulary={"vocab_map": MAP})
    assert case.topk is not None
    case.topk.ids[:, 0] = torch.tensor([1, 0])
    loss = run(case, backend=way, reduction="none").loss
    assert loss.isnan().tolist() == [True, False]


def test_ids_out_of_range_are_dropped_where_they_are_not_looked_at(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device: beside a map, an id must not lead out of it."""
    case = topk_case(4, (23, 16), tail="renormalize", vocabulary={"vocab_map": MAP})
    assert case.topk is not None
    case.topk.ids[1, 2], case.topk.ids[2, 0] = 10**9, -5
    for backend in (native, "reference"):
        with pytest.raises(ArgumentError, match=r"ids\[1, 2\] = 1000000000 is not in \[0, 16\)"):
            run(case, backend=backend)
    monkeypatch.setattr("tgt_fast.ops._linear_arguments.check_ids", lambda *_: None)
    found = run(case, backend=native, reduction="none")
    case.topk.log_probs[1, 2] = case.topk.log_probs[2, 0] = -math.inf
    case.topk.ids[1, 2] = case.topk.ids[2, 0] = 0
    torch.testing.assert_close(found.loss, run(case, backend=native, reduction="none").loss)
