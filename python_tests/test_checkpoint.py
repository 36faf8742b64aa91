"""Checkpoints: exact, without pickle, whole or not at all, and refused when they are not what they should be."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler
from training_kit import adam, assert_same_weights, make_data, make_student, make_teacher, train

import tgt_fast as tgt
from tgt_fast.errors import CheckpointError
from tgt_fast.train import load_checkpoint, save_checkpoint, save_weights
from tgt_fast.train.codec import decode, encode
from tgt_fast.train.rng import isolated_rng

pytestmark = pytest.mark.usefixtures("one_thread")


def two_groups(student: nn.Module) -> torch.optim.Optimizer:
    """Options that are tuples, lists, None and tensors, and a group of their own for the biases."""
    biases = [p for p in student.parameters() if p.dim() == 1]
    weights = [p for p in student.parameters() if p.dim() > 1]
    groups = [
        {"params": weights, "betas": (0.8, 0.95), "names": ["a", "b"]},
        {"params": biases, "weight_decay": 0.0, "lr": torch.tensor(0.02)},
    ]
    return torch.optim.AdamW(groups, lr=0.01, amsgrad=True, foreach=False)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adam": adam,
    "two groups": two_groups,
    "sgd": lambda student: torch.optim.SGD(student.parameters(), lr=0.01),
    "momentum": lambda student: torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, nesterov=True),
    "rmsprop": lambda student: torch.optim.RMSprop(student.parameters(), lr=0.01, centered=True, momentum=0.5),
    "adafactor": lambda student: torch.optim.Adafactor(student.parameters(), lr=0.01),
    "asgd": lambda student: torch.optim.ASGD(student.parameters(), lr=0.01),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "onecycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, cycle_momentum=False),
    "multistep": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 4, 4]),  # a Counter
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),  # an infinity
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),  # its code is not saved
    "sequence": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.8)],
        [3],
    ),
}


@pytest.mark.parametrize(
    ("optimizer_name", "scheduler_name"),
    [*((name, None) for name in OPTIMIZERS), *(("momentum", name) for name in SCHEDULERS)],
)
def test_training_goes_on_bit_for_bit(tmp_path: Path, optimizer_name: str, scheduler_name: str | None) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        student = make_student()
        optimizer = OPTIMIZERS[optimizer_name](student)
        return student, optimizer, None if scheduler_name is None else SCHEDULERS[scheduler_name](optimizer)

    with isolated_rng(0):
        unbroken = start()
        train(*unbroken, 7)
        after = torch.rand(3), np.random.rand(3), random.random()
    with isolated_rng(0):
        student, optimizer, scheduler = start()
        train(student, optimizer, scheduler, 3)
        save_checkpoint(tmp_path, student=student, optimizer=optimizer, scheduler=scheduler, step=3)
    with isolated_rng(99):
        student, optimizer, scheduler = start()
        loaded = load_checkpoint(tmp_path, student=student, optimizer=optimizer, scheduler=scheduler)
        assert loaded.step == 3
        train(student, optimizer, scheduler, 4)
        assert_same_weights(student, unbroken[0])
        assert torch.equal(torch.rand(3), after[0])
        assert np.array_equal(np.random.rand(3), after[1])
        assert random.random() == after[2]
        for ours, theirs in zip(optimizer.param_groups, unbroken[1].param_groups, strict=True):
            assert {k: v for k, v in ours.items() if k != "params"} == {
                k: v for k, v in theirs.items() if k != "params"
            }


# ---- what it is made of ----


def test_json_and_safetensors_and_nothing_of_the_teacher(tmp_path: Path) -> None:
    teacher = make_teacher(batch_norm=True)

    class WithTeacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_student()
            self.teacher = teacher

    student = WithTeacher()
    optimizer = adam(student)
    train(student.net, optimizer, None, 2)
    sampler = tgt.LatentSampler(teacher, sigma=0.5, anchors="balanced").calibrate([make_data()])
    save_checkpoint(tmp_path, student=student, optimizer=optimizer, sampler=sampler, extra={"note": "é"})
    save_weights(tmp_path / "best.safetensors", student.state_dict())

    document = json.loads((tmp_path / "checkpoint.json").read_bytes())
    (tensor_file,) = tmp_path.glob("checkpoint-*.safetensors")
    names = {"best.safetensors", "checkpoint.json", tensor_file.name}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert document["tensors_sha256"] == hashlib.sha256(tensor_file.read_bytes()).hexdigest()
    stored = safetensors.torch.load_file(tensor_file)
    best = safetensors.torch.load_file(tmp_path / "best.safetensors")
    assert not [name for name in (*stored, *best) if "teacher" in name or "coder" in name or "labeler" in name]
    shapes = {tuple(value.shape) for value in stored.values()}
    assert not shapes & {tuple(tensor.shape) for tensor in teacher.frozen_tensors() if tensor.dim() > 1}

    fresh = WithTeacher()
    fresh.load_state_dict(best, strict=True)
    assert_same_weights(fresh, student)


class Awkward(nn.Module):
    """Tied, transposed, 16-bit, empty, 0-d, integer and boolean entries, and one that is no tensor."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.transposed = nn.Parameter(torch.randn(3, 5, generator=generator).T)
        self.sixteen = nn.Parameter(torch.randn(7, generator=generator).bfloat16())
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("flags", torch.rand(6, generator=generator) < 0.5)
        self.note = f"seed {seed}"

    def get_extra_state(self) -> dict[str, Any]:
        return {"note": self.note, "when": (1, 2.5)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.note = state["note"]


def test_awkward_modules(tmp_path: Path) -> None:
    saved, loaded = Awkward(1), Awkward(2)
    save_checkpoint(tmp_path, student=saved)
    load_checkpoint(tmp_path, student=loaded)
    ours, theirs = loaded.state_dict(), saved.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items() if isinstance(v, Tensor))
    assert loaded.note == "seed 1"
    assert loaded.second.weight is loaded.first.weight


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5))
KEYS = st.one_of(st.text(max_size=3), st.integers(0, 3))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(TREES)
def test_codec_round_trip(tree: Any) -> None:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(tree, "root", tensors), allow_nan=False)
    back = decode(json.loads(text), tensors)
    assert back == tree
    assert repr(back) == repr(tree)


