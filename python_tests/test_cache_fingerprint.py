"""The fingerprint: what changes it, what does not, and a stale cache."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_kit import RowWise, data, shards
from programs import ran
from torch import Tensor, nn
from toys import labeler, seeded, vector_teacher

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, CacheError, StaleCacheError

SCALE = 2.0
GLOBAL = RowWise()


def of(teacher: Any = None, **options: Any) -> tgt.Fingerprint:
    return tgt.teacher_fingerprint(RowWise() if teacher is None else teacher, **options)


def changed(change: Callable[[RowWise], Any]) -> RowWise:
    teacher = RowWise()
    with torch.no_grad():
        change(teacher)
    return teacher


def by_default(x: Tensor, factor: float = 1.0) -> Tensor:
    return x * factor


def by_default_of_two(x: Tensor, factor: float = 2.0) -> Tensor:
    return x * factor


class Normalize:
    def __init__(self, mean: float) -> None:
        self.mean = mean

    def __call__(self, x: Tensor) -> Tensor:
        return x - self.mean


class Doubled(RowWise):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "other",
    [
        changed(lambda t: t.weight[1, 3].add_(1e-6)),
        changed(lambda t: t.shift[0].add_(1)),
        RowWise(dtype=torch.bfloat16),
        RowWise(classes=38),
        RowWise(seed=1),
        Doubled(),
        nn.Sequential(RowWise()),
        lambda x: GLOBAL(x),
    ],
    ids=["one weight", "a buffer", "dtype", "shape", "seed", "forward", "structure", "a function around it"],
)
def test_another_teacher_has_another_fingerprint(other: Any) -> None:
    assert of(other) != of()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"k": 5}, "k"),
        ({"k": None}, "k"),
        ({"temperature": 2.5}, "temperature"),
        ({"tail": "uniform"}, "tail"),
        ({"latents": True}, "latents"),
        ({"dtype": torch.float16}, "dtype"),
        ({"version": "2"}, "version"),
        ({"transforms": [Normalize(0.5)]}, "code"),
        ({"transforms": [by_default]}, "code"),
    ],
)
def test_every_setting_counts(options: dict[str, Any], part: str) -> None:
    other = of(**options)
    assert other != of()
    assert other.parts[part] != of().parts[part]


def test_what_a_cache_of_logits_does_not_depend_on() -> None:
    assert of(k=None, temperature=1.0, tail="uniform") == of(k=None)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ([by_default], [by_default_of_two]),
        ([Normalize(0.5)], [Normalize(0.25)]),
        ([functools.partial(by_default, factor=1.0)], [functools.partial(by_default, factor=3.0)]),
        ([Normalize(0.5).__call__], [Normalize(0.25).__call__]),
        ([nn.Softplus(1.0)], [nn.Softplus(2.0)]),
        ([torch.tanh], [torch.sin]),
        ([lambda x: x + 1], [lambda x: x + 2]),
        ([torch.tanh, torch.sin], [torch.sin, torch.tanh]),
    ],
)
def test_transforms_are_told_apart(one: list[Any], two: list[Any]) -> None:
    assert of(transforms=one) != of(transforms=two)
    assert of(transforms=one) == of(transforms=one)


def test_closures_and_globals_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    def around(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: SCALE * module(x)

    before = of(around(RowWise()))
    assert of(around(RowWise())) == before
    assert of(around(RowWise(seed=1))).parts["weights"] != before.parts["weights"]
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert of(around(RowWise())).parts["code"] != before.parts["code"]


def test_what_cannot_be_seen_is_named(tmp_path: Path) -> None:
    class Held:
        lock = None

        def __init__(self) -> None:
            self.lock = iter("abc")

        def __call__(self, x: Tensor) -> Tensor:
            return x

    assert of().unseen == ()
    assert [name.split(" ")[0] for name in of(transforms=[Held()]).unseen] == ["transforms.0.lock"]
    with pytest.warns(UserWarning, match=r"transforms\.0\.lock .*version="):
        tgt.TeacherCache(tmp_path, RowWise(), transforms=[Held()]).close()
    assert of(transforms=[Held()], version="1").unseen == ()


def test_a_version_stands_for_code_and_not_for_weights() -> None:
    assert of(transforms=[by_default], version="1") == of(transforms=[by_default_of_two], version="1")
    assert of(Doubled(), version="1") == of(RowWise(), version="1")
    assert of(RowWise(seed=1), version="1") != of(RowWise(), version="1")
    with pytest.raises(ArgumentError, match="whose outputs"):
        tgt.teacher_fingerprint()
    with pytest.raises(ArgumentError, match="callable, got int"):
        tgt.teacher_fingerprint(3)  # type: ignore[arg-type]


def test_training_mode_and_gradients_do_not_count() -> None:
    teacher = labeler()
    before = of(teacher)
    teacher.train().requires_grad_(False)
    assert of(teacher) == before


def test_of_a_teacher_only_what_outputs_depend_on() -> None:
    def teacher(**options: Any) -> tgt.Teacher:
        made = vector_teacher(**options)
        return made

    def touched(part: str) -> tgt.Teacher:
        made = teacher()
        with torch.no_grad():
            next(getattr(made, part).parameters()).add_(1)
        return made

    assert of(touched("decoder")) == of(touched("encoder")) == of(teacher(max_batch=3)) == of(teacher())
    assert of(touched("labeler")) != of(teacher())
    assert of(touched("encoder"), latents=True) != of(teacher(), latents=True)
    assert of(teacher(labeler_transform=torch.tanh)) != of(teacher())
    hidden = [seeded(lambda: nn.Linear(2, 2), seed) for seed in (0, 1)]
    assert of(teacher(modules=hidden[:1])) != of(teacher(modules=hidden[1:]))
    assert of(teacher().label) != of(touched("labeler").label)


def test_it_is_a_string_that_pickles() -> None:
    fingerprint = of(k=7)
    assert len(fingerprint) == 64
    copy = pickle.loads(pickle.dumps(fingerprint))
    assert (copy, copy.parts) == (fingerprint, fingerprint.parts)
    assert isinstance(copy, str)


def test_it_is_equal_in_another_process() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_cache_fingerprint as t; "
        "print(t.of(t.vector_teacher(labeler_transform=t.Normalize(0.5)), transforms=[t.by_default]))"
    )
    done = ran(code, str(Path(__file__).parent))
    assert done.returncode == 0, done.stderr
    # As that process imports it: this one's may be named otherwise by the test runner.
    here = of(vector_teacher(labeler_transform=Normalize(0.5)), transforms=[by_default])
    assert done.stdout.strip() == here


@pytest.mark.parametrize(
    ("teacher", "options", "words"),
    [
        (changed(lambda t: t.weight[0, 0].add_(1)), {}, r"differ in weights \(stored \w{12}\.{3}, given \w{12}\.{3}\)"),
        (RowWise(), {"temperature": 4.0}, r"they differ in temperature \(stored 2\.0, given 4\.0\)\."),
        (RowWise(), {"transforms": [Normalize(1.0)]}, r"they differ in code \(stored"),
        (RowWise(), {"k": None}, r"k \(stored 3, given None\), tail .*temperature"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("readonly", [False, True])
def test_a_stale_cache_is_an_error_that_names_both(
    tmp_path: Path, teacher: Any, options: dict[str, Any], words: str, readonly: bool
) -> None:
    with tgt.TeacherCache(tmp_path, RowWise(), k=3) as cache:
        cache.label(data(4), range(4))
    with pytest.raises(StaleCacheError, match=words) as caught:
        tgt.TeacherCache(tmp_path, teacher, **({"k": 3} | options), readonly=readonly)
    assert cache.fingerprint in str(caught.value)
    assert of(teacher, **({"k": 3} | options)) in str(caught.value)
    with tgt.TeacherCache(tmp_path, RowWise(), k=3) as cache:
        assert not cache.missing(range(4)).any()


def test_a_writer_that_comes_second_with_another_teacher(tmp_path: Path) -> None:
    one, two = (tgt.TeacherCache(tmp_path, RowWise(seed=seed), k=3) for seed in (0, 1))  # nothing is stored yet
    one.label(data(4), range(4))
    with pytest.raises(StaleCacheError, match="weights"):
        two.label(data(4), range(4))
    one.close()
    two.close()
    with tgt.TeacherCache.open(tmp_path) as cache:
        assert (len(cache), cache.fingerprint) == (4, one.fingerprint)


def test_a_shard_from_another_cache_is_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        with tgt.TeacherCache(tmp_path / str(seed), RowWise(seed=seed), k=3) as cache:
            cache.label(data(4), range(4))
    strange = shards(tmp_path / "1")[0]
    strange.rename(tmp_path / "0" / strange.name)
    with pytest.raises(CacheError, match="was made under fingerprint"):
        tgt.TeacherCache.open(tmp_path / "0")
