"""A replica of each sample's own, in one call: the noise is that of a call with the replica as a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, DeviceError, DTypeError, ShapeError

IDS = torch.tensor([3, 3, 2**48 - 1, 2**32 + 5, 3, 0])
REPLICAS = torch.tensor([0, 1, 2**16 - 1, 2**15, 7, 2**15 - 1])
Z = torch.arange(6 * 70.0).view(6, 70).sin()
TABLE = torch.arange(70 * 3.0).view(70, 3).cos()
KEY: dict[str, Any] = {"seed": 2**63 + 9, "step": 2**28 - 1}

OPS: dict[str, Callable[..., Tensor]] = {
    "perturb": lambda x, **key: tgt.perturb_latents(x, 1.0, **key),
    "truncated": lambda x, **key: tgt.perturb_latents(x, 1.0, truncation=1.5, **key),
    "restart": lambda x, **key: tgt.perturb_latents(x, 1.0, op="restart", **key),
    "ascend": lambda x, **key: tgt.ascend_latents(x, torch.zeros_like(x), step_size=1.0, sigma=1.0, **key),
    "tokens": lambda x, **key: tgt.sample_tokens(x, temperature=50.0, **key).float(),
    "gumbel": lambda x, **key: tgt.soft_embedding(x, TABLE.to(x.device), gumbel=True, tau=0.3, **key),
}


def one_by_one(op: Callable[..., Tensor], x: Tensor, **key: Any) -> Tensor:
    rows = [
        op(x[i : i + 1], sample_ids=IDS[i : i + 1], replica=int(REPLICAS[i]), **KEY, **key) for i in range(len(IDS))
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("name", OPS)
def test_each_samples_noise_is_that_of_its_replica(name: str, backend: str) -> None:
    if (name, backend) == ("tokens", "triton"):
        pytest.skip("Triton has no kernel that draws tokens")
    op = OPS[name]
    made = op(Z, sample_ids=IDS, replica=REPLICAS, backend=backend, **KEY)
    assert torch.equal(made, one_by_one(op, Z, backend=backend))
    same = op(Z[:1].expand(6, -1), sample_ids=IDS, replica=REPLICAS, backend=backend, **KEY)
    assert not torch.equal(same[0], same[1])
    narrow = op(Z, sample_ids=IDS, replica=REPLICAS.to(torch.int32), backend=backend, **KEY)
    assert torch.equal(made, narrow)
    number = op(Z, sample_ids=IDS, replica=5, backend=backend, **KEY)
    assert torch.equal(number, op(Z, sample_ids=IDS, replica=torch.full((6,), 5), backend=backend, **KEY))


@pytest.mark.once("torch.compile")
@pytest.mark.parametrize("name", OPS)
def test_compiled_and_dispatched_calls_give_the_same_bits(name: str) -> None:
    op = OPS[name]

    def call(x: Tensor, replicas: Tensor) -> Tensor:
        return op(x, sample_ids=IDS, replica=replicas, **KEY)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(Z, REPLICAS), call(Z, REPLICAS))
    if name in ("perturb", "gumbel"):  # differentiable: the noise of backward is that of forward
        grads = []
        for run in (call, compiled):
            x = Z.clone().requires_grad_()
            (run(x, REPLICAS) ** 2).sum().backward()
            grads.append(x.grad)
        assert torch.equal(grads[0], grads[1])
    with pytest.raises(ArgumentError, match=r"replica must be in \[0, 2\*\*16\), got 65536"):
        compiled(Z, REPLICAS.add(1))


@pytest.mark.parametrize("name", OPS)
def test_bad_replicas_are_named(name: str) -> None:
    op = OPS[name]
    for replica, error, match in (
        (REPLICAS[:5], ShapeError, r"replica \(5,\) must be one a sample"),
        (REPLICAS[0], ShapeError, r"replica \(\) must be one a sample"),
        (REPLICAS.float(), DTypeError, "replica must hold integers"),
        (REPLICAS.to("meta"), DeviceError, "replica is on meta"),
        (REPLICAS + 1, ArgumentError, r"replica must be in \[0, 2\*\*16\), got 65536"),
        (REPLICAS - 1, ArgumentError, r"replica must be in \[0, 2\*\*16\), got -1"),
    ):
        with pytest.raises(error, match=match):
            op(Z, sample_ids=IDS, replica=replica, **KEY)
