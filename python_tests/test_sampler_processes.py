"""A sampler in one of several processes: chains that are its own, and a scale that should not be."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from process_kit import all_made, in_processes, needs_processes
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from tgt_fast.errors import CheckpointError
from tgt_fast.explore import LatentSampler

X, IDS = toys.normal(6, toys.FEATURES), torch.arange(6)
DATA = torch.cat([toys.normal(20, toys.FEATURES), 3 * toys.normal(20, toys.FEATURES, seed=1)])
WORLD = 2


def sampler_of(rank: int, world: int, mode: str = "persistent", **options: Any) -> LatentSampler:
    return LatentSampler(toys.vector_teacher(), mode, rank=rank, world_size=world, units="absolute", **options)


def state_of(rank: int, world: int) -> dict[str, Tensor | int]:
    sampler = sampler_of(rank, world)
    sampler(X, sample_ids=IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sampler.state_dict()


def test_the_first_ranks_state_says_whose_chains_it_holds() -> None:
    sampler = sampler_of(0, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.state_dict()  # no chains yet
    sampler(X, sample_ids=IDS)
    with pytest.warns(UserWarning, match="rank 0 of 2, alone; save every rank's own state"):
        sampler.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rank, world, mode in ((1, 2, "persistent"), (0, 1, "persistent"), (0, 2, "random")):
            other = sampler_of(rank, world, mode)
            other(X, sample_ids=IDS)
            other.state_dict()


@pytest.mark.parametrize(("saved", "here"), [((0, 2), (1, 2)), ((0, 2), (0, 1)), ((1, 2), (1, 4)), ((3, 4), (0, 2))])
def test_another_ranks_chains_warn(saved: tuple[int, int], here: tuple[int, int]) -> None:
    state, sampler = state_of(*saved), sampler_of(*here)
    message = rf"rank {saved[0]} of {saved[1]}, loaded into rank {here[0]} of {here[1]}"
    with pytest.warns(UserWarning, match=message):
        sampler.load_state_dict(state)


def test_a_ranks_own_chains_and_those_of_one_process_do_not_warn() -> None:
    old = state_of(1, 2)
    del old["rank"], old["world_size"]  # as states were before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for saved, here in (((1, 2), (1, 2)), ((0, 1), (0, 1)), ((0, 1), (2, 4))):
            sampler_of(*here).load_state_dict(state_of(*saved))
        sampler_of(0, 2).load_state_dict(old)


@pytest.mark.parametrize(
    ("change", "match"), [({"rank": -1}, "rank must be"), ({"world_size": None}, r"missing \['world_size'\]")]
)
def test_a_place_that_is_none_is_refused(change: dict[str, Any], match: str) -> None:
    state = {name: value for name, value in (state_of(1, 2) | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=match):
        sampler_of(1, 2).load_state_dict(state)


def calibrated(loader: Any, **options: Any) -> LatentSampler:
    return LatentSampler(toys.vector_teacher(), "random", **options).calibrate(loader)


def test_a_loader_that_is_split_over_processes_warns() -> None:
    loaders = [
        DataLoader(TensorDataset(DATA), batch_size=5, sampler=DistributedSampler(DATA, WORLD, rank, shuffle=False))  # type: ignore[arg-type]
        for rank in range(WORLD)
    ]
    scales = []
    for loader in loaders:
        with pytest.warns(UserWarning, match="split over 2 processes.*same data, or load one"):
            scales.append(calibrated(loader).scale)
    assert not torch.allclose(scales[0], scales[1], rtol=1e-2)  # which is why
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrated(DataLoader(TensorDataset(DATA), batch_size=5))
        calibrated([DATA])
        calibrated(loaders[0], units="absolute")  # the scale is not used


def test_accelerates_shards_are_seen() -> None:
    data_loader = pytest.importorskip("accelerate.data_loader")
    loader = data_loader.prepare_data_loader(
        DataLoader(TensorDataset(DATA), batch_size=5), num_processes=2, process_index=1, put_on_device=False
    )
    with pytest.warns(UserWarning, match="split over 2 processes"):
        calibrated(loader)


def _work(rank: int) -> list[list[str]]:
    shard = Subset(TensorDataset(DATA), range(20 * rank, 20 * rank + 20))  # nobody's sampler: by hand
    said = []
    for data in (TensorDataset(DATA), shard):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            calibrated(DataLoader(data, batch_size=5))
        said.append([str(one.message) for one in caught])
    torch.distributed.barrier()
    if rank == 0:  # alone: nobody is waited for
        calibrated([DATA])
    return said


@needs_processes
def test_processes_that_measure_on_other_data_find_out(tmp_path: Path) -> None:
    same, apart = zip(*all_made(in_processes(WORLD, tmp_path, _work)), strict=True)
    assert same == ([], [])
    heard = [message for of_rank in apart for message in of_rank]
    assert heard
    assert all("another scale in this process than in rank" in message for message in heard)