def test_codec_of_tensors() -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    tree = {1: shared, "1": shared.T, "n": (np.float64(0.1), np.int32(3)), "c": Counter({2: 3}), "nan": float("nan")}
    tensors: dict[str, Tensor] = {}
    encoded = json.loads(json.dumps(encode(tree, "t", tensors), allow_nan=False))
    shared.zero_()
    back = decode(encoded, tensors)
    assert torch.equal(back[1], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(back["1"], back[1].T)
    assert back["n"] == (0.1, 3)
    assert back["c"] == Counter({2: 3})
    assert back["nan"] != back["nan"]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (lambda: 0, "function"),
        (object(), "object"),
        ({"deep": [1, {2, 3}]}, "root/deep/1"),
        ({(1, 2): 0}, "key of type tuple"),
        (b"bytes", "bytes"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
    ],
)
def test_what_would_need_pickle_is_refused(value: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        encode(value, "root", {})
    with pytest.raises(CheckpointError, match=named.replace("root", "extra")):
        save_checkpoint(tmp_path, student=make_student(), extra=value)
    assert not list(tmp_path.iterdir())


def test_a_schedule_that_needs_pickle_is_refused(tmp_path: Path) -> None:
    class Warmup:
        def __init__(self) -> None:
            self.table = object()

        def __call__(self, step: int) -> float:
            return 1.0

    student = make_student()
    scheduler = lr_scheduler.LambdaLR(adam(student), Warmup())
    with pytest.raises(CheckpointError, match=r"scheduler/lr_lambdas/0/table holds a builtins\.object"):
        save_checkpoint(tmp_path, student=student, scheduler=scheduler)
