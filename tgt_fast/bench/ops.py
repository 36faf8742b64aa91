"""Which op nouns have cases. A new one is a file with ``cases(device, quick)`` and its line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from tgt_fast.bench import contrast, distill, explore, latent, linear, listwise, step, tokens, topk
from tgt_fast.bench.case import Case

OPS: Final[dict[str, Callable[[torch.device, bool], list[Case]]]] = {
    "distill": distill.cases,
    "latent": latent.cases,
    "explore": explore.cases,
    "linear": linear.cases,
    "topk": topk.cases,
    "tokens": tokens.cases,
    "contrast": contrast.cases,
    "listwise": listwise.cases,
    "step": step.cases,
}
