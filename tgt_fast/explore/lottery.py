"""Draws without replacement, keyed by a seed and a step; no global generator is used."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tgt_fast.ops.latent import perturb_latents

LAST: Final = 1e30  # the number of a row that is drawn behind all others; of one that is never drawn: infinity


def lottery(count: int, seed: int, about: int | Tensor, step: int | Tensor, device: torch.device) -> Tensor:
    """Independent numbers, float32 [count]: the smallest win. ``about`` tells the lotteries of a step apart.

    They are those of the kernels' stream of restarts, of which only chains draw, and those by the ids of examples.
    """
    drawn = perturb_latents(
        torch.zeros(1, count, device=device),
        1.0,
        seed=seed,
        sample_ids=torch.as_tensor(about, device=device).reshape(1),
        step=step.to(device) if isinstance(step, Tensor) else step,
        op="restart",
    )
    return drawn[0]


def weighted(numbers: Tensor, weights: Tensor) -> Tensor:
    """The numbers of a lottery, float64, that is won in proportion to weights >= 0: exponentials of those rates.

    Rows are drawn without replacement as by Efraimidis and Spirakis, "Weighted random sampling with a reservoir"
    (2006). Those of weight 0 come behind all others.
    """
    uniform = torch.special.ndtr(numbers.double()).clamp(1e-300, 1.0)
    weights = weights.double() / weights.max().clamp(min=1e-300)
    waits = -uniform.log() / weights.clamp(min=1e-25)
    return torch.where(weights > 0, waits, (1 + uniform) * LAST / 4)


def in_turn(count: int, wanted: int, seed: int, about: int, step: int | Tensor, device: torch.device) -> Tensor:
    """``wanted`` of the numbers below ``count``, ascending: the step's piece of an order that is drawn once a round.

    A round is the steps in which all numbers come, at least once.
    """
    if wanted == count:
        return torch.arange(count, device=device)
    steps = -(-count // wanted)
    order = lottery(count, seed, about, step // steps, device).argsort(stable=True)
    places = ((step % steps) * wanted + torch.arange(wanted, device=device)) % count
    return order[places].sort().values


def by_score(scores: Tensor, numbers: Tensor) -> Tensor:
    """The order of falling scores, NaN last, of rows with these lottery numbers; those put last by it stay last."""
    last = (numbers >= LAST).to(torch.int64) + numbers.isinf()
    order = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argsort(descending=True, stable=True)
    return order[last[order].argsort(stable=True)]
