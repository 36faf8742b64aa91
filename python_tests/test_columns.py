"""The kinds of batches: by its length, by columns=, and refused where it could be read in more than one way."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_kit import CLASSES, assert_same_weights, make_data, make_run, make_student, make_teacher

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError
from tgt_fast.teacher.batches import Columns
from tgt_fast.train import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

X, Y = make_data(12)
IDS = torch.arange(12) + 5
TOKENS = torch.randint(0, 9, (12, 7))
Named = namedtuple("Named", "label image key")


class Encoding(UserDict):
    """As a tokenizer's BatchEncoding: a mapping that PyTorch's pytrees do not know."""


def train(batch: Any, **options: Any) -> nn.Module:
    run = make_run(loader=[batch])
    tgt.fit(**run, steps=3, **options)
    return run["student"]


@pytest.mark.parametrize(
    ("batch", "columns"),
    [
        ({"image": X, "labels": Y, "id": IDS}, ("id", "image", "labels")),
        (Encoding(image=X, labels=Y, id=IDS), ("id", "image", "labels")),
        ((X, Y, IDS), (2, 0, 1)),
        ([X, Y, IDS, "more"], (2, 0, 1)),
        ((X, Y, IDS), [-1, 0, 1]),
        (Named(Y, X, IDS), ("key", "image", "label")),
        ((IDS.numpy(), X, Y.tolist()), None),
        ((IDS.int(), X, Y), None),
    ],
    ids=["dict", "mapping", "order", "four", "from the end", "named tuple", "arrays", "int32"],
)
def test_columns_say_what_is_what(batch: Any, columns: Any) -> None:
    assert_same_weights(train(batch, columns=columns), train((IDS, X, Y)))


def test_the_same_columns_everywhere() -> None:
    batch, columns = {"image": X, "labels": Y, "id": IDS}, ("id", "image", "labels")
    teacher = make_teacher()
    options = {"anchors": "balanced", "seed": 3}
    ours = tgt.LatentSampler(teacher, **options).calibrate([batch], columns=columns)
    theirs = tgt.LatentSampler(teacher, **options).calibrate([(IDS, X, Y)])
    assert torch.equal(ours(X, sample_ids=IDS).x, theirs(X, sample_ids=IDS).x)
    student = make_student()
    assert evaluate(student, teacher, [batch], columns=columns) == evaluate(student, teacher, [(X, Y)])


class OfDict(nn.Module):
    def __init__(self, *keys: str) -> None:
        super().__init__()
        self.keys, self.net, self.seen = keys, make_student(dropout=0.0), set()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        assert type(batch) is dict
        self.seen.add(tuple(batch))
        return self.net(sum(batch[key] for key in self.keys))


@pytest.mark.parametrize("kind", [dict, Encoding])
def test_several_keys_are_a_dict(kind: Callable[..., Any]) -> None:
    batch = kind(left=X, right=X / 2, labels=Y, text=["a"] * 12)
    part = nn.Linear(6, CLASSES)
    teacher = tgt.Teacher(lambda b: b["left"], lambda z: {"left": z}, lambda b: part(b["left"]), modules=[part])
    student = OfDict("left", "right")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    options: dict[str, Any] = {"steps": 2, "optimizer": optimizer, "progress": False}
    columns = (None, ("left", "right"), "labels")
    result = tgt.fit(student, tgt.TGTObjective(teacher), [batch], columns=columns, **options)
    assert student.seen == {("left", "right")}
    assert result.history[0]["hard"] > 0
    assert 0 <= evaluate(student, teacher, [batch], columns=columns)["accuracy"] <= 1


def test_a_mapping_without_labels_is_x() -> None:
    batch = Encoding(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), text=["a"] * 12)
    ids, x, y = Columns("fit").split(batch)
    assert ids is None
    assert y is None
    assert type(x) is dict
    assert list(x) == ["input_ids", "attention_mask", "text"]
    ids, x, y = Columns("fit").split((IDS, {"deep": [batch], "lengths": IDS}, Y))
    assert type(x["deep"][0]) is dict
    assert ids is IDS
    assert y is Y


def test_a_teacher_takes_mappings() -> None:
    part = nn.Linear(6, CLASSES)
    teacher = tgt.Teacher(lambda b: b["x"], lambda z: {"x": z}, lambda b: part(b["x"]), modules=[part], max_batch=5)
    batch = Encoding(x=X)
    assert torch.equal(teacher.label(batch), part(X).detach())
    made = tgt.LatentSampler(teacher, sigma=0.1, units="absolute")(batch)
    assert made.x["x"].shape == X.shape


ONE_HOT = nn.functional.one_hot(Y, CLASSES).float()


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ((X, Y, IDS), r"ids are a vector of integers.*\(12, 6\) of float32.*columns=\(2, 0, 1\)"),
        ((IDS[:5], X, Y), r"ids are a vector.*\(5,\)"),
        ((IDS[:, None], X, Y), r"ids are a vector.*\(12, 1\)"),
        (([f"{i}" for i in IDS], X, Y), "ids are a vector.*a list"),
        ((IDS, X), r"y is read as labels.*\(12, 6\) of float32.*columns=\(0, 1, None\)"),
        ((X, ONE_HOT), r"y is read as labels.*columns=\(None, 0, 1\)"),
        ((X, Y > 1), "y is read as labels.*bool"),
        ((X, Y[:5]), r"y is read as labels.*\(5,\)"),
        ((X, ["cat"] * 12), "y is read as labels.*a list"),
        ((IDS, Y, X), "y is read as labels"),
        ((IDS, Y), r"x is read from where there is a vector.*columns="),
        ((IDS, Y, Y), "x is read from where"),
        ({"image": X, "labels": Y}, r"whether \['labels'\].*columns=\(None, 'image', 'labels'\)"),
        ({"image": X, "fine": Y}, r"whether \['fine'\].*columns=\(None, 'image', 'fine'\)"),
        ([{"image": X, "label": ONE_HOT}], r"\['label'\]"),
        (
            Encoding(input_ids=TOKENS, attention_mask=TOKENS, labels=TOKENS, sample_id=IDS),
            r"whether \['labels', 'sample_id'\].*columns=\('sample_id', \('input_ids', 'attention_mask'\), 'labels'\)",
        ),
        ((IDS, X, Y, X), r"the loader gave a tuple of 4.*columns=\(0, 1, 2\)"),
        ((), "the loader gave a tuple of 0"),
    ],
)
def test_what_is_ambiguous_is_refused(batch: Any, match: str) -> None:
    run = make_run()
    with pytest.raises(ArgumentError, match="^fit: .*" + match):
        tgt.fit(**{**run, "loader": [batch]}, steps=1)
    with pytest.raises(ArgumentError, match="^evaluate: .*" + match):
        evaluate(run["student"], None, [batch])
    with pytest.raises(ArgumentError, match="^calibrate: .*" + match):
        tgt.LatentSampler(make_teacher()).calibrate([batch])


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ("ixy", "three of them, got 'ixy'"),
        ((0, 1), "three of them"),
        ((0, None, 1), "names no x"),
        ((0, (), 1), "names no x"),
        ((None, 0, (1, 2)), "y is one index or key"),
        (((0, 1), 0, 1), "ids is one index or key"),
        ((None, 0, 3), "names 3, but the loader gave a tuple of 3"),
        ((None, 0, "y"), "names 'y', but the loader gave a tuple of 3"),
        ((1, 0, 2), None),
        ((0, 1, 2), "ids are a vector of integers"),
    ],
)
def test_columns_are_checked(columns: Any, match: str | None) -> None:
    batch = (X, Y, Y)
    if match is None:
        Columns("fit", columns).split(batch)
        return
    with pytest.raises(ArgumentError, match=match):
        tgt.fit(**make_run(loader=[batch]), steps=1, columns=columns)


def test_columns_of_other_batches() -> None:
    with pytest.raises(ArgumentError, match=r"names 'y', but the loader gave a dict with the keys \['x'\]"):
        Columns("fit", (None, "x", "y")).split({"x": X})
    with pytest.raises(ArgumentError, match="gave a Tensor which is x as a whole"):
        Columns("fit", (None, 0, None)).split(X)
    with pytest.raises(
        ArgumentError, match=r"names 'who', .* a Named of 3 with the fields \['label', 'image', 'key'\]"
    ):
        Columns("fit", ("who", "image", None)).split(Named(Y, X, IDS))


def test_columns_trust_what_is_named() -> None:
    """Indices as inputs, soft targets for an objective of one's own."""
    found = Columns("fit", (None, 0, 1)).split((IDS, np.ones((12, 3), np.float32)))
    assert found.x is IDS
    assert found.y is not None
    assert found.y.dtype == torch.float32
    assert Columns("fit").split(IDS).x is IDS  # alone it cannot be anything else


def test_where_ids_are_needed() -> None:
    fill = Columns("fill", needs_ids=True)
    for batch in ((IDS, X), [IDS, X, Y], (IDS, X, ["any"] * 12), (IDS, {"labels": Y, "x": X})):
        found = fill.split(batch)
        assert found.sample_ids is IDS
        assert found.y is None
    named = Columns("fill", ("id", ("a", "b"), None), needs_ids=True).split({"a": X, "b": X, "id": IDS, "y": Y})
    assert list(named.x) == ["a", "b"]
    for batch, match in (
        (X, "needs ids beside x"),
        ({"x": X, "id": IDS}, r"needs ids.*columns=\('id', 'x', None\)"),
        ((X, Y), r"ids are a vector.*columns=\(1, 0, None\)"),
        ((X, Y, IDS), r"ids are a vector.*columns=\(2, 0, None\)"),
        ((IDS, Y, X), "x is read from where"),
        ((IDS, X, Y, X), r"\(ids, x\) or \(ids, x, y\); the loader gave a tuple of 4"),
    ):
        with pytest.raises(ArgumentError, match=match):
            fill.split(batch)
    with pytest.raises(ArgumentError, match="names no ids"):
        Columns("fill", (None, 0, 1), needs_ids=True)
