"""The fingerprint of a teacher sees how its parts hang together, and what a subclass of Teacher does with them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast.errors import DTypeError

of = tgt.teacher_fingerprint
LAYER = nn.Linear(3, 3)


class Held(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return x


class Tied(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(2))
        self.register_parameter("two", {"tied": self.one, "equal": nn.Parameter(torch.ones(2)), "none": None}[kind])

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (nn.Sequential(LAYER), nn.Sequential(LAYER, LAYER)),
        (nn.Sequential(LAYER, nn.ReLU()), nn.Sequential(LAYER, nn.ReLU(), LAYER)),
        (Tied("tied"), Tied("none")),
        (Tied("equal"), Tied("none")),
    ],
    ids=["twice", "again later", "tied or none", "two or none"],
)
def test_where_parts_stand_counts(one: nn.Module, two: nn.Module) -> None:
    assert of(one) != of(two)
    assert of(one) == of(one)


class Scaled(tgt.Teacher):
    factor = 1.0

    def __init__(self, k: float) -> None:
        super().__init__(nn.Identity(), nn.Identity(), LAYER)
        self.k = k
        self.register_buffer("shift", torch.zeros(1))

    def label(self, x: Any) -> Tensor:
        return super().label(x) * self.k * self.factor + self.shift

    def encode(self, x: Any) -> Any:
        return super().encode(x)


def test_what_a_kind_of_teacher_of_the_users_does_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Scaled(1.0)
    before, encoded = of(teacher), of(teacher, latents=True)
    assert before == of(Scaled(1.0))
    assert before != of(Scaled(2.0))
    assert before != of(tgt.Teacher(nn.Identity(), nn.Identity(), LAYER))
    assert before.unseen == ()
    teacher.max_batch = 3
    assert of(teacher) == before
    with torch.no_grad():
        teacher.shift.add_(1)
    assert of(teacher) != before
    monkeypatch.setattr(Scaled, "encode", lambda self, x: x)
    assert (of(Scaled(1.0)), of(Scaled(1.0), latents=True) == encoded) == (before, False)
    monkeypatch.setattr(Scaled, "factor", 2.0)
    assert of(Scaled(1.0)) != before


class Lazily(nn.Module):
    @functools.cached_property
    def squares(self) -> list[int]:
        return [n * n for n in range(3)]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.squares[2]


def test_what_is_kept_so_as_not_to_be_computed_again_does_not_count() -> None:
    one = Lazily()
    before = of(one)
    one(torch.ones(1))
    assert of(one) == before == of(Lazily())


def test_a_device_is_none_of_what_is_computed() -> None:
    found = [Held(torch.device(name)) for name in ("cpu", "cuda:0", "cuda:1")]
    assert len({of(one) for one in found}) == 1


def circle() -> list[Any]:
    made: list[Any] = [1.0]
    made.append(made)
    return made


def nested(levels: int) -> list[Any]:
    made: list[Any] = [1.0]
    for _ in range(levels):
        made = [made]
    return made


def test_circles_and_depths() -> None:
    assert of(Held(circle())) == of(Held(circle()))
    assert of(Held(nested(30))) != of(Held(nested(31)))
    assert of(Held(nested(30))).unseen == ()
    (name,) = of(Held(nested(5000))).unseen
    assert name.startswith("teacher.held.0")
    assert len(name) < 120


class DTensor(Tensor):
    """By its name; a process has a part of it, which it flattens to."""

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_local_tensor"], None


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (torch.ones(2).as_subclass(DTensor), r"teacher\.held is a DTensor, of which a process holds a part"),
        (nn.LazyLinear(3), r"weight holds no numbers \(its lazy module"),
    ],
)
def test_tensors_of_which_numbers_are_elsewhere_are_refused(held: Any, words: str) -> None:
    with pytest.raises(DTypeError, match=words):
        of(Held(held))
