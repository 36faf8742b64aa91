"""The fingerprint of a teacher sees what its outputs depend on, in whatever it is kept, and no machinery."""

from __future__ import annotations

import collections
import datetime
import functools
import io
import logging
import operator
import os
import random
import re
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_kit import RowWise
from torch import Tensor, nn
from toys import seeded

import tgt_fast as tgt
from tgt_fast.errors import DTypeError

of = tgt.teacher_fingerprint


class Factor(nn.Module):
    """Its state is an attribute."""

    def __init__(self, k: Any = 1.0) -> None:
        super().__init__()
        self._k = k

    def forward(self, x: Tensor) -> Tensor:
        return x


class Slotted:
    __slots__ = ("__k",)

    def __init__(self, k: float) -> None:
        self.__k = k


class Listed(list):  # type: ignore[type-arg]
    def __init__(self, k: float) -> None:
        super().__init__([1])
        self.k = k


class Called:
    def __init__(self, k: float) -> None:
        self.k = k

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.k


class Hooked(Factor):
    """An attribute that is called as hooks are, and is none."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.hook_scale = torch.tensor(k)


def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


class Table(Tensor):
    """Numbers in a packed form, and beside them what they mean."""


def table(k: float) -> Tensor:
    made = torch.ones(2).as_subclass(Table)
    made.scale = k  # type: ignore[attr-defined]
    return made


class ByClass:
    k = 1.0

    @classmethod
    def called(cls, x: Tensor) -> Tensor:
        return x * cls.k


def derived(k: float) -> type[ByClass]:
    made = type("Derived", (ByClass,), {"k": k})
    made.__module__ = __name__
    return made


def with_attribute(k: float) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        return x * function.k  # type: ignore[attr-defined]

    function.k = k  # type: ignore[attr-defined]
    return function


def packed(kind: type[nn.Module], seed: int) -> nn.Module:
    model = nn.Sequential(seeded(lambda: kind(4, 4), seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {kind})  # type: ignore[no-any-return]


def scripted(k: float, how: str) -> nn.Module:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = k

        def forward(self, x: Tensor) -> Tensor:
            return x * self.k

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "export":
            return torch.export.export(Scaled(), (torch.ones(2),)).module()  # type: ignore[no-any-return]
        return torch.jit.trace(Scaled(), torch.ones(2)) if how == "trace" else torch.jit.script(Scaled())  # type: ignore


STATES: dict[str, Callable[[float], Any]] = {
    "number": Factor,
    "numpy number": lambda k: Factor(np.float32(k)),
    "tensor": lambda k: Factor(torch.tensor(k)),
    "sparse tensor": lambda k: Factor(torch.tensor([0.0, k]).to_sparse()),
    "sparse rows": lambda k: Factor(torch.tensor([[0.0, k]]).to_sparse_csr()),
    "conjugate": lambda k: Factor(torch.tensor([k + 1j]).conj()),
    "array": lambda k: Factor(np.array([str(k)])),
    "array of objects": lambda k: Factor(np.array([k, "b"], dtype=object)),
    "record array": lambda k: Factor(np.array([(k, 1)], dtype=[("a", "f4"), ("b", "i8")])),
    "modules in a list": lambda k: Factor([seeded(lambda: nn.Linear(2, 2), int(k))]),
    "container": lambda k: Factor({"a": (k, "b")}),
    "keys": lambda k: Factor({torch.relu: 1, nn.Linear: k}),
    "default of a container": lambda k: Factor(collections.defaultdict(functools.partial(float, k))),
    "masked array": lambda k: Factor(np.ma.array([1, 2], mask=[0, k > 1])),
    "attribute of a tensor": lambda k: Factor(table(k)),
    "method of a container": lambda k: Factor({1: k}.get),
    "method of a tensor": lambda k: Factor(torch.tensor(k).mul),
    "method of a number": lambda k: Factor(k.__add__),
    "method of a class": lambda k: Factor(derived(k).called),
    "getter": lambda k: Factor(operator.itemgetter(int(k))),
    "set": lambda k: Factor({"a", str(k)}),
    "set of objects": lambda k: Factor({nn.Linear, Called(k)}),
    "deque": lambda k: Factor(collections.deque([Called(k)])),
    "a container with attributes": lambda k: Factor(Listed(k)),
    "partial": lambda k: Factor(functools.partial(scaled, factor=k)),
    "object": lambda k: Factor(Called(k)),
    "bound method": lambda k: Factor(Called(k).__call__),
    "attribute of a function": lambda k: Factor(with_attribute(k)),
    "slots": lambda k: Factor(Slotted(k)),
    "namespace": lambda k: Factor(types.SimpleNamespace(k=k)),
    "pattern": lambda k: Factor(re.compile("a" * 300 + str(k))),
    "date": lambda k: Factor(datetime.date(2000 + int(k), 1, 1)),
    "generator's seed": lambda k: Factor(torch.Generator().manual_seed(int(k))),
    "called a hook": Hooked,
    "inside": lambda k: nn.Sequential(Factor(k)),
    "heads": lambda k: seeded(lambda: nn.MultiheadAttention(8, int(k)), 0),
    "packed": lambda k: packed(nn.Linear, int(k)),
    "packed, recurrent": lambda k: packed(nn.LSTM, int(k)),
    "script": lambda k: scripted(k, "script"),
    "trace": lambda k: scripted(k, "trace"),
    "export": lambda k: scripted(k, "export"),
    "a number to a labeler": lambda k: tgt.teacher.TimmLabeler(nn.Identity(), mean=[0], std=[1], value_range=(0.0, k)),
    "size of a labeler": lambda k: tgt.teacher.TimmLabeler(nn.Identity(), mean=[0], std=[1], size=(int(k), 4)),
}


@pytest.mark.parametrize("make", STATES.values(), ids=STATES.keys())
def test_state_counts_and_is_seen(make: Callable[[float], Any]) -> None:
    one, again, two = of(make(1.0)), of(make(1.0)), of(make(4.0))
    assert one == again
    assert one != two
    assert one.unseen == ()


class Constant(nn.Module):
    k = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.helped(x) * Settings.scale

    def helped(self, x: Tensor) -> Tensor:
        return x * self.k + here().offset


class Settings:
    scale = 1.0


class Stepped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()


def here() -> Any:
    return types.SimpleNamespace(offset=1)


def by_module(x: Tensor) -> Tensor:
    return Stepped.apply(x) + module.scale  # type: ignore[no-any-return]


module = types.ModuleType("a_module_of_the_users")
module.scale = 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("teacher", "owner", "name", "value"),
    [
        (Constant(), Constant, "k", 3.0),
        (Constant(), Constant, "helped", lambda self, x: x),
        (Constant(), Settings, "scale", 3.0),
        (by_module, Stepped, "forward", staticmethod(lambda ctx, x: x)),
        (by_module, module, "scale", 3.0),
    ],
    ids=["constant of a class", "method on self", "constant of another class", "autograd function", "of a module"],
)
def test_what_code_names_in_the_users_classes_and_modules(
    monkeypatch: pytest.MonkeyPatch, teacher: Any, owner: Any, name: str, value: Any
) -> None:
    before = of(teacher)
    assert before == of(teacher)
    monkeypatch.setattr(owner, name, value)
    assert of(teacher) != before


class WithTools(Factor):
    def __init__(self) -> None:
        super().__init__()
        self.lock, self.log = threading.RLock(), logging.getLogger("x")
        self.draws, self.numpy_draws = random.Random(), np.random.default_rng()
        self.out, self.table = sys.stdout, threading.local()
        self.generator = torch.Generator()
        self.seen_cache: dict[int, int] = {}


def test_machinery_is_left_out_in_silence() -> None:
    one = WithTools()
    before = of(one)
    one.register_forward_hook(lambda *_: None)
    one.train()
    torch.rand(3, generator=one.generator)
    assert of(one) == before == of(WithTools())
    assert before.unseen == ()


def test_a_cache_that_fills_is_no_other_teacher_but_is_named() -> None:
    one = WithTools()
    before = of(one)
    one.seen_cache[1] = 2
    assert of(one) == before
    assert of(one).unseen == ("teacher.seen_cache (what it holds)",)
    one.seen_cache = torch.ones(2)  # type: ignore[assignment]
    assert of(one) != before


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_are_what_is_in_them_before_and_after_they_ran(wrap: Callable[..., Any]) -> None:
    options = {"backend": "eager"} if wrap is torch.compile else {}
    one = wrap(RowWise(), **options)
    before = of(one)
    one(torch.ones(2, 2))
    inner = one.module if wrap is nn.DataParallel else one._orig_mod
    inner.asked = 0  # which counts the rows
    assert of(one) == before
    assert before.unseen == ()
    assert of(wrap(RowWise(seed=1), **options)) != before


def test_a_compiled_function_is_what_was_compiled_before_and_after_it_ran() -> None:
    def make(k: float) -> Any:
        return torch.compile(with_attribute(k), backend="eager")

    one = make(1.0)
    before = of(one)
    one(torch.ones(2))
    assert of(one) == before == of(make(1.0)) != of(make(2.0))
    assert before.unseen == ()


@pytest.mark.parametrize("thing", [io.StringIO("a"), iter("ab"), memoryview(b"ab"), (x for x in "ab")])
def test_what_hides_its_state_is_named(thing: Any) -> None:
    unseen = of(Factor(thing)).unseen
    assert [name.partition(" ")[0] for name in unseen] == ["teacher._k"]


def test_the_warning_is_one_line_and_comes_once(tmp_path: Path) -> None:
    def make() -> tgt.TeacherCache:
        return tgt.TeacherCache(tmp_path, Factor([iter("ab") for _ in range(7)]), k=3)

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            make().close()
    (one,) = [str(warning.message) for warning in found]
    assert "teacher._k.2 (builtins.str" in one
    assert "and 4 more" in one
    assert "\n" not in one
    assert found[0].filename == __file__


@pytest.mark.parametrize("tensor", [torch.empty(2, device="meta"), torch.ones(2)], ids=["meta", "freed"])
def test_tensors_without_numbers_are_refused(tensor: Tensor) -> None:
    if tensor.device.type == "cpu":
        tensor.untyped_storage().resize_(0)
    with pytest.raises(DTypeError, match=r"teacher\._k holds no numbers"):
        of(Factor(tensor))


def test_it_does_not_depend_on_the_order_of_hashes() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_cache_state as t; "
        "print(t.of(t.Factor([{'a', 'b', 'c'}, {t.nn.Linear, t.torch.relu, t.nn.Bilinear}, {t.torch.relu: 1}])))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
    held = [{"a", "b", "c"}, {nn.Linear, torch.relu, nn.Bilinear}, {torch.relu: 1}]
    assert done.stdout.strip() == of(Factor(held))
