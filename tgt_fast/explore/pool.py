"""A ring of rows that exploration made, kept to be served again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tgt_fast.errors import CheckpointError, ShapeError
from tgt_fast.explore.synthetic import Synthetic
from tgt_fast.teacher import tree

FIELDS: Final = ("x", "latents", "teacher_logits", "ids", "anchor_ids", "anchor_labels")
_MARKS: Final = {"uses": torch.int64, "born": torch.int64, "alive": torch.bool, "classes": torch.int64}
_OP: Final = "SyntheticReplay"


class RowPool:
    """Rows of :class:`Synthetic`; when all places are taken, the oldest rows give theirs to new ones.

    Places are counted on the host, so that adding rows waits for no device. Rows that were dropped keep their place
    until the ring comes round to it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0  # places that hold a row, dropped ones included
        self.place = 0  # where the next row goes
        self.fields: dict[str, list[Tensor]] = {}  # by field, its tensors [room, ...], size <= room <= capacity
        self.marks: dict[str, Tensor] = {}  # [room] each: times served, call that made it, kept, the labeler's class
        self._pinned = False

    def __len__(self) -> int:
        return self.size

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(
        self, made: Synthetic, call: int, device: torch.device, join: Callable[[list[Synthetic]], Synthetic]
    ) -> Tensor:
        """Keep what a call made, and say in which places, int64 [rows], on the pool's device.

        Args:
            device: where the rows are kept.
            join: puts rows together that differ in length.
        """
        rows = made.ids.shape[0]
        self._move(device, pinned=made.ids.device.type == "cuda")
        if self.fields:
            made = self._of_one_shape(made, join)
        leaves = {name: _leaves(getattr(made, name)) for name in FIELDS}
        self._make_room(min(self.capacity, self.place + rows if self.size < self.capacity else 0), leaves, device)
        logits = made.teacher_logits
        classes = logits.argmax(-1) if logits.ndim == 2 else torch.full_like(made.ids, -1)
        marks: dict[str, Any] = {"uses": 0, "born": call, "alive": True, "classes": classes}
        begun = 0
        for first, count in self._pieces(rows):
            for name, columns in self.fields.items():
                for column, leaf in zip(columns, leaves[name], strict=True):
                    column.narrow(0, first, count).copy_(leaf.narrow(0, begun, count))
            for name, value in marks.items():
                piece = self.marks[name].narrow(0, first, count)
                if isinstance(value, Tensor):
                    piece.copy_(value.narrow(0, begun, count))
                else:
                    piece.fill_(value)
            begun += count
        places = (torch.arange(rows, device=device) + self.place) % self.capacity
        self.size = min(self.capacity, max(self.size, self.place + rows))
        self.place = (self.place + rows) % self.capacity
        return places

    def take(self, places: Tensor, like: Synthetic, names: Iterable[str] = FIELDS) -> dict[str, Any]:
        """Fields of the rows in these places, on the device of ``like``, which says what structure they have."""
        device = like.ids.device
        found: dict[str, Any] = {}
        for name in names:
            columns = iter(self.fields[name])
            flat, spec = pytree.tree_flatten(tree.plain(getattr(like, name)))
            flat = [_picked(next(columns), places, device) if _is_batched(leaf) else leaf for leaf in flat]
            found[name] = pytree.tree_unflatten(flat, spec)
        return found

    @torch.no_grad()
    def served(self, places: Tensor) -> None:
        self.marks["uses"].index_add_(0, places, torch.ones_like(places))

    @torch.no_grad()
    def drop(self, places: Tensor, which: Tensor) -> None:
        """Rows whose bool in ``which`` is set are not served again."""
        alive = self.marks["alive"]
        alive.index_put_((places,), alive[places] & ~which)

    def state_dict(self) -> dict[str, Any]:
        kept = slice(0, self.size)
        fields = {name: [column[kept].clone() for column in columns] for name, columns in self.fields.items()}
        marks = {name: mark[kept].clone() for name, mark in self.marks.items()}
        return {"capacity": self.capacity, "place": self.place, "fields": fields, "marks": marks}

    @classmethod
    def of_state(cls, state: Any, capacity: int) -> RowPool:
        """The pool that a :meth:`state_dict` holds.

        Raises:
            CheckpointError: it is none, or of another capacity.
        """
        if not isinstance(state, dict) or state.keys() != {"capacity", "place", "fields", "marks"}:
            raise CheckpointError(f"{_OP}: the state's pool is not one")
        if state["capacity"] != capacity:
            raise CheckpointError(f"{_OP}: the state's pool has capacity={state['capacity']!r}, here {capacity}")
        pool, place, fields, marks = cls(capacity), state["place"], state["fields"], state["marks"]
        if not isinstance(fields, dict) or not isinstance(marks, dict):
            raise CheckpointError(f"{_OP}: the state's pool is not one")
        columns = [*(column for some in fields.values() for column in some), *marks.values()]
        if not all(isinstance(column, Tensor) and column.ndim for column in columns):
            raise CheckpointError(f"{_OP}: the state's pool must hold tensors")
        sizes = {len(column) for column in columns} or {0}
        names = (set(fields), set(marks)) in ((set(), set()), (set(FIELDS), set(_MARKS)))
        if len(sizes) > 1 or not names or type(place) is not int or not 0 <= place < capacity:
            raise CheckpointError(f"{_OP}: the parts of the state's pool do not fit together")
        (pool.size,) = sizes
        if pool.size > capacity or (pool.size < capacity and place != pool.size):
            raise CheckpointError(f"{_OP}: the state's pool holds {pool.size} rows and goes on at {place}")
        pool.place = place
        pool.fields = {name: [column.clone() for column in some] for name, some in fields.items()}
        pool.marks = {name: mark.to(_MARKS[name], copy=True) for name, mark in marks.items()}
        return pool

    def _pieces(self, rows: int) -> list[tuple[int, int]]:
        """(first place, number) of the one or two stretches that so many new rows take."""
        before_end = min(rows, self.capacity - self.place)
        return [(self.place, before_end), (0, rows - before_end)][: 1 + (before_end < rows)]

    def _move(self, device: torch.device, pinned: bool) -> None:
        self._pinned = pinned and device.type == "cpu"
        if self.marks and self.marks["uses"].device != device:
            self.fields = {name: [column.to(device) for column in some] for name, some in self.fields.items()}
            self.marks = {name: mark.to(device) for name, mark in self.marks.items()}

    def _make_room(self, needed: int, leaves: dict[str, list[Tensor]], device: torch.device) -> None:
        """Rooms double, so that a short run of large examples takes no room for a long one."""
        room = self.marks["uses"].shape[0] if self.marks else 0
        if needed <= room and self.marks:
            return
        room = min(self.capacity, max(needed, 2 * room))

        def grown(old: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
            new = torch.empty((room, *shape), dtype=dtype, device=device, pin_memory=self._pinned)
            if old is not None:
                new[: self.size].copy_(old[: self.size])
            return new

        self.fields = {
            name: [
                grown(self.fields[name][number] if self.fields else None, leaf.shape[1:], leaf.dtype)
                for number, leaf in enumerate(some)
            ]
            for name, some in leaves.items()
        }
        empty = torch.Size()
        self.marks = {name: grown(self.marks.get(name), empty, dtype) for name, dtype in _MARKS.items()}

    def _of_one_shape(self, made: Synthetic, join: Callable[[list[Synthetic]], Synthetic]) -> Synthetic:
        """What was made, in the shape of the rows that are here; where it is the longer, they are padded instead."""
        for name in FIELDS:
            kept, new = self.fields[name], _leaves(getattr(made, name))
            if len(kept) != len(new):
                raise ShapeError(
                    f"{_OP}: {name} has {len(new)} tensors now, in the pool {len(kept)}; clear() empties it"
                )
        if self._fits(made) or not self.size:
            return made
        rows, place = made.ids.shape[0], torch.arange(self.size, device=self.marks["uses"].device)
        joined = join([Synthetic(**self.take(place[:1], made), source=made.source), made])
        if not self._fits(joined):
            whole = join([Synthetic(**self.take(place, made), source=made.source), made])
            device = self.marks["uses"].device
            self.fields = {
                name: [leaf[: self.size].to(device) for leaf in _leaves(getattr(whole, name))] for name in FIELDS
            }
            self.marks = {name: mark[: self.size] for name, mark in self.marks.items()}
            joined = whole
        return Synthetic(
            **{name: tree.map_batched(lambda leaf: leaf[-rows:], getattr(joined, name)) for name in FIELDS},
            source=made.source,
        )

    def _fits(self, made: Synthetic) -> bool:
        return all(
            column.shape[1:] == leaf.shape[1:]
            for name in FIELDS
            for column, leaf in zip(self.fields[name], _leaves(getattr(made, name)), strict=True)
        )


def joined(join_data: Callable[[list[Any]], Any], parts: list[Synthetic]) -> Synthetic:
    """Rows one after the other, padded to the longest: data as the teacher does it, latents on the right.

    Raises:
        ShapeError: logits of a position each, of which no padding can be told.
    """
    logits = [part.teacher_logits for part in parts]
    if len({one.shape[1:] for one in logits}) > 1:
        shapes = ", ".join(str(tuple(one.shape)) for one in logits)
        raise ShapeError(f"{_OP}: logits of a position each, {shapes}, cannot be kept together; pad to one length")
    longest = torch.Size(max(sizes) for sizes in zip(*(part.latents.z.shape[1:] for part in parts), strict=True))
    return Synthetic(
        x=join_data([part.x for part in parts]),
        latents=tree.concat([part.latents.padded_to(longest) for part in parts]),
        teacher_logits=torch.cat(logits),
        source=parts[-1].source,
        **{name: tree.concat([getattr(part, name) for part in parts]) for name in FIELDS[3:]},
    )


def _leaves(part: Any) -> list[Tensor]:
    return tree.batched_leaves(part)


def _is_batched(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _picked(column: Tensor, places: Tensor, device: torch.device) -> Tensor:
    if column.device == device:
        return column.index_select(0, places)
    if column.is_pinned():
        out = torch.empty((len(places), *column.shape[1:]), dtype=column.dtype, pin_memory=True)
        return torch.index_select(column, 0, places, out=out).to(device, non_blocking=True)
    return column.index_select(0, places).to(device)
