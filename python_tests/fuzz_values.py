"""Arguments that nobody should pass, and tensors that are not what they seem."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fuzz_subjects import Call
from torch import Tensor

LARGE = 1 << 16  # counts beyond it are asked for only where nothing is made of that size
COUNTS = {"steps", "replicas", "accumulate", "bank_size", "eval_every", "checkpoint_every", "max_batch", "batch_size"}

NUMBERS: list[Any] = [0, 1, -1, 2, 3, 7, 1 << 31, 1 << 40, 1 << 63, -(1 << 63), 1 << 64, 10**400, True, False]
NUMBERS += [0.0, -0.0, 0.5, 1.0, 2.5, -1.5, 5e-324, 1e-38, 1e38, 1e300, math.inf, -math.inf, math.nan]
NUMBERS += [np.float32(0.5), np.int64(3), np.float64("nan"), 1j, "1"]
WORDS: list[Any] = ["", "mean", "none", "sum", "auto", "reference", "native", "triton", "keep", "l2", "linf", "std"]
WORDS += [
    "forward_kl",
    "jsd",
    "bucket",
    "renormalize",
    "uniform",
    "random",
    "prior",
    "persistent",
    "x",
    "\0",
    "ü",
    b"x",
]
THINGS: list[Callable[[], Any]] = [
    lambda: None, object, list, dict, tuple, set, lambda: [1.0, 2.0], lambda: (None,), lambda: {"x": 1}, lambda: len,
    lambda: int, lambda: torch.float32, lambda: torch.device("cpu"), lambda: np.zeros(3), lambda: np.array("x"),
    lambda: slice(None), lambda: range(3), lambda: iter([]), lambda: torch.nn.Linear(2, 2), lambda: Exception("x"),
]  # fmt: skip
TENSORS: list[Callable[[], Any]] = [
    lambda: torch.tensor(1.0), lambda: torch.tensor(2), lambda: torch.tensor(math.nan), lambda: torch.tensor([]),
    lambda: torch.zeros(0, 5), lambda: torch.zeros(3, 0), lambda: torch.randn(4, 5), lambda: torch.randn(2, 3, 4),
    lambda: torch.arange(4), lambda: torch.tensor([1 << 62, -(1 << 62), -1, 0]), lambda: torch.tensor([True, False]),
    lambda: torch.randn(4, 5, dtype=torch.complex64), lambda: torch.randn(4, 5).to_sparse(),
    lambda: torch.randn(4, 5, device="meta"), lambda: torch.empty(4, 5, dtype=torch.uint8),
    lambda: torch.quantize_per_tensor(torch.randn(4, 5), 0.1, 0, torch.qint8),
]  # fmt: skip


def freed(x: Tensor) -> Tensor:
    x = x.detach().clone()
    x.untyped_storage().resize_(0)
    return x


def filled(value: float) -> Callable[[Tensor], Tensor]:
    def fill(x: Tensor) -> Tensor:
        x = x.detach().clone()
        if x.numel():
            at = tuple(size // 2 for size in x.shape)
            x[at] = value if x.dtype.is_floating_point else int(max(min(value, 1e18), -1e18)) if value == value else 0
        return x

    return fill


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


CHANGES: list[Callable[[Tensor], Any]] = [
    lambda x: x[:0], lambda x: x[..., :0], lambda x: x[..., :1], lambda x: x[:1], lambda x: x[0], lambda x: x[None],
    lambda x: x[..., None], lambda x: x.T, lambda x: x.flatten(), lambda x: x.expand(2, *x.shape),
    lambda x: x[..., ::2], lambda x: x.flip(0), lambda x: torch.cat([x, x]), lambda x: torch.cat([x, x], -1),
    lambda x: x.double(), lambda x: x.half(), lambda x: x.bfloat16(), lambda x: x.long(), lambda x: x.int(),
    lambda x: x.bool(), lambda x: x.to(torch.complex64), lambda x: x.to("meta"), lambda x: x.to_sparse(),
    lambda x: x.to(torch.float8_e5m2), lambda x: x.detach().clone().requires_grad_(), lambda x: x.detach(),
    lambda x: x.cfloat().conj(), lambda x: torch._neg_view(x), lambda x: x.numpy(), lambda x: x.tolist(),
    lambda x: torch.nn.Parameter(x.detach()), lambda x: x[:1].expand(x.shape), lambda x: torch._efficientzerotensor(
        tuple(x.shape), dtype=x.dtype
    ), freed, inference, *map(filled, (math.nan, math.inf, -math.inf, 3e38, -1.0, 1e18)), lambda x: x * 1e30,
    lambda x: x * 0, lambda x: x + 100,
]  # fmt: skip


def odd(name: str, value: Any, draw: random.Random) -> tuple[Any, str]:
    """Something else than ``value`` for the parameter ``name``, and a word for it."""
    if isinstance(value, Tensor) and draw.random() < 0.7:
        for _ in range(5):
            number = draw.randrange(len(CHANGES))
            try:
                return CHANGES[number](value), f"change {number}"
            except Exception:  # of another dtype or shape than this one takes
                continue
    kind = draw.choice(("number", "number", "word", "thing", "tensor"))
    if isinstance(value, str) and draw.random() < 0.6:
        kind = "word"
    if kind == "number":
        number = draw.choice(NUMBERS)
        if name in COUNTS and isinstance(number, int) and number > LARGE:
            number = 3
        return number, repr(number)[:20]
    if kind == "word":
        word = draw.choice(WORDS)
        return word, repr(word)
    among = THINGS if kind == "thing" else TENSORS
    number = draw.randrange(len(among))
    return among[number](), f"{kind} {number}"


def mutated(call: Call, draw: random.Random) -> str:
    """Change some arguments of a call, often one, sometimes none; what was changed."""
    told = []
    places: list[Any] = [*range(len(call.arguments)), *call.options]
    for _ in range(draw.choice((0, 1, 1, 1, 1, 2, 3))):
        if not places:  # none twice: what has no memory cannot be changed once more
            break
        place = places.pop(draw.randrange(len(places)))
        if isinstance(place, int):
            value, word = odd("", call.arguments[place], draw)
            call.arguments[place] = value
        else:
            value, word = odd(place, call.options[place], draw)
            call.options[place] = value
        told.append(f"{place}={word}")
    if call.options and draw.random() < 0.2:
        place = draw.choice(list(call.options))
        del call.options[place]
        told.append(f"no {place}")
    return ", ".join(told)
