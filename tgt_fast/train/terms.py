"""The terms of an objective beside its own, evaluated on the rows that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.calls import is_soft
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.losses.rows import RowLoss
from tgt_fast.losses.terms import GradientBalance, Term
from tgt_fast.ops.counts import weight_of_rows
from tgt_fast.ops.topk import TeacherTopK
from tgt_fast.teacher import Teacher
from tgt_fast.teacher.teacher import Opinion
from tgt_fast.train.features import Side, Taken, roots_of_labeler, roots_of_student, watched
from tgt_fast.train.parallel import unwrapped

OWN = ("hard", "soft", "synthetic")  # the objective's own parts


class Seen(NamedTuple):
    """The rows of one kind, real or synthetic, as the terms see them."""

    logits: Tensor  # [n, ..., C]
    teacher: Any  # [n, ..., C], or a record
    target: Tensor | None
    weight: Tensor | None  # [n, ...]
    ours: Mapping[Side, Tensor]  # features
    theirs: Mapping[Side, Tensor]
    share: float | Tensor  # of the mean over these rows in the term: their number by the objective's divisor


class Watch(NamedTuple):
    ours: Taken
    theirs: Taken


def _nothing(rows: int | None) -> dict[Side, Tensor]:
    return {}


class Terms:
    """Those of one objective: names, features, values."""

    def __init__(self, terms: Sequence[Term], balance: GradientBalance | None) -> None:
        if not isinstance(terms, (list, tuple)) or not all(isinstance(term, Term) for term in terms):
            raise ArgumentError(f"TGTObjective: terms must be a list of tgt_fast.Term, got {terms!r:.200}")
        if balance is not None and not isinstance(balance, GradientBalance):
            raise ArgumentError(
                f"TGTObjective: balance must be a tgt_fast.losses.GradientBalance, got {type(balance).__name__}"
            )
        self.given, self.terms, self.balance = terms, tuple(terms), balance
        self.names = _named(self.terms)

    @property
    def watches(self) -> bool:
        return any(term.features is not None for term in self.terms)

    def sees(self, rows: str) -> bool:
        """Whether a term wants features of such rows."""
        return any(term.features is not None and term.rows in ("all", rows) for term in self.terms)

    @contextmanager
    def watching(self, student: Any, teacher: Teacher) -> Iterator[Watch]:
        """Inside, what the terms' submodules return is kept."""
        if not self.watches:
            yield Watch(_nothing, _nothing)
            return
        pairs = [term.features for term in self.terms if term.features is not None]
        ours, theirs = ([*dict.fromkeys(pair[side] for pair in pairs)] for side in (0, 1))
        with ExitStack() as stack:
            yield Watch(
                stack.enter_context(watched("student", ours, roots_of_student(student))),
                stack.enter_context(watched("labeler", theirs, roots_of_labeler(teacher))),
            )

    def __call__(
        self, step: Callable[[], int], real: Seen, made: Seen | None, own: Tensor, student: Any, group: Any
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The loss with them in it; the factor of the objective's own terms, where they are balanced; and the terms."""
        values = {name: self._value(term, real, made) for name, term in zip(self.names, self.terms, strict=True)}
        factors: dict[str, Any] = {}
        if self.balance is not None:
            model = unwrapped(student)
            if not isinstance(model, nn.Module):
                raise ArgumentError("TGTObjective: balance needs a student that is a torch.nn.Module")
            if torch.is_grad_enabled():
                factors = dict(self.balance(model, {"objective": own, **values}, group))
        mine = factors.get("objective")
        loss = own if mine is None else mine.to(own.dtype) * own
        parts = {}
        for name, term in zip(self.names, self.terms, strict=True):
            value = term.factor(step) * values[name]
            if name in factors:
                value = factors[name].to(value.dtype) * value
            loss, parts[name] = loss + value, value.detach()
        return loss, mine, parts

    def _value(self, term: Term, real: Seen, made: Seen | None) -> Tensor:
        kinds = [
            seen
            for seen, name in ((real, "real"), (made, "synthetic"))
            if seen is not None and term.rows in ("all", name)
        ]
        total = torch.zeros((), device=real.logits.device)
        if len(kinds) == 2 and getattr(term.loss, "pairwise", False) and isinstance(term.loss, RowLoss):
            return total + _together(term, term.loss, kinds)
        for seen in kinds:
            total = total + seen.share * term.mean(*_sides(term, seen))
        return total

    def state_dict(self) -> dict[str, Any]:
        states = {
            name: dict(term.loss.state_dict())
            for name, term in zip(self.names, self.terms, strict=True)
            if isinstance(term.loss, nn.Module)
        }
        return {"losses": states, "balance": None if self.balance is None else self.balance.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        here = self.state_dict()
        if here["losses"].keys() != state["losses"].keys() or (here["balance"] is None) != (state["balance"] is None):
            raise ArgumentError(
                f"the state is of the terms {sorted(state['losses'])}, the objective has {sorted(here['losses'])}"
            )
        for name, term in zip(self.names, self.terms, strict=True):
            if name in state["losses"]:
                term.loss.load_state_dict(state["losses"][name])  # type: ignore[attr-defined]
        if self.balance is not None:
            self.balance.load_state_dict(state["balance"])


def _named(terms: Sequence[Term]) -> list[str]:
    names: list[str] = []
    for term in terms:
        wanted: str = term.name or getattr(term.loss, "__name__", None) or type(term.loss).__name__
        name, count = wanted, 1
        while name in (*names, *OWN, "loss"):
            if term.name is not None:
                raise ArgumentError(f"TGTObjective: a term is named {name!r}, which is another part's name")
            count += 1
            name = f"{wanted}_{count}"
        names.append(name)
    return names


def share_of(
    options: DistillOptions, logits: Tensor, target: Tensor | None, weight: Tensor | None,
    divisor: float | Tensor | None,
) -> float | Tensor:  # fmt: skip
    """What a mean over these rows is multiplied by to be their sum over the objective's divisor."""
    if divisor is None:
        return 1.0
    mine = weight_of_rows(logits.shape[:-1], logits.device, target, weight, logits.shape[-1], options)
    divisor = torch.as_tensor(divisor, dtype=mine.dtype, device=mine.device)
    found = torch.where(divisor > 0, mine / torch.where(divisor > 0, divisor, 1.0), 0.0)
    return found.to(torch.promote_types(logits.dtype, torch.float32))


def one_opinion(opinions: Sequence[Opinion]) -> Any:
    """The teacher's logits. Raises ArgumentError where it has several distributions a row."""
    if opinions[0].weight is not None:
        raise ArgumentError(
            "TGTObjective: terms need one distribution a row, but combine='per_teacher' gives one a teacher; combine "
            "the teachers otherwise, or leave the terms out"
        )
    return opinions[0].logits


def _sides(term: Term, seen: Seen) -> tuple[Tensor, Any, Tensor | None, Tensor | None]:
    if term.features is None:
        return seen.logits, seen.teacher, seen.target, seen.weight
    ours, theirs = seen.ours[term.features[0]], seen.theirs[term.features[1]]
    rows = ours.shape[:1] if getattr(term.loss, "maps", False) else ours.shape[:-1]
    target = None if is_soft(seen.target) else seen.target
    weight = seen.weight
    if target is not None and target.dim() > len(rows):  # an example counts if one of its positions does
        ignored = getattr(term.loss, "ignore_index", -100)
        counts = (target != ignored).flatten(len(rows)).any(-1)
        target = torch.where(counts, 0, ignored)
    if weight is not None and weight.dim() > len(rows):
        weight = weight.double().flatten(len(rows)).mean(-1)
    return ours, theirs, target, weight


def _together(term: Term, loss: RowLoss, kinds: Sequence[Seen]) -> Tensor:
    """Of rows that are compared with each other: one batch, whose rows count as they do in two."""
    students, teachers, labels, weights = [], [], [], []
    for seen in kinds:
        ours, theirs, target, weight = _sides(term, seen)
        if isinstance(theirs, TeacherTopK):
            return term.mean(ours, theirs, target, weight)  # which says what is wrong with a record
        shape = ours.shape[:1] if loss.maps else ours.shape[:-1]
        students.append(ours.flatten(0, len(shape) - 1))
        teachers.append(theirs.flatten(0, len(shape) - 1))
        labels.append(_flat(target, shape, loss.unlabeled_index, ours).long())
        weights.append(_flat(weight, shape, 1.0, ours).double())
    costs, counted = loss.rows(torch.cat(students), torch.cat(teachers), torch.cat(labels), weight=torch.cat(weights))
    total, begin = torch.zeros((), device=costs.device), 0
    for seen, rows in zip(kinds, students, strict=True):
        mine = slice(begin, begin + rows.shape[0])
        divisor = counted[mine].sum()
        mean = (costs[mine] * counted[mine]).sum() / torch.where(divisor > 0, divisor, 1.0)
        total, begin = total + seen.share * mean, begin + rows.shape[0]
    return total


def _flat(x: Tensor | None, shape: tuple[int, ...], usual: float, like: Tensor) -> Tensor:
    """A number a row, [N]."""
    if x is None or (is_soft(x) and x.dim() > len(shape)):
        return torch.full((like.flatten(0, len(shape) - 1).shape[0],), usual, device=like.device, dtype=torch.float64)
    return x.reshape(*x.shape, *(1,) * (len(shape) - x.dim())).expand(shape).reshape(-1)
