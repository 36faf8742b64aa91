"""StoredReplay: the rows of a folder in the place of a sampler."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from tgt_fast._processes import place
from tgt_fast.cache.query import as_ids
from tgt_fast.errors import ArgumentError, CheckpointError, UnknownIdError
from tgt_fast.explore import Synthetic
from tgt_fast.explore.by_class import ByClass
from tgt_fast.explore.counters import checked_step
from tgt_fast.explore.options import SamplerOptions
from tgt_fast.kernels.options import MAX_REPLICA
from tgt_fast.ops import _checks
from tgt_fast.teacher import Latents, tree
from tgt_fast.train.data import to_device

if TYPE_CHECKING:
    from tgt_fast.synthesis.dataset import SyntheticDataset

OP: Final = "StoredReplay"


class StoredReplay:
    r"""``replay(x, sample_ids=ids, step=s)``: stored rows of these examples, by :meth:`SyntheticDataset.as_replay`.

    It is used wherever a :class:`tgt_fast.LatentSampler` is, and called like one; no teacher works. The rows of an
    example are served in turn, in the order of (step, replica): at step s its rows ``(s * replicas + r) mod n``,
    r < replicas, of the n that it has. So where the rows of steps 0, 1, ... were stored, with as many replicas, a
    student meets what live exploration would have shown it at the same step, bit for bit.

    Row ``r * B + b`` belongs to the batch's row b. An example all of whose rows were dropped by filters is served those
    of the next one in the folder; ``Synthetic.ids`` says whose they are. Without ``sample_ids`` the folder's examples
    are served one after the other, a part of them in each process of ``torch.distributed``.

    Args:
        data: of rows with logits.
        replicas: rows an example and call.

    Raises:
        ArgumentError: rows that are records.
    """

    encodes = False  # it takes no Enc(x)

    def __init__(self, data: SyntheticDataset, *, replicas: int = 1) -> None:
        if data.fingerprint.parts.get("k") is not None:
            raise ArgumentError(
                f"{OP}: the rows of {data.folder} are records of {data.fingerprint.parts['k']} classes, and a sampler "
                "gives logits; synthesize with k=None, or train from the data set itself"
            )
        self.data = data
        self.replicas = _checks.integer(OP, "replicas", replicas, 1, MAX_REPLICA)
        known = {one.name for one in fields(SamplerOptions)}
        made_with = {name: value for name, value in data.fingerprint.parts.items() if name in known}
        made_with |= {
            name: ByClass.of_text(value)
            for name, value in made_with.items()
            if name in ("sigma", "anchors") and str(value).startswith("(")
        }
        self.options = SamplerOptions(**made_with)  # of the sampler that made the rows
        self.mode = self.options.mode
        keys = data.keys.numpy()
        self._order = np.lexsort((keys[:, 1], keys[:, 2], keys[:, 0]))  # by id, then step, then replica
        self._ids, self._first, self._count = np.unique(keys[self._order, 0], return_index=True, return_counts=True)
        self._dropped = np.unique(data.dropped()[:, 0].numpy())
        self._step = self._next = 0

    def __repr__(self) -> str:
        return f"{OP}({self.data!r}, replicas={self.replicas})"

    def calibrate(self, *_: Any, **__: Any) -> StoredReplay:
        """Itself: what was measured is in the rows."""
        return self

    def __call__(
        self,
        x: Any,
        *,
        student: Any = None,
        sample_ids: Tensor | None = None,
        step: int | Tensor | None = None,
        occurrence: Tensor | None = None,
        logits_of: Any = None,
        latents: Any = None,
    ) -> Synthetic:
        """Rows for a batch, on its device.

        Args:
            x: the batch, whose size and device count.
            sample_ids, step: as for :class:`tgt_fast.LatentSampler`; the others are not looked at.

        Raises:
            UnknownIdError: an example that the folder never held.
        """
        count, device = tree.batch_size(x), tree.first_device(x)
        now = self._step if step is None else int(checked_step(step, torch.device("cpu")))
        which = self._counted(count) if sample_ids is None else self._found(as_ids(sample_ids))
        turns = now * self.replicas + np.arange(self.replicas)[:, None]  # [replicas, 1]
        rows = self._order[(self._first[which] + turns % self._count[which]).reshape(-1)]
        if step is None:
            self._step += 1
        found = self.data.read(rows)
        assert isinstance(found.labels, Tensor)
        z = found.latents if found.latents is not None else Latents(torch.empty(len(rows), 0, device="cpu"))
        ids = found.keys[:, 0]
        x, z, logits, ids = to_device((found.x, z, found.labels, ids), device)
        anchored = self.mode != "prior" and not self.options.pooled
        return Synthetic(x, z, logits, self.mode, ids, ids if anchored else None)

    def _found(self, ids: Any) -> Any:
        """The places of ids among those of the folder."""
        which = np.searchsorted(self._ids, ids) % len(self._ids)
        lost = ids[(self._ids[which] != ids) & ~np.isin(ids, self._dropped)]
        if len(lost):
            raise UnknownIdError(f"{OP}: {self.data.folder} holds no example of {len(lost)} ids, such as {lost[0]}")
        return which

    def _counted(self, count: int) -> Any:
        rank, world = place()
        which = (self._next + rank * count + np.arange(count)) % len(self._ids)
        self._next += world * count
        return which

    def state_dict(self, group: Any = None) -> dict[str, Any]:
        """Where it goes on: the counters of calls without ids or step."""
        return {"version": 1, "step": self._step, "next": self._next, "fingerprint": str(self.data.fingerprint)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            CheckpointError: it is of another folder, or none.
        """
        if not isinstance(state, dict) or state.keys() != {"version", "step", "next", "fingerprint"}:
            raise CheckpointError(f"{OP}: the state is not that of a StoredReplay")
        if state["fingerprint"] != self.data.fingerprint:
            raise CheckpointError(f"{OP}: the state is of examples that were made otherwise than those of this folder")
        if not all(type(state[name]) is int and state[name] >= 0 for name in ("step", "next")):
            raise CheckpointError(f"{OP}: the state's counters are not such")
        self._step, self._next = state["step"], state["next"]
