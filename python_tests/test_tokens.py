"""sample_tokens: the same tokens on every backend, their exact distribution, borders, keys, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from numerics import threads
from strategies import DTYPES, lay_out, random_values
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, BackendError, DeviceError, DTypeError, ShapeError
from tgt_fast.kernels.philox import philox4x32
from tgt_fast.kernels.reference.tokens import token_uniform

# Triton has no kernel that draws.
drawing = pytest.mark.parametrize(
    "backend", ["reference", "native", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)

FILTERS: dict[str, dict[str, Any]] = {
    "all": {},
    "temperature": {"temperature": 0.3},
    "greedy": {"temperature": 0},
    "top-k": {"top_k": 5},
    "top-k of most": {"top_k": 1000},
    "top-p": {"top_p": 0.8},
    "top-p of one": {"top_p": 1e-9},
    "min-p": {"min_p": 0.2},
    "every one": {"top_k": 7, "top_p": 0.9, "min_p": 0.05, "temperature": 1.7},
}
# What each number of classes is there for.
SIZES = (
    1,
    5,  # part of a vector
    16,
    257,  # whole vectors and a tail
    4099,  # blocks of 2048 and a last one of 3
)


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    return random_values(shape, seed, scale, dtype)


@drawing
@pytest.mark.parametrize("shape", [4, 64])
def test_of_equal_tokens_top_p_keeps_no_more_than_their_share(backend: str, shape: int) -> None:
    """Half of the mass is that of half of them, exactly: the next one is not needed."""
    drawn = tgt.sample_tokens(torch.zeros(600, shape), top_p=0.5, seed=1, backend=backend)
    assert drawn.unique().tolist() == list(range(shape // 2))


@drawing
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("size", SIZES)
def test_every_backend_draws_the_same_tokens(backend: str, size: int, filters: dict[str, Any]) -> None:
    """The truth is the reference on float64 logits of the same values. Rounded to 16 bits, logits have many ties."""
    for dtype in DTYPES:
        x = logits(2, 5, size, dtype=dtype) if size < 1000 else logits(1, 2, size, dtype=dtype)
        key: dict[str, Any] = {"seed": 3, "step": 2, "replica": 1}
        want = tgt.sample_tokens(x.double(), **filters, **key, backend="reference")
        got = tgt.sample_tokens(x, **filters, **key, backend=backend)
        assert got.dtype == torch.int64
        assert torch.equal(got, want)


@drawing
@pytest.mark.parametrize("order", ["rising", "falling", "equal", "few values"])
def test_rows_that_are_hard_to_select_from(backend: str, order: str) -> None:
    """A rising row renews the list of the largest at every token; equal ones leave the choice to the ids."""
    base = torch.linspace(-3, 3, 500)
    rows = {"rising": base, "falling": base.flip(0), "equal": torch.ones(500), "few values": (base * 2).round()}
    x = rows[order].expand(4, 500)
    for filters in ({"top_k": 1}, {"top_k": 60}, {"top_p": 0.3}, {"top_k": 400, "top_p": 0.6}, {"top_k": 499}):
        want = tgt.sample_tokens(x.double(), seed=1, **filters, backend="reference")
        assert torch.equal(tgt.sample_tokens(x, seed=1, **filters, backend=backend), want)


@drawing
def test_a_row_that_is_larger_than_a_chips_shared_memory(backend: str) -> None:
    x = logits(1, 60_000)
    for filters in ({"top_k": 50, "top_p": 0.95}, {"top_p": 0.5}):
        want = tgt.sample_tokens(x, seed=5, **filters, backend="reference")
        assert torch.equal(tgt.sample_tokens(x, seed=5, **filters, backend=backend), want)


def kept_probabilities(
    x: list[float], temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """The definition, token by token, in plain Python."""
    weight = [math.exp(value / temperature) for value in x]
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))[:top_k]
    mass, kept, total = 0.0, [], sum(weight[i] for i in order)
    for i in order:
        if mass >= top_p * total:
            break
        kept.append(i)
        mass += weight[i]
    kept = [i for i in kept if weight[i] >= min_p * weight[order[0]]]
    whole = sum(weight[i] for i in kept)
    return [weight[i] / whole if i in kept else 0.0 for i in range(len(x))]


def chi_square(tokens: Tensor, probabilities: list[float]) -> float:
    """The statistic, in standard deviations above its mean: about normal. Infinite for a token that cannot be."""
    expected = torch.tensor(probabilities, dtype=torch.float64) * tokens.numel()
    found = torch.bincount(tokens.reshape(-1), minlength=len(probabilities)).double()
    possible = expected > 0
    if found[~possible].any():
        return math.inf
    freedom = max(1, int(possible.sum()) - 1)
    statistic = float(((found - expected)[possible] ** 2 / expected[possible]).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "temperature": {"temperature": 2.0},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.1},
    "top-p of the rest after top-k": {"top_k": 6, "top_p": 0.75},
    "every one": {"top_k": 8, "top_p": 0.95, "min_p": 0.15, "temperature": 1.5},
}
LOGITS = [0.3, -1.0, 2.0, 1.2, 1.2, -0.5, 0.0, 1.9, -4.0, 0.7, 0.7, 0.69]


@pytest.mark.parametrize("filters", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@pytest.mark.parametrize("backend", ["reference", "native"], indirect=True)
def test_the_distribution_is_exact(backend: str, filters: dict[str, Any]) -> None:
    x = torch.tensor(LOGITS, dtype=torch.float64).expand(200, 200, -1)
    tokens = tgt.sample_tokens(x, seed=11, **filters, backend=backend)
    assert chi_square(tokens, kept_probabilities(LOGITS, **filters)) < 5
    warmer = {**filters, "temperature": 1.05 * filters.get("temperature", 1.0)}
    assert chi_square(tgt.sample_tokens(x, seed=11, **warmer), kept_probabilities(LOGITS, **filters)) > 5


def test_a_token_depends_on_its_logits_id_position_and_key_alone(native: str) -> None:
    x, ids = logits(9, 6, 33), torch.arange(100, 109)
    options: dict[str, Any] = {"seed": 4, "top_p": 0.9}
    whole = tgt.sample_tokens(x, sample_ids=ids, **options)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tgt.sample_tokens(x[order], sample_ids=ids[order], **options), whole[order])
    for part in torch.arange(9).split([2, 1, 6]):
        assert torch.equal(tgt.sample_tokens(x[part], sample_ids=ids[part], **options), whole[part])
    assert torch.equal(tgt.sample_tokens(x[:, :4], sample_ids=ids, **options), whole[:, :4])  # a shorter text
    assert torch.equal(tgt.sample_tokens(x.view(9, 2, 3, 33), sample_ids=ids, **options), whole.view(9, 2, 3))
    one = tgt.sample_tokens(x[3, 0], sample_ids=ids[3:4], **options)
    assert one.shape == ()
    assert one == whole[3, 0]


@drawing
def test_every_part_of_the_key_matters_and_may_be_a_tensor(backend: str) -> None:
    x = torch.zeros(64, 1000)
    base: dict[str, Any] = {"seed": 1, "step": 2, "replica": 3, "backend": backend}
    first = tgt.sample_tokens(x, **base)
    for change in ({"seed": 2}, {"step": 3}, {"replica": 4}, {"sample_ids": torch.arange(1, 65) + 2**40}):
        assert (tgt.sample_tokens(x, **base | change) == first).float().mean() < 0.1
    held = base | {"seed": torch.tensor(1), "step": torch.tensor(2, dtype=torch.int32)}
    assert torch.equal(tgt.sample_tokens(x, **held), first)


def test_position_l_takes_word_l_of_the_samples_stream() -> None:
    uniform = token_uniform(5, torch.tensor([7]), 6, step=1, replica=2)
    for position in range(6):
        words = philox4x32((position // 4, 7, 2 << 16, 2 << 28 | 1), (5, 0))
        assert float(uniform[0, position]) == (int(words[position % 4]) + 0.5) / 2**32


# Borders


@drawing
def test_ties_at_a_border_go_to_the_lowest_ids(backend: str) -> None:
    x = torch.zeros(64, 8)
    assert tgt.sample_tokens(x, top_k=3, backend=backend).unique().tolist() == [0, 1, 2]
    assert tgt.sample_tokens(x, top_p=0.5, backend=backend).unique().tolist() == [0, 1, 2, 3]
    assert tgt.sample_tokens(x, top_p=0.51, backend=backend).unique().tolist() == [0, 1, 2, 3, 4]
    assert tgt.sample_tokens(x, top_k=6, top_p=0.5, backend=backend).unique().tolist() == [0, 1, 2]
    x[:, 5] = 1.0
    assert tgt.sample_tokens(x, top_k=3, backend=backend).unique().tolist() == [0, 1, 5]
    x[:, ::2] = -0.0  # is 0
    assert tgt.sample_tokens(x, top_k=4, backend=backend).unique().tolist() == [0, 1, 2, 5]
    assert tgt.sample_tokens(x[:, :5], temperature=0, backend=backend).unique().tolist() == [0]


@drawing
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_borders_among_many_ties(backend: str, dtype: torch.dtype) -> None:
    """Few values, of both signs and -inf, subnormal ones, neighbours in 16 bits; lists with and without room.

    Equal weights make masses that are exact: a border that lies between two tokens stays there.
    """
    generator = torch.Generator().manual_seed(0)
    size = 1300
    tiny = float(torch.finfo(dtype).smallest_normal) / 4
    near = 1 + float(torch.finfo(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16).eps)
    for values in ([0.0, -0.0], [1.0, near, -1.0, -near, -math.inf], [3.0, tiny, -tiny, 0.0, -200.0, -300.0]):
        x = torch.tensor(values, dtype=dtype)[torch.randint(len(values), (2, size), generator=generator)]
        for filters in (
            {"top_k": 700}, {"top_k": 1024, "top_p": 0.5}, {"top_k": 1025, "top_p": 0.75}, {"top_p": 0.25},
            {"top_k": size - 1, "top_p": 0.999, "min_p": 0.1}, {"top_k": 3, "top_p": 0.34}, {"top_p": 1 - 2**-53},
        ):  # fmt: skip
            want = tgt.sample_tokens(x.double(), seed=1, **filters, backend="reference")
            assert torch.equal(tgt.sample_tokens(x, seed=1, **filters, backend=backend), want)


@drawing
def test_filters_that_keep_all_change_nothing(backend: str) -> None:
    x = logits(12, 40)
    plain = tgt.sample_tokens(x, backend=backend)
    for filters in ({"top_k": 40}, {"top_k": 10**9}, {"top_p": 1.0}, {"min_p": 0.0}, {"top_p": 1, "top_k": 41}):
        assert torch.equal(tgt.sample_tokens(x, **filters, backend=backend), plain)
    assert torch.equal(tgt.sample_tokens(x, min_p=1.0, backend=backend), x.argmax(-1))


@drawing
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0}], ids=str)
def test_masks_and_rows_that_are_no_distribution(backend: str, filters: dict[str, Any]) -> None:
    x = logits(8, 6, 20)
    x[:, :, ::2] = -math.inf
    tokens = tgt.sample_tokens(x, **filters, backend=backend)
    assert (tokens % 2 == 1).all()
    odd = x.clone()
    odd[:, 1] = -math.inf
    odd[:, 2, 3] = math.nan
    odd[:, 3, 19] = math.inf
    odd[:, 4, :] = math.nan
    found = tgt.sample_tokens(odd, **filters, backend=backend)
    assert (found[:, 1:5] == -1).all()
    assert torch.equal(found[:, ::5], tokens[:, ::5])
    single = torch.full((3, 20), -math.inf)
    single[:, 7] = -1e30
    assert (tgt.sample_tokens(single, **filters, backend=backend) == 7).all()


@drawing
def test_extreme_logits_and_temperatures(backend: str) -> None:
    x = torch.tensor([[3e38, -3e38, 0.0, 3e38], [1e-30, 0.0, -1e-30, 0.0]]).repeat(4, 1)
    for temperature in (1e-30, 1e-3, 1.0, 1e30):
        want = tgt.sample_tokens(x, temperature=temperature, backend="reference")
        assert torch.equal(tgt.sample_tokens(x, temperature=temperature, backend=backend), want)


# Forms


@drawing
@pytest.mark.parametrize("layout", ["dense", "row-strided", "column-strided", "transposed"])
@pytest.mark.parametrize("shape", [(9,), (4, 9), (4, 3, 2, 9), (0, 9), (3, 0, 9), (1, 1, 1)], ids=str)
def test_any_shape_and_strides(backend: str, shape: tuple[int, ...], layout: str) -> None:
    x = logits(*shape)
    out = tgt.sample_tokens(lay_out(x, layout), top_k=4, top_p=0.9, backend=backend)
    assert out.shape == shape[:-1]
    assert torch.equal(out, tgt.sample_tokens(x, top_k=4, top_p=0.9, backend="reference"))


def test_same_tokens_for_any_number_of_threads_and_no_global_state(native: str) -> None:
    x, state = logits(301, 1031), torch.get_rng_state()
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(tgt.sample_tokens(x, top_p=0.9, seed=1))
    assert all(torch.equal(out, results[0]) for out in results)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_graph_is_made(native: str) -> None:
    x = logits(3, 4).requires_grad_()
    assert not tgt.sample_tokens(x).requires_grad


X = logits(4, 3)
ERRORS: list[tuple[type[Exception], dict[str, Any], str]] = [
    (DTypeError, {"logits": X.long()}, "int64"),
    (DTypeError, {"logits": [1.0]}, "list"),
    (ShapeError, {"logits": torch.tensor(1.0)}, r"\(\)"),
    (ShapeError, {"logits": torch.zeros(3, 0)}, r"\(3, 0\)"),
    (ArgumentError, {"temperature": -0.5}, "-0.5"),
    (ArgumentError, {"temperature": math.nan}, "nan"),
    (ArgumentError, {"top_k": 0}, "top_k.*0"),
    (ArgumentError, {"top_k": 2.0}, "top_k.*2.0"),
    (ArgumentError, {"top_p": 0.0}, "top_p.*0.0"),
    (ArgumentError, {"top_p": 1.5}, "top_p.*1.5"),
    (ArgumentError, {"min_p": -0.1}, "min_p.*-0.1"),
    (ArgumentError, {"min_p": 2}, "min_p.*2"),
    (ShapeError, {"sample_ids": torch.arange(3)}, r"\(3,\).*logits \(4, 3\)"),
    (ArgumentError, {"sample_ids": torch.tensor([0, 1, 2, -1])}, "-1"),
    (DeviceError, {"sample_ids": torch.arange(4, device="meta")}, "meta.*cpu"),
    (ArgumentError, {"seed": 0.5}, "0.5"),
    (ArgumentError, {"step": 2**28}, str(2**28)),
    (ArgumentError, {"replica": 2**16}, str(2**16)),
    (BackendError, {"backend": "triton"}, "Triton"),
    (ArgumentError, {"backend": "gpu"}, "'gpu'"),
]


@pytest.mark.parametrize(
    ("error", "changes", "message"), ERRORS, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_bad_input_is_named(native: str, error: type[Exception], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        tgt.sample_tokens(**{"logits": X, **changes})
