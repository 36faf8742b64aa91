"""Several teachers as one: their labels mixed, or one soft term each, by weight or by sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from tgt_fast._ranges import named_range
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.teacher import tree
from tgt_fast.teacher.key import Key
from tgt_fast.teacher.latents import Latents
from tgt_fast.teacher.teacher import Inputs, Opinion, Teacher

_OP: Final = "TeacherEnsemble"
COMBINATIONS: Final = ("probabilities", "logits", "per_teacher")
Route: TypeAlias = "str | int | Callable[[Any], Tensor] | None"


class TeacherEnsemble(Teacher):
    r"""Several teachers, used wherever a :class:`tgt_fast.Teacher` is.

    With p_k the softmax of teacher k's logits and w_k the weights, :meth:`label` gives::

        log sum_k w_k p_k                        probabilities
        sum_k w_k logits_k / sum_k w_k           logits, over the teachers that know the class

    and with ``"per_teacher"`` the soft term of :class:`tgt_fast.TGTObjective`, and the disagreement that
    :class:`tgt_fast.LatentSampler` climbs, are ``sum_k w_k D(h_k, f)``, a term a teacher; ``label`` is then the mixture
    of probabilities. Gradients flow through all of them.

    Args:
        teachers: by name; each labels with its own transform, in the data space of the one that generates.
        weights: by name, >= 0, normalised to add up to 1; equal by default.
        combine: one of the names above.
        class_ids: by name, which of the student's classes a teacher knows, in the order of its own logits (or, where it
            has logits of all classes, which of them count). The others carry no mass in its term: none of its
            probability, and, with ``"per_teacher"``, none of the student's.
        route: which teacher labels a sample, alone: a key (or index) of the data, or a function of the data, whose
            values are integers [B], the teachers' places in ``teachers``, or weights [B, K] in the place of
            ``weights``. A column is no input of the teachers or of the student; data without it, which is what a
            decoder makes, is labelled by ``weights``.
        generator: the name of the teacher whose encoder, decoder, prior and ``student_transform`` serve; the first one
            by default.
        num_classes: of the student; by default those of the teachers without ``class_ids``, or as many as those name.

    Raises:
        ArgumentError: no teachers, names that are none of them, weights or ids out of range.
        ShapeError: from ``label``: teachers whose classes do not fit.

    :func:`tgt_fast.cache.EnsembleCache` keeps what each teacher said.

    >>> import torch, tgt_fast as tgt
    >>> from torch import nn
    >>> a, b = (tgt.Teacher(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, c)) for c in (3, 2))
    >>> both = tgt.TeacherEnsemble({"a": a, "b": b}, weights={"a": 3.0, "b": 1.0}, class_ids={"b": [0, 2]})
    >>> torch.allclose(both.label(torch.zeros(4, 8)).exp().sum(-1), torch.ones(4))
    True
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        *,
        weights: Mapping[str, float] | None = None,
        combine: str = "probabilities",
        class_ids: Mapping[str, Sequence[int] | Tensor] | None = None,
        route: Route = None,
        generator: str | None = None,
        num_classes: int | None = None,
    ) -> None:
        if not isinstance(teachers, Mapping) or not teachers:
            raise ArgumentError(f"{_OP}: teachers must be a dict of teachers by name, got {teachers!r:.200}")
        for name, teacher in teachers.items():
            if not isinstance(teacher, Teacher):
                raise ArgumentError(f"{_OP}: {name!r} must be a tgt_fast.Teacher, got {type(teacher).__name__}")
        if not isinstance(combine, str) or combine not in COMBINATIONS:
            raise ArgumentError(f"{_OP}: combine must be one of {COMBINATIONS}, got {combine!r}")
        if isinstance(route, bool) or not (route is None or isinstance(route, (str, int)) or callable(route)):
            raise ArgumentError(f"{_OP}: route must be a column or a function of the data, got {route!r:.200}")
        if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
            raise ArgumentError(f"{_OP}: num_classes must be a positive integer or None, got {num_classes!r}")
        own = teachers[_known(teachers, "generator", generator or next(iter(teachers)))]
        frozen = {id(module): module for teacher in teachers.values() for module in teacher._frozen}
        super().__init__(own.encoder, own.decoder, own.labeler, modules=tuple(frozen.values()))
        self.members = dict(teachers)  # a plain dict, which nn.Module does not look into
        self.generator, self.combine, self.route, self.num_classes = own, combine, route, num_classes
        self._widths: dict[str, int] = {}  # the classes of those without class_ids, where they were asked already
        self.weights = _weights(teachers, weights)
        self.class_ids = _class_ids(teachers, class_ids, num_classes)
        self.class_dim, self.decoder_takes_key, self.max_batch = own.class_dim, own.decoder_takes_key, own.max_batch

    # Whose data it is

    @property
    def prior(self) -> Any:
        return self.generator.prior

    @property
    def labelers(self) -> tuple[Callable[..., Any], ...]:
        return tuple(labeler for teacher in self.members.values() for labeler in teacher.labelers)

    def frozen_by_it(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        parameters = list(parameters)
        found = super().frozen_by_it(parameters)
        found += [p for teacher in self.members.values() for p in teacher.frozen_by_it(parameters)]
        return list({id(parameter): parameter for parameter in found}.values())

    def check_data(self, x: Inputs) -> None:
        self.generator.check_data(self.data_of(x))

    def encode(self, x: Inputs) -> Latents:
        self._keep_frozen()
        return self.generator.encode(self.data_of(x))

    def decode(self, latents: Latents | Tensor, relaxed: bool = False, key: Key | None = None) -> Inputs:
        self._keep_frozen()
        return self.generator.decode(latents, relaxed, key)

    def join(self, pieces: Sequence[Inputs]) -> Inputs:
        return self.generator.join(pieces)

    def student_view(self, x: Inputs) -> Inputs:
        self._keep_frozen()
        return self.generator.student_view(self.data_of(x))

    def from_prior(self, noise: Latents) -> Latents:
        return self.generator.from_prior(noise)

    def extra_repr(self) -> str:
        shown = ", ".join(f"{name}={weight:.4g}" for name, weight in self.weights.items())
        return f"{shown}, combine={self.combine!r}"

    # What they say

    def label(self, x: Inputs) -> Tensor:
        """The teachers' labels in one, logits [B, ..., C]; differentiable in x."""
        self._keep_frozen()
        with named_range("label"):
            return self._combined(self._asked(x))

    forward = label

    def opinions(self, x: Inputs) -> tuple[Opinion, ...]:
        """The distributions that soft terms are taken of: one, or, with ``"per_teacher"``, each teacher's."""
        if self.combine != "per_teacher":
            return super().opinions(x)
        self._keep_frozen()
        return self._each(self._asked(x))

    def opinions_of(self, answers: Mapping[str, Tensor], x: Inputs = None) -> tuple[Opinion, ...]:
        """:meth:`opinions` of logits that the teachers have given already, as :meth:`combined` takes them."""
        if self.combine != "per_teacher":
            return (Opinion(self.combined(answers, x), None),)
        return self._each(self._with_shares(answers, x))

    def _each(self, asked: Mapping[str, tuple[Tensor, float | Tensor]]) -> tuple[Opinion, ...]:
        made = []
        for name, (logits, weight) in asked.items():
            wide, known = self._over_all(name, logits, self._classes(asked))
            made.append(Opinion(wide, weight, known))
        return tuple(made)

    def combined(self, answers: Mapping[str, Tensor], x: Inputs = None) -> Tensor:
        """:meth:`label` of logits that the teachers have given already, by name: those of a cache, say.

        Args:
            answers: [B, ..., C] of each teacher.
            x: the data, where ``route`` looks at it.
        """
        return self._combined(self._with_shares(answers, x))

    def _with_shares(self, answers: Mapping[str, Tensor], x: Inputs) -> dict[str, tuple[Tensor, float | Tensor]]:
        missing = [name for name in self.members if name not in answers]
        if missing:
            raise ArgumentError(f"{_OP}: no answers of {missing}")
        shares = self._shares(x, next(iter(answers.values())))
        return {name: (answers[name], shares[name]) for name in self.members}

    def data_of(self, x: Inputs) -> Inputs:
        """The data without the column that routes it."""
        if isinstance(self.route, str) and isinstance(x, Mapping) and self.route in x:
            rest = {key: value for key, value in x.items() if key != self.route}
            return next(iter(rest.values())) if len(rest) == 1 else rest
        if isinstance(self.route, int) and isinstance(x, (tuple, list)) and -len(x) <= self.route < len(x):
            kept = [part for at, part in enumerate(x) if at != self.route % len(x)]
            return kept[0] if len(kept) == 1 else type(x)(kept)
        return x

    def _routed(self, x: Inputs) -> Tensor | None:
        """Weights [B, K], or None where nothing routes this data."""
        if self.route is None:
            return None
        if callable(self.route):
            chosen = self.route(x)
        elif self.data_of(x) is x:  # made by a decoder
            return None
        else:
            chosen = x[self.route]
        if not isinstance(chosen, Tensor):
            chosen = torch.as_tensor(chosen, device=tree.first_device(x))
        count, batch = len(self.members), tree.batch_size(self.data_of(x))
        if chosen.is_floating_point() and tuple(chosen.shape) == (batch, count):
            return chosen
        if chosen.is_floating_point() or chosen.dtype == torch.bool or tuple(chosen.shape) != (batch,):
            raise ShapeError(
                f"{_OP}: route must give integers ({batch},), places among {list(self.members)}, or weights ({batch}, "
                f"{count}), got {tuple(chosen.shape)} of {chosen.dtype}"
            )
        chosen = chosen.to(torch.int64)
        if chosen.device.type == "cpu" and not torch.compiler.is_compiling() and chosen.numel():
            low, high = int(chosen.min()), int(chosen.max())
            if low < 0 or high >= count:
                raise ArgumentError(f"{_OP}: route gives places from {low} to {high}, of {count} teachers")
        return torch.nn.functional.one_hot(chosen, count).to(torch.float32)

    def _shares(self, x: Inputs, like: Tensor) -> dict[str, float | Tensor]:
        """The weight of each teacher: a number, or [B]."""
        routed = self._routed(x)
        if routed is None:
            return dict(self.weights)
        routed = routed.to(like.device)
        return {name: routed[:, place] for place, name in enumerate(self.members)}

    def _asked(self, x: Inputs) -> dict[str, tuple[Tensor, float | Tensor]]:
        """Each teacher's logits and weight. One that is asked of some samples alone runs on those alone."""
        data, routed = self.data_of(x), self._routed(x)
        asked: dict[str, tuple[Tensor, float | Tensor]] = {}
        for place, (name, teacher) in enumerate(self.members.items()):
            if routed is None:
                asked[name] = teacher.label(data), self.weights[name]
                continue
            mine = routed[:, place]
            rows = None if torch.compiler.is_compiling() else mine.nonzero().flatten()
            if rows is None or len(rows) == len(mine):
                logits = teacher.label(data)
            elif len(rows):
                some = teacher.label(tree.take(data, rows))
                logits = some.new_zeros((len(mine), *some.shape[1:])).index_copy(0, rows.to(some.device), some)
            elif not len(mine) or (name not in self.class_ids and name not in self._widths):
                some = teacher.label(tree.take(data, torch.arange(min(1, len(mine)))))  # for the number of its classes
                logits = some.new_zeros((len(mine), *some.shape[1:]))
            else:
                continue
            asked[name] = logits, mine.to(logits.device)
            if name not in self.class_ids:
                self._widths[name] = logits.shape[-1]
        return asked

    def _classes(self, asked: Mapping[str, tuple[Tensor, Any]]) -> int:
        if self.num_classes is not None:
            return self.num_classes
        widths = {name: logits.shape[-1] for name, (logits, _) in asked.items() if name not in self.class_ids}
        widths = {**self._widths, **widths}
        if len(set(widths.values())) > 1:
            raise ShapeError(f"{_OP}: the teachers have {widths} classes; say by class_ids which those are")
        least = max((int(ids.max()) + 1 for ids in self.class_ids.values()), default=0)
        return max([*widths.values(), least])

    def _over_all(self, name: str, logits: Tensor, classes: int) -> tuple[Tensor, Tensor | None]:
        """A teacher's logits of all classes, -inf of those that it does not know; which it knows, [C], None: all."""
        ids = self.class_ids.get(name)
        width = logits.shape[-1]
        if ids is None:
            if width != classes:
                raise ShapeError(f"{_OP}: {name!r} has {width} classes, the others {classes}; say which by class_ids")
            return logits, None
        if width not in (len(ids), classes):
            raise ShapeError(f"{_OP}: {name!r} has {width} classes, but {len(ids)} class_ids (of {classes} classes)")
        ids = ids.to(logits.device)
        known = torch.zeros(classes, dtype=torch.bool, device=logits.device).index_fill(0, ids, True)
        if width == len(ids):
            wide = logits.new_full((*logits.shape[:-1], classes), -math.inf)
            return wide.index_copy(-1, ids, logits), known
        return logits.masked_fill(~known, -math.inf), known

    def _combined(self, asked: Mapping[str, tuple[Tensor, float | Tensor]]) -> Tensor:
        classes = self._classes(asked)
        logits, weights, known = [], [], []
        for name, (given, weight) in asked.items():
            wide, which = self._over_all(name, given, classes)
            if not isinstance(weight, Tensor):
                weight = torch.full((), weight, device=wide.device)
            logits.append(wide.float() if wide.dtype in (torch.float16, torch.bfloat16) else wide)
            weights.append(weight.to(logits[-1].dtype).reshape(-1, *(1,) * (wide.dim() - 1)))
            known.append(
                torch.ones_like(wide[..., :1], dtype=torch.bool) if which is None else which.expand(wide.shape)
            )
        dtype = next(iter(asked.values()))[0].dtype
        if self.combine == "logits":
            total, mean = torch.zeros_like(logits[0]), torch.zeros_like(logits[0])
            for w, k, z in zip(weights, known, logits, strict=True):
                total = total + w * k
                mean = mean + w * torch.where(k & (w > 0), z, 0.0)
            made = torch.where(total > 0, mean / torch.where(total > 0, total, 1.0), -math.inf)
        else:
            terms = [_weighted(w, z) for w, z in zip(weights, logits, strict=True)]
            made = torch.logsumexp(torch.stack(terms), 0) if len(terms) > 1 else terms[0]
        return made.to(dtype)


def _weighted(weight: Tensor, logits: Tensor) -> Tensor:
    """log(weight * softmax(logits)); -inf, and no gradient, for a weight of 0, whatever the logits."""
    on = weight > 0
    shares = torch.log_softmax(torch.where(on, logits, 0.0), -1)
    return torch.where(on, shares + torch.where(on, weight, 1.0).log(), -math.inf)


def _known(teachers: Mapping[str, Teacher], what: str, name: Any) -> str:
    if name not in teachers:
        raise ArgumentError(f"{_OP}: {what} names {name!r}, which is none of {list(teachers)}")
    known: str = name
    return known


def _weights(teachers: Mapping[str, Teacher], given: Any) -> dict[str, float]:
    if given is None:
        return dict.fromkeys(teachers, 1.0 / len(teachers))
    if not isinstance(given, Mapping):
        raise ArgumentError(f"{_OP}: weights must be a dict by the teachers' names, got {given!r:.200}")
    for name, weight in given.items():
        _known(teachers, "weights", name)
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= float(weight) < math.inf:
            raise ArgumentError(f"{_OP}: the weight of {name!r} must be a finite number >= 0, got {weight!r}")
    missing = [name for name in teachers if name not in given]
    if missing:
        raise ArgumentError(f"{_OP}: weights lack {missing}; 0 leaves a teacher out")
    total = math.fsum(float(weight) for weight in given.values())
    if total <= 0:
        raise ArgumentError(f"{_OP}: the weights are all 0")
    return {name: float(given[name]) / total for name in teachers}


def _class_ids(teachers: Mapping[str, Teacher], given: Any, classes: int | None) -> dict[str, Tensor]:
    if given is not None and not isinstance(given, Mapping):
        raise ArgumentError(f"{_OP}: class_ids must be a dict by the teachers' names, got {given!r:.200}")
    found: dict[str, Tensor] = {}
    for name, ids in (given or {}).items():
        _known(teachers, "class_ids", name)
        try:
            made = torch.as_tensor(ids, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"{_OP}: class_ids of {name!r} must be integers, got {ids!r:.200} ({error})") from None
        if made.is_floating_point() or made.dtype == torch.bool or made.is_complex():
            raise DTypeError(f"{_OP}: class_ids of {name!r} must be integers, got {made.dtype}")
        made = made.to(torch.int64)
        most = math.inf if classes is None else classes
        if made.dim() != 1 or not len(made) or int(made.min()) < 0 or int(made.max()) >= most:
            raise ArgumentError(f"{_OP}: class_ids of {name!r} must be classes in [0, {most}), got {ids!r:.200}")
        if len(set(made.tolist())) < len(made):
            raise ArgumentError(f"{_OP}: class_ids of {name!r} name a class twice: {ids!r:.200}")
        found[name] = made
    return found
