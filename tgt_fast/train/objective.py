"""The three-term objective of teacher-guided training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tgt_fast._ranges import named_range
from tgt_fast.errors import ArgumentError
from tgt_fast.explore.by_class import label_argument
from tgt_fast.explore.repeats import occurrences_over
from tgt_fast.explore.student import refuse_labeler, student_logits
from tgt_fast.kernels.late import is_on
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.losses.distill import DistillationLoss
from tgt_fast.ops import _checks
from tgt_fast.ops.counts import counting_group, over_processes, weight_of_rows
from tgt_fast.teacher import Latents, Teacher, tree
from tgt_fast.teacher.batches import Batch, checked_batches
from tgt_fast.teacher.returned import LogitsOf, check_logits_of
from tgt_fast.teacher.sharing import warn_of_shared
from tgt_fast.teacher.teacher import Opinion
from tgt_fast.train.cached import Known
from tgt_fast.train.kept import Kept, ObjectiveOutput, Parts
from tgt_fast.train.opinions import real_of, soft_part
from tgt_fast.train.synthetic_weights import WeightOf, check_weight, made_of, weights_of
from tgt_fast.train.terms import Seen, Terms, Watch, one_opinion, share_of

if TYPE_CHECKING:
    from tgt_fast.cache import EnsembleCache, TeacherCache
    from tgt_fast.explore import LatentSampler, Synthetic, SyntheticReplay
    from tgt_fast.long_tail import LatentMixUp
    from tgt_fast.losses.terms import GradientBalance, Term


class TGTObjective(Kept):
    r"""The objective of teacher-guided training, in one call::

        R(f) = 1/n sum_i [ hard_weight * CE(f(x_i), y_i) + l_d(f(x_i), h(x_i)) ]
             + synthetic_weight * 1/m sum_j l_d(f(x~_j), h(x~_j))

    f is the student, h the teacher's labeler, x~ the sampler's synthetic examples, l_d the soft term of
    ``loss``.

    The student runs once on the real and once on the synthetic examples, both seen through
    ``teacher.student_view``. Two passes rather than one over both, because a BatchNorm then normalises real
    examples by statistics of real ones, and the two batches may differ in size or padding. Its running
    statistics see both, the real batch first.

    Args:
        teacher: the frozen teacher.
        sampler: makes the synthetic examples, a :class:`LatentSampler`, :class:`SyntheticReplay` or
            :class:`tgt_fast.long_tail.LatentMixUp`; None leaves the third term out (plain distillation).
        loss: l_d and the hard term, with reduction "mean";
            ``DistillationLoss(temperature=2.0, hard_weight=1.0)`` by default.
        synthetic_weight: factor of the third term, >= 0. With 0 the sampler is not called. Or a function of the
            :class:`Synthetic` examples, which returns a factor >= 0 for each, (m,), or one for all: the third term is
            then ``1/m sum_j w_j l_d(f(x~_j), h(x~_j))``.
        count_group: None; or "world", or a process group of ``torch.distributed``, over which n and m are counted, both
            in one ``all_reduce`` a call: what DistributedDataParallel and FSDP2 average is then the gradient of the one
            R(f) of all processes, and the mean of their losses is R(f). By default that of ``loss``. :func:`fit` sets
            "world" by itself.
        logits_of: where the logits are in what the student returns, also when the sampler asks it: a name (an attribute
            or key), an index, or a function of what it returned. By default a tensor is them; of a tuple, dict or
            output object, what is named ``logits``, or the first floating-point tensor of at least two dimensions.
        cache: a :class:`TeacherCache` of this teacher, or the :class:`tgt_fast.cache.EnsembleCache` of this ensemble:
            labels of real examples come from it, by ``sample_ids``, and, if it was made with ``latents=True``, what the
            sampler takes for Enc(x); what it lacks is computed and kept. After an epoch neither labeler nor encoder
            runs on real examples. With ``k=None`` and ``dtype=None`` the bits are those of a teacher that is asked,
            as far as its own do not depend on the other rows of a batch. Augmented and mixed data, which differ from
            epoch to epoch, have no place in a cache, and are refused where that is seen (on a CPU).

        start_after: >= 0, the first ``step`` with a third term: before it the sampler is not called. Where no step is
            given, calls are counted.
        terms: further terms, each a :class:`tgt_fast.Term`, added to R(f). They divide by n and m as the three do, and
            see the logits (or features) of the same passes; not with a loss that is ``inplace``. Parameters of theirs,
            such as a projection, are found in ``parameters()``, for the optimizer.
        balance: a :class:`tgt_fast.losses.GradientBalance`, which weighs the three terms (as one) and each further one
            by their gradients.

    A batch x that is a dict goes into a student of transformers or peft as keywords, and so it does into any with
    several parameters that names its keys; one with a single parameter gets the dict.

    ``teacher``, ``sampler``, ``loss``, its settings, ``synthetic_weight``, ``count_group``, ``logits_of``, ``cache``,
    ``terms`` and ``balance`` are attributes that can be changed between calls; the next call goes by what they are
    then.

    Raises:
        ArgumentError: a teacher that is no :class:`Teacher`, a loss with another reduction or with ``return_stats``, a
            negative weight, a sampler with a loss that has no soft term, or the cache of another teacher.

    Source: Zaheer et al., "Teacher Guided Training: An Efficient Framework for Knowledge Transfer", ICLR 2023. The
    weight of the synthetic term is ours.

    >>> import tgt_fast as tgt
    >>> teacher = tgt.Teacher(torch.nn.Linear(8, 2), torch.nn.Linear(2, 8), torch.nn.Linear(8, 3))
    >>> objective = tgt.TGTObjective(teacher, tgt.LatentSampler(teacher, sigma=0.5, units="absolute"))
    >>> output = objective(torch.nn.Linear(8, 3), torch.randn(4, 8), torch.tensor([0, 1, 2, -1]))
    >>> output["loss"].backward()
    >>> sorted(output["parts"])
    ['hard', 'soft', 'synthetic']
    """

    def __init__(
        self,
        teacher: Teacher,
        sampler: LatentSampler | SyntheticReplay | LatentMixUp | None = None,
        *,
        loss: DistillationLoss | None = None,
        synthetic_weight: float | Tensor | WeightOf = 1.0,
        count_group: Any = None,
        logits_of: LogitsOf = None,
        cache: TeacherCache | EnsembleCache | None = None,
        start_after: int = 0,
        terms: Sequence[Term] = (),
        balance: GradientBalance | None = None,
    ) -> None:
        self.teacher = teacher
        self.sampler = sampler
        self.loss = DistillationLoss(temperature=2.0, hard_weight=1.0) if loss is None else loss
        self.synthetic_weight = synthetic_weight
        self.count_group = count_group
        self.logits_of = logits_of
        self.cache = cache
        self.start_after = _checks.integer("TGTObjective", "start_after", start_after, 0, 1 << 62)
        self.terms, self.balance = terms, balance
        self._beside = Terms(terms, balance)
        self.waiting = False  # no step explores as long as it is set, which fit(explore_on_plateau=) does
        self._calls = 0
        self._known: Known | None = None
        self._met: int | None = None  # the student that was last looked at
        self._options()
        self._group()

    def _options(self) -> DistillOptions:
        """Those of the loss; at each call, as any setting may have been changed since the last one."""
        if not isinstance(self.teacher, Teacher):
            raise ArgumentError(
                f"TGTObjective: teacher must be a tgt_fast.Teacher, got {type(self.teacher).__name__}; a labeler "
                "alone, without a sampler, is tgt_fast.Teacher(nn.Identity(), nn.Identity(), labeler)"
            )
        for name, part, needed in (("loss", self.loss, "return_stats"), ("sampler", self.sampler, "calibrate")):
            if part is not None and not (hasattr(part, "options") and hasattr(part, needed)):
                made = "DistillationLoss" if name == "loss" else "LatentSampler"
                raise ArgumentError(f"TGTObjective: {name} must be a tgt_fast.{made}, got {type(part).__name__}")
        options = self.loss.options
        if options.reduction != "mean" or self.loss.return_stats:
            raise ArgumentError(
                f"TGTObjective: the loss must have reduction='mean' and return_stats=False, got {self.loss}"
            )
        check_logits_of("TGTObjective", self.logits_of)
        check_weight("TGTObjective", self.synthetic_weight)
        if self.sampler is not None and not is_on(options.soft_weight):
            raise ArgumentError(
                "TGTObjective: a loss with soft_weight=0 ignores synthetic examples; leave the sampler out"
            )
        self._known = Known.of(self.cache, self.teacher, self._known)
        if self.terms is not self._beside.given or self.balance is not self._beside.balance:
            self._beside = Terms(self.terms, self.balance)
        if self._beside.terms and getattr(self.loss, "inplace", False):
            raise ArgumentError("TGTObjective: the loss has inplace=True, which leaves no logits for terms; pass False")
        return options

    def __call__(
        self,
        student: Callable[..., Any],
        x: Any,
        y: Tensor | None = None,
        *,
        sample_ids: Tensor | None = None,
        step: int | Tensor | None = None,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        synthetic_normalizer: float | Tensor | None = None,
        occurrence: Tensor | None = None,
        logits_of: LogitsOf = None,
        synthetic: Synthetic | None = None,
    ) -> ObjectiveOutput:
        """The loss on one batch; its ``backward()`` is yours to call.

        Args:
            student: inputs -> logits (n, ..., C), the teacher's C, or what holds them; see ``logits_of``.
            x: n real examples in data space, a tensor or a pytree of tensors.
            y: (n, ...) int64 labels, (n, ..., C) shares of the classes (mixup), or None: the soft
                terms alone. The loss's ``ignore_index`` drops a real row from both its terms, ``unlabeled_index`` from
                the hard one.
            sample_ids: (n,) int64, what the sampler keys its noise by; by default it counts examples.
            step: for the sampler's noise; by default it counts its calls. Pass the optimizer step where one
                consists of several calls.
            sample_weight: (n, ...) weights of the real rows.
            normalizer: replaces n, the number (or total weight) of counted real rows, where several calls
                make one step, and what the processes of ``count_group`` count; see :meth:`normalizers`.
            synthetic_normalizer: likewise replaces m, the number of synthetic rows.
            occurrence: (n,) int64, for the sampler: which copy of its id each row is, where calls of one step hold
                copies of one example; see :meth:`occurrences`.
            logits_of: in the place of the objective's own, in this call.
            synthetic: examples that are there already (:meth:`LatentSampler.prefetch`, :func:`fit` with ``prefetch``),
                in the place of a call of the sampler, of which there need be none.

        Returns:
            ``{"loss", "parts": {"hard", "soft", "synthetic"}}``, 0-d; the parts are detached and add up to
            the loss. Further terms have parts of their own.

        Raises:
            ShapeError: student, teacher and labels do not fit together. Errors of the sampler are passed on.
            DTypeError: there are no logits in what the student returned.
            ArgumentError: the student is the teacher's labeler; a ``cache`` without ``sample_ids``.
        """
        options = self._options()
        with self._beside.watching(student, self.teacher) as watch:
            return self._evaluate(
                watch, options, student, x, y, sample_ids, step, sample_weight, normalizer, synthetic_normalizer,
                occurrence, logits_of, synthetic,
            )  # fmt: skip

    def _evaluate(
        self, watch: Watch, options: DistillOptions, student: Callable[..., Any], x: Any, y: Tensor | None,
        sample_ids: Tensor | None, step: int | Tensor | None, sample_weight: Tensor | None,
        normalizer: float | Tensor | None, synthetic_normalizer: float | Tensor | None, occurrence: Tensor | None,
        logits_of: LogitsOf, synthetic: Synthetic | None,
    ) -> ObjectiveOutput:  # fmt: skip
        if synthetic is not None:
            self._check_made(synthetic)
        now = self._calls if step is None else step
        begun = self.begun(now)
        if (self.start_after or self.terms) and step is None:
            self._calls += 1
        synthetic = synthetic if begun else None
        if not torch.compiler.is_compiling():
            refuse_labeler("TGTObjective", self.teacher, student)
            if id(student) != self._met:
                warn_of_shared("TGTObjective", self.teacher, student, stacklevel=4)
                self._met = id(student)
        logits_of = self.logits_of if logits_of is None else check_logits_of("TGTObjective", logits_of)
        class_dim = getattr(self.loss, "class_dim", -1)
        class_dim = self.teacher.class_dim if class_dim == -1 else class_dim
        latents: Latents | None = None
        with torch.no_grad():
            if self._known is None:
                opinions = self.teacher.opinions(x)
            else:
                opinions, latents = self._known(
                    x, sample_ids, encode=synthetic is None and begun and self._asks_latents()
                )
        theirs_seen = self._features_of_labeler(watch, x, "real", ran=self._known is None)
        with named_range("student"):
            logits = student_logits("TGTObjective", student, self.teacher.student_view(x), logits_of, class_dim)
        ours_seen = watch.ours(tree.batch_size(x)) if self._beside.sees("real") else {}
        if isinstance(y, Tensor) and y.dim() == logits.dim():  # shares of the classes, in the layout of the logits
            y = y.movedim(class_dim, -1)
        group = self._group()
        real = None
        if group is None:  # at once, which may give the logits' memory back
            with named_range("loss"):
                real = self._real(options, logits, opinions, y, sample_weight, normalizer)
        made = synthetic
        if begun and (made is None or not is_on(self.synthetic_weight)):
            given = {"occurrence": occurrence, "logits_of": logits_of, "latents": latents}
            given |= label_argument(self.sampler, y, logits.shape[0], logits.device)
            made = self._explored(student, x, sample_ids, step, given)
        nothing = made is not None and not made.teacher_logits.shape[0]  # replicas by class may ask for none
        if nothing:
            made = None
        if made is not None:
            watch.ours(None)  # what exploring left
            with named_range("student (synthetic)"):
                view = self.teacher.student_view(made.x)
                synthetic_logits = student_logits("TGTObjective", student, view, logits_of, class_dim)
        if real is None:
            drawn = (logits[:0] if nothing else None) if made is None else synthetic_logits
            counts = self._counts(options, group, logits, y, sample_weight, drawn, normalizer, synthetic_normalizer)
            normalizer, synthetic_normalizer = counts
            with named_range("loss"):
                real = self._real(options, logits, opinions, y, sample_weight, normalizer)
        loss, hard = real
        soft = loss.detach() - hard
        of_made = torch.zeros_like(soft)
        also: Seen | None = None
        if made is not None:
            with named_range("loss (synthetic)"):
                theirs: tuple[Opinion, ...] = (Opinion(made.teacher_logits, None),)
                if opinions[0].weight is not None:
                    theirs = self.teacher.opinions(made.x)
                shape, weight = synthetic_logits.shape[:-1], self.synthetic_weight
                factor, weights = weights_of("TGTObjective", weight, made, shape, logits.device)
                if weights is not None and synthetic_normalizer is None:
                    synthetic_normalizer = float(math.prod(shape))
                term = factor * self._soft(options, synthetic_logits, theirs, weights, synthetic_normalizer)
            loss, of_made = loss + term, term.detach()
            if self._beside.terms:
                share = share_of(options, synthetic_logits, None, weights, synthetic_normalizer)
                ours_made = watch.ours(tree.batch_size(made.x)) if self._beside.sees("synthetic") else {}
                theirs_made = self._features_of_labeler(watch, made.x, "synthetic", ran=False)
                also = Seen(
                    synthetic_logits, one_opinion(theirs), None, weights, ours_made, theirs_made, factor * share
                )  # fmt: skip
        parts: dict[str, Tensor] = {"hard": hard, "soft": soft, "synthetic": of_made}
        if self._beside.terms:
            share = share_of(options, logits, y, sample_weight, normalizer)
            seen = Seen(logits, one_opinion(opinions), y, sample_weight, ours_seen, theirs_seen, share)
            with named_range("terms"):
                loss, own, more = self._beside(lambda: int(now), seen, also, loss, student, group)
            parts = {name: part if own is None else own.to(part.dtype) * part for name, part in parts.items()} | more
        return {"loss": loss, "parts": cast(Parts, parts)}

    def _features_of_labeler(self, watch: Watch, x: Any, rows: str, *, ran: bool) -> dict[Any, Tensor]:
        """What terms want to see of such rows; the labeler is run for it, unless it just has been."""
        if not self._beside.sees(rows):
            return {}
        if not ran:
            watch.theirs(None)
            with torch.no_grad():
                self.teacher.label(x)
        return watch.theirs(tree.batch_size(x))

    @property
    def explores(self) -> bool:
        """Whether a call asks the sampler."""
        return self.sampler is not None and is_on(self.synthetic_weight)

    def begun(self, step: int | Tensor) -> bool:
        """Whether a step has a third term, as far as time decides that. A tensor is read where it lies."""
        return not self.waiting and (self.start_after == 0 or int(step) >= self.start_after)

    def _asks_latents(self) -> bool:
        return self.explores and bool(getattr(self.sampler, "encodes", False))

    def known_latents(self, x: Any, sample_ids: Tensor | None) -> Latents | None:
        """Enc(x) out of the cache, where there is one that keeps it and the sampler asks for it."""
        self._options()
        if self._known is None or not self._asks_latents():
            return None
        with torch.no_grad():
            return self._known(x, sample_ids, encode=True)[1]

    def _check_made(self, synthetic: Any) -> None:
        if not all(hasattr(synthetic, name) for name in ("x", "teacher_logits")):
            raise ArgumentError(
                f"TGTObjective: synthetic must be what a sampler made, a tgt_fast.Synthetic, got "
                f"{type(synthetic).__name__}"
            )

    def _group(self) -> Any:
        """The processes that count together, if there are several."""
        own = self.count_group
        return counting_group("TGTObjective", getattr(self.loss, "count_group", None) if own is None else own)

    def _explored(
        self, student: Callable[..., Any], x: Any, sample_ids: Tensor | None, step: Any, options: dict[str, Any]
    ) -> Synthetic | None:
        if self.sampler is None or not is_on(self.synthetic_weight):
            return None
        given = {name: value for name, value in options.items() if value is not None}
        return self.sampler(x, student=student, sample_ids=sample_ids, step=step, **given)

    def _counts(
        self, options: DistillOptions, group: Any, logits: Tensor, y: Tensor | None, sample_weight: Tensor | None,
        synthetic: Tensor | None, n: float | Tensor | None, m: float | Tensor | None,
    ) -> tuple[float | Tensor | None, float | Tensor | None]:  # fmt: skip
        """n and m, where they are not given, of the rows of all processes divided by their number."""
        device, rows = logits.device, logits.shape[:-1]
        mine: list[Tensor] = []
        if n is None:
            # What does not fit the rows is refused by the loss, after the processes have met.
            target = y if isinstance(y, Tensor) and y.shape == rows else None
            weight = sample_weight if isinstance(sample_weight, Tensor) and sample_weight.shape == rows else None
            mine.append(weight_of_rows(rows, device, target, weight, logits.shape[-1], options))
        if m is None and synthetic is not None:
            mine.append(weight_of_rows(synthetic.shape[:-1], device, None, None, synthetic.shape[-1], options))
        counted = list(over_processes(group, *mine)) if mine else []
        if n is None:
            n = counted.pop(0)
        return n, counted[0] if counted else m

    def normalizers(self, batches: Iterable[Any], *, columns: Sequence[Any] | None = None) -> tuple[Tensor, Tensor]:
        """(n, m) over the micro-batches of one step: its counted real rows, and its synthetic rows.

        With them, k calls whose losses are added up equal one call on all the examples, however the valid
        rows are spread. With a ``count_group`` they are those of all its processes, divided by their number, in one
        ``all_reduce``: what data parallel training averages is then the gradient of the whole. Rows are counted by
        labels, or by examples: for logits (n, ..., C) without labels, and for synthetic rows of such logits, pass
        counts of your own.

        Args:
            batches: the micro-batches, as a loader gives them; a batch need not have labels.
            columns: ``(ids, x, y)``, where they are in a batch, as for :func:`fit`.

        Returns:
            Two 0-d float32 tensors (float64 for a ``count_group``) on the device of the examples, made without reading
            anything from it.
        """
        counts: list[Tensor] = []
        examples: int | Tensor = 0
        for batch in checked_batches("TGTObjective", batches, columns):
            rows, device = tree.batch_size(batch.x), tree.first_device(batch.x)
            examples = examples + made_of(self.sampler, rows, batch.y, device)
            if batch.y is None:
                counts.append(torch.tensor(rows, device=device))
            else:
                y = batch.y
                if y.is_floating_point():  # shares of the classes, which drop no row
                    y = y[..., 0] if y.dim() > 1 else y
                counts.append((y != self.loss.options.ignore_index).sum())
        if not counts:
            raise ArgumentError("TGTObjective: normalizers needs a batch at least")
        real = torch.stack(counts).sum()
        made = torch.as_tensor(examples).to(real)
        group = self._group()
        if group is None:
            return real.to(torch.float32), made.to(torch.float32)
        n, m = over_processes(group, real.double(), made.double())
        return n, m

    def occurrences(self, batches: Sequence[Batch]) -> list[Tensor | None]:
        """For each micro-batch of one step the ``occurrence`` of its rows, counted over all of them.

        A loader that draws with replacement may put copies of an example into several micro-batches, whose noise is of
        one step: only the copies' number tells it apart. None where there is nothing to tell apart: no ids, no copies
        (as far as that can be seen on a CPU), no sampler or one with another ``repeats`` than "distinct".
        """
        distinct = self.sampler is not None and self.sampler.options.repeats == "distinct"
        found = checked_batches("TGTObjective", batches)
        return occurrences_over([batch.sample_ids if distinct else None for batch in found])

    def _real(
        self, options: DistillOptions, logits: Tensor, opinions: Sequence[Opinion], y: Tensor | None,
        weight: Tensor | None, normalizer: float | Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return real_of(self.loss, options, logits, opinions, y, weight, normalizer)

    def _soft(
        self, options: DistillOptions, logits: Tensor, opinions: Sequence[Opinion], weight: Tensor | None,
        normalizer: float | Tensor | None,
    ) -> Tensor:  # fmt: skip
        return soft_part(self.loss, options, logits, opinions, weight, normalizer)
