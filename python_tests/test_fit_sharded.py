"""fit() with a student of FSDP2: checkpoints of its shards, and weights that go to any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from process_kit import Raised, all_made, in_processes, needs_processes
from test_fit_parallel import trained, whole, wrapped

import tgt_fast as tgt
from tgt_fast.errors import CheckpointError
from tgt_fast.train import checkpoint_weights

pytestmark = needs_processes
WORLD = 2


def run(folder: Path, rank: int, world: int = WORLD, kind: str = "sharded", **options: Any) -> Any:
    given = {"checkpoint_dir": folder, "checkpoint_every": 1, "resume": True, **options}
    student, result, _ = trained(kind, world, rank, 1, **given)
    return whole(student.state_dict()), result.history, whole(result.ema), whole(result.best)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_checkpoints(tmp_path: Path) -> None:
    """All of it in one world, which costs its start once."""

    def work(rank: int) -> Any:
        expected = run(tmp_path / "unbroken", rank, resume=False)
        run(tmp_path / "broken", rank, steps=2)
        found = run(tmp_path / "broken", rank)
        changed = wrapped("alone")
        with pytest.raises(CheckpointError, match="the student is not: call fully_shard as for the run"):
            tgt.train.load_checkpoint(tmp_path / "alone", student=changed)
        return expected, found

    folder = tmp_path / "broken"

    def alone(rank: int) -> Any:
        return run(tmp_path / "alone", rank, world=1, steps=1)

    all_made(in_processes(1, tmp_path / "results", alone))
    for expected, found in all_made(in_processes(WORLD, tmp_path / "results", work)):
        for one, other in zip(expected, found, strict=True):
            assert same(one, other)  # bit for bit
    names = sorted(path.name for path in folder.iterdir())
    assert len([name for name in names if name.endswith(".dcp")]) == 1
    best = safetensors.torch.load_file(folder / "best.safetensors")
    assert same(best, expected[3])  # whole
    weights = checkpoint_weights(folder)
    assert same(weights, dict(expected[0]))
    student = wrapped("alone")
    student.load_state_dict(weights)

    def elsewhere(rank: int) -> Any:
        with pytest.raises(
            CheckpointError, match=r"saved by 2 processes.*the run has 4. To go on from its weights, call"
        ):
            run(folder, rank, world=4)
        sharded = wrapped("sharded")
        tgt.fit(
            sharded, lambda *_, **__: {}, [0], steps=0, optimizer=torch.optim.SGD(sharded.parameters()), progress=False
        )
        sharded.load_state_dict(weights)  # whole tensors
        return whole(sharded.state_dict())

    for made in all_made(in_processes(4, tmp_path / "results", elsewhere)):
        assert same(dict(made), weights)

    (shards,) = folder.glob("*.dcp")
    file = sorted(shards.iterdir())[1]
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(bytes(raw))
    for made in in_processes(WORLD, tmp_path / "results", lambda rank: run(folder, rank)):
        assert isinstance(made, Raised)
        assert "its hash does not match" in made.text
