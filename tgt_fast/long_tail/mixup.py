"""MixUp between the latents of two examples, decoded and labelled by the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tgt_fast._ranges import named_range
from tgt_fast.errors import ArgumentError, CheckpointError, ShapeError
from tgt_fast.explore.counters import Counters
from tgt_fast.explore.options import SamplerOptions, checked_integer
from tgt_fast.explore.synthetic import Synthetic
from tgt_fast.ops import _checks
from tgt_fast.teacher import Latents, Teacher, tree

_OP: Final = "LatentMixUp"


class Mixture(NamedTuple):
    """Which row is mixed with which, and the share of the first."""

    partner: Tensor  # [B] int64
    share: Tensor  # [B] float64 in [0, 1]


class LatentMixUp:
    r"""``x~ = Dec(lam Enc(x_i) + (1 - lam) Enc(x_j))`` with the label ``h(x~)``: MixUp in the latent space.

    j is a random permutation of the batch, ``lam ~ Beta(alpha, alpha)`` a row. It is used wherever a
    :class:`tgt_fast.LatentSampler` is, as in ``TGTObjective(teacher, LatentMixUp(teacher))``. What it draws depends on
    seed and step alone; no global generator is read or written. A step on a device is read back.

    Source: Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018; between hidden states, Verma et al.,
    "Manifold mixup", ICML 2019. Through a generative teacher that labels the result, as here, is ours; evidence: this
    library's digits, where it gains about half of what exploration does.

    Args:
        teacher: the frozen :class:`tgt_fast.Teacher`; latents must have no mask, as those of unequal length have.
        alpha: > 0; 1 draws uniformly, large ones near 1/2.
        seed: >= 0.

    Raises:
        ArgumentError: no teacher, or an option outside its range.

    >>> import torch, tgt_fast as tgt
    >>> from torch import nn
    >>> teacher = tgt.Teacher(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 3))
    >>> mix = tgt.long_tail.LatentMixUp(teacher)
    >>> mix(torch.randn(4, 8)).x.shape, mix.drawn(4, step=0).partner.sort().values.tolist()
    (torch.Size([4, 8]), [0, 1, 2, 3])
    """

    mode: Final = "mixup"
    encodes: Final = True  # a call looks at Enc(x), or is given it
    last_disagreement: Final[list[float]] = []

    def __init__(self, teacher: Teacher, *, alpha: float = 1.0, seed: int = 0) -> None:
        if not isinstance(teacher, Teacher):
            raise ArgumentError(f"{_OP}: teacher must be a tgt_fast.Teacher, got {type(teacher).__name__}")
        self.teacher = teacher
        self.alpha = _checks.number(_OP, "alpha", alpha, 0, 1e30, open_low=True)
        self.seed = checked_integer("seed", seed, 0, 2**63 - 1, _OP)
        self.options = SamplerOptions(repeats="same")  # as many rows as the batch has
        self._counters = Counters(0, None, None)
        self._step = 0

    def __call__(
        self,
        x: Any,
        *,
        student: Callable[..., Any] | None = None,
        sample_ids: Tensor | None = None,
        step: int | Tensor | None = None,
        occurrence: Tensor | None = None,
        logits_of: Any = None,
        latents: Latents | Tensor | None = None,
    ) -> Synthetic:
        """Mix a batch with itself.

        Args:
            x: B examples in the teacher's data space.
            step: by default a counter that advances once a call.
            sample_ids, latents: as for :class:`tgt_fast.LatentSampler`; ``anchor_ids`` are the first example's.
            student, occurrence, logits_of: not looked at.

        Raises:
            ShapeError: latents with a mask.
        """
        self.teacher.check_data(x)
        count, device = tree.batch_size(x), tree.first_device(x)
        now = self._step if step is None else int(step)
        ids = self._counters.key(count, device, sample_ids, now, None, self.options).ids
        with named_range("explore (mixup)"), torch.no_grad():
            given = Latents(latents) if isinstance(latents, Tensor) else latents
            anchors = self.teacher.encode(x) if given is None else tree.detach(given.check(count, _OP))
            if anchors.mask is not None:
                raise ShapeError(f"{_OP}: latents of unequal length, which have a mask, cannot be mixed")
            partner, share = (part.to(anchors.z.device) for part in self.drawn(count, now))
            share = share.reshape(-1, *(1,) * (anchors.z.ndim - 1)).to(
                torch.promote_types(anchors.z.dtype, torch.float32)
            )
            mixed = share * anchors.z + (1 - share) * anchors.z[partner]
            made = Latents(mixed.to(anchors.z.dtype))
            decoded = self.teacher.decode(made)
            logits = self.teacher.label(decoded)
        self._counters.advance(count, ids=sample_ids is None, step=False)
        if step is None:
            self._step += 1
        return Synthetic(decoded, made, logits, self.mode, ids, ids)

    def drawn(self, count: int, step: int) -> Mixture:
        """What a step draws for a batch of so many; mixed labels are ``lam * onehot(y) + (1 - lam) * onehot(y[j])``."""
        words = np.random.default_rng([self.seed, step, count])
        partner = torch.from_numpy(words.permutation(count).astype(np.int64))
        share = words.beta(self.alpha, self.alpha, count) if self.alpha < 1e6 else np.full(count, 0.5)
        return Mixture(partner, torch.from_numpy(share))

    def calibrate(self, loader: Iterable[Any], **_: Any) -> LatentMixUp:
        """Itself: there is nothing to measure."""
        return self

    def state_dict(self, group: Any = None) -> dict[str, int]:
        return {"version": 1, "seed": self.seed, "step": self._step, "next_id": int(self._counters.next_id)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """
        Raises:
            CheckpointError: it is not the state of such a one.
        """
        names = {"version", "seed", "step", "next_id"}
        if not isinstance(state, dict) or state.keys() != names or state["version"] != 1:
            raise CheckpointError(f"{_OP}: the state is not that of a {_OP} of this release")
        if any(type(value) is not int or value < 0 for value in state.values()):
            raise CheckpointError(f"{_OP}: the state's counters must be integers >= 0")
        self.seed, self._step = state["seed"], state["step"]
        self._counters.next_id = torch.tensor(state["next_id"], device="cpu")

    def __repr__(self) -> str:
        return f"{_OP}(alpha={self.alpha:g}, seed={self.seed})"
