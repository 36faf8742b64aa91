"""A sampler in several processes: one scale for all, chains that go to any number of processes, ids that move."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from process_kit import all_made, in_processes, needs_processes, part
from test_count_groups import RowWise, network, normal
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from training_kit import CLASSES, FEATURES, LATENT

from tgt_fast import LatentSampler, Teacher
from tgt_fast.errors import ArgumentError

pytestmark = needs_processes
ROWS = 17  # of which DistributedSampler repeats some
IDS = torch.arange(40, 40 + ROWS)


def data() -> tuple[Tensor, Tensor, Tensor]:
    return IDS, normal(ROWS, FEATURES, seed=1), torch.arange(ROWS) % CLASSES


def sampler_of(mode: str = "persistent", **options: Any) -> LatentSampler:
    teacher = Teacher(RowWise(FEATURES, LATENT, 10), RowWise(LATENT, FEATURES, 11), network(12))
    if mode == "persistent":
        options = {"restart_probability": 0.0, "units": "absolute", "radius": 5.0, **options}
    return LatentSampler(teacher, mode, sigma=0.5, seed=7, **options)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_calibrate(world: int, tmp_path: Path) -> None:
    ids, x, y = data()

    def work(rank: int) -> Any:
        rows = DistributedSampler(x, world, rank, shuffle=False)  # type: ignore[arg-type]
        loader = DataLoader(TensorDataset(ids, x, y), batch_size=3, sampler=rows)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampler = sampler_of("random", anchors="balanced").calibrate(loader, group="world")
        synthetic = sampler(x[:5], sample_ids=ids[:5])
        uneven = sampler_of("random").calibrate([] if rank + 1 == world > 1 else [x[rank::world]], group="world").scale
        with pytest.raises(ArgumentError, match=r"not all finite|rank 0 of the group failed|at least two examples"):
            sampler_of("random").calibrate([x / 0 if rank == 0 else x[:0]], group="world")
        assert sampler._pool is not None
        pooled = sampler._pool.ids
        return sampler.scale, synthetic.x, synthetic.anchor_ids, sorted(pooled.tolist()), uneven  # type: ignore[union-attr]

    found = all_made(in_processes(world, tmp_path, work))
    whole = sampler_of("random").calibrate([x]).scale
    for scale, made, anchors, pooled, uneven in found:
        assert torch.equal(scale, found[0][0])
        torch.testing.assert_close(scale, whole, rtol=1e-6, atol=0)
        assert torch.equal(made, found[0][1])  # the same anchors
        assert torch.equal(anchors, found[0][2])
        assert pooled == IDS.tolist()  # nothing twice
        assert torch.equal(uneven, found[0][4])


def visit(sampler: LatentSampler, rows: Any, step: int) -> Tensor:
    """The synthetic examples of a visit, whose chains then move."""
    ids, x, _ = rows
    made = sampler(x, sample_ids=ids, step=step)
    made.x.square().sum().backward()
    return made.x.detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("saved", "here"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_chains_are_met_in_any_number_of_processes(saved: int, here: int, tmp_path: Path) -> None:
    def save(rank: int) -> Any:
        sampler = sampler_of(bank_size=ROWS)
        for step in range(2):
            visit(sampler, part(data(), rank, saved), step)
        state = sampler.state_dict(group="world")
        loaded = sampler_of(bank_size=ROWS)
        loaded.load_state_dict(state)
        visit(loaded, part(data(), rank, saved), 2)
        again = loaded.state_dict(group="world") if saved > 1 else state
        return state, again

    states = all_made(in_processes(saved, tmp_path / "saved", save))
    for state, _ in states:
        assert sorted(state) == sorted(states[0][0])
        assert all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(states[0][0][name])) for name, value in state.items()
        )
    chains = states[0][0]["waiting_chains" if saved > 1 else "bank_chains"]
    assert sorted(chains.tolist()) == IDS.tolist()
    assert sorted(states[0][1]["waiting_chains" if saved > 1 else "bank_chains"].tolist()) == IDS.tolist()
    turned = [one.flip(0) for one in data()]

    def go_on(rank: int) -> Any:
        sampler = sampler_of(bank_size=ROWS)  # of which each process needs a part
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampler.load_state_dict(states[0][0] if saved > 1 else without_place(states[0][0]))
        own = sampler_of(bank_size=ROWS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own.load_state_dict(sampler.state_dict())  # those that wait go along
        made = [visit(sampler, part(turned, rank, here), step) for step in (2, 3)]
        assert torch.equal(visit(own, part(turned, rank, here), 2), made[0])
        return made

    found = all_made(in_processes(here, tmp_path / "here", go_on))
    alone = sampler_of(bank_size=ROWS)
    for step in range(2):
        visit(alone, data(), step)
    for place, step in enumerate((2, 3)):
        assert torch.equal(torch.cat([made[place] for made in found]), visit(alone, turned, step))


def without_place(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in ("rank", "world_size")}


def test_an_id_that_moves_starts_anew_and_warns_once(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        sampler, said = sampler_of(), []
        visit(sampler, part(data(), rank, 2), 0)
        moved = None
        torch.distributed.barrier()
        for step in (1, 2):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                rows = part(data(), 1 - rank if step == 1 else rank, 2)
                made = visit(sampler, rows, step)
                moved = made if moved is None else moved
            said.append([str(one.message) for one in caught if "came to rank" in str(one.message)])
        anew = visit(sampler_of(), part(data(), 1 - rank, 2), 1)
        latest = sampler.state_dict(group="world")["waiting_chains"]
        by_default = sampler_of("random", units="absolute")(normal(3, FEATURES, seed=2)).ids
        return said, moved is not None and torch.equal(moved, anew), sorted(latest.tolist()), by_default.tolist()

    found = all_made(in_processes(2, tmp_path, work))
    for said, starts_anew, chains, _ in found:
        assert [len(messages) for messages in said] == [1, 0]
        assert starts_anew
        assert chains == IDS.tolist()
    assert not set(found[0][3]) & set(found[1][3])
