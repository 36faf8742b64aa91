"""LatentSampler: fresh, labelled examples from a frozen teacher, by exploring its latent space."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tgt_fast._ranges import named_range
from tgt_fast.errors import ArgumentError, DTypeError
from tgt_fast.explore.anchors import AnchorPool, Anchors
from tgt_fast.explore.bank import LatentBank
from tgt_fast.explore.by_class import ByClass, labels_of_rows, spread
from tgt_fast.explore.calibrated import Calibrated
from tgt_fast.explore.compiled import CompiledExploration, examples
from tgt_fast.explore.counters import Counters, seed_tensor
from tgt_fast.explore.draws import decoded, with_noise
from tgt_fast.explore.gradient import ascend, checked_student
from tgt_fast.explore.options import Adjustable, SamplerOptions, fixed
from tgt_fast.explore.persistent import chain_latents
from tgt_fast.explore.prefetch import Prefetching
from tgt_fast.explore.prior import prior_latents
from tgt_fast.explore.saving import Saved
from tgt_fast.explore.scores import Score
from tgt_fast.explore.synthetic import Synthetic
from tgt_fast.ops._checks import flag, refuse_tracing
from tgt_fast.teacher import Latents, Teacher, tree
from tgt_fast.teacher.key import Key
from tgt_fast.teacher.returned import LogitsOf

PerClass = Tensor | Sequence[float] | Mapping[int | None, float] | ByClass


class LatentSampler(Adjustable, Calibrated, Prefetching, Saved):
    r"""Synthetic examples ``x~ = Dec(z~)`` with soft labels ``h(x~)``, where, by mode::

        prior       z~ = prior(sigma * nu)                      nu ~ N(0, I)

        random      z~ = Enc(x) + sigma * scale * nu

        gradient    z_0 = Enc(x) + sigma * scale * nu
                    z_{k+1} = z_k + step_size * scale * u_k / ||u_k||_2
                        u_k = scale * grad_z D( f(Dec(z_k)), h(Dec(z_k)) )
                        kept within  ||(z_{k+1} - Enc(x)) / scale||_2 <= radius
                    z~ = z_steps

        persistent  z~ = where the example's chain stands; the user's own backward moves it by one such
                    step; with restart_probability it starts again at Enc(x) + sigma * scale * nu

    with ``scale`` the latents' standard deviation, coordinate by coordinate (``units="std"``), or 1
    (``"absolute"``), f the student, h the labeler and D the divergence; its gradient passes through both.

    Source: random and gradient are of Zaheer et al., "Teacher Guided Training" (ICLR 2023). Ours: the modes
    prior and persistent, normalised steps, starting and step noise, the trust region, balanced anchors,
    replicas, units of the latent's standard deviation.

    Noise is a function of (seed, sample id, step, replica) alone: the same in any batch order, split or
    number of processes; no global generator is read or written. Exploration leaves the student as it found
    it, bit for bit.

    Args:
        teacher: the frozen :class:`tgt_fast.Teacher`.
        mode: "prior" (needs a teacher with a prior), "random", "gradient" (needs ``student=`` at each call)
            or "persistent" (needs ``sample_ids=``).
        sigma: >= 0, the noise's standard deviation, in units of ``scale`` (of the prior's noise in prior
            mode); or one a class (not in prior mode), see below.
        step_size: >= 0, length of a step in units of ``scale`` (gradient, persistent).
        steps: >= 1, steps a call (gradient; persistent takes one a visit).
        radius: > 0 or None, of the ball round Enc(x) in units of ``scale`` (gradient, persistent). Noise of
            sigma in d coordinates lies about sigma * sqrt(d) away.
        norm: "l2" (a step along u/||u||), "linf" (along its sign) or "raw" (along u; not in persistent mode).
        step_noise: >= 0, standard deviation of the noise added at each step, in units of ``scale``.
        units: "std" or "absolute".
        anchors: "batch"; or (random, gradient; after ``calibrate``) "balanced": each anchor is of a class drawn
            uniformly; or weights of the classes, >= 0, by which it is drawn, of those that ``calibrate`` met.
        replicas: in [1, 32768], synthetic examples a real one, each with its own noise; or one number a class, in
            [0, 32768] (anchors "batch", not in prior mode).
        divergence, beta, temperature: D, as in :func:`tgt_fast.distillation_loss` (gradient mode; in
            persistent mode D is the user's loss).
        restart_probability: in [0, 1] (persistent).
        bank_size: >= 1, chains that persistent mode remembers; beyond it the longest unvisited is forgotten.
            The bank belongs to this process: an id that moves to another one starts there anew from Enc(x) +
            noise.
        truncation: > 0 or None: draw the starting noise from the normal truncated to so many standard
            deviations.
        seed: 64-bit integer.
        rank, world_size: of this process, for the default ids; by default torch.distributed's, where it is
            initialised.
        backend: of the ops, see :func:`tgt_fast.explain`.
        record_disagreement: keep, of each call, ``last_disagreement`` (gradient mode; costs one more
            evaluation and a synchronisation).
        repeats: what rows of a call with the same sample id get, as loaders that draw with replacement give them:
            "distinct" noise (and, balanced, anchors; persistent, chains), the k-th copy of an id, counted from 0, being
            its replicas k * replicas + r, r < replicas, 2**16 at most; the "same" noise, so the same example; or an
            "error" (which waits for a device where the ids lie on one).
        compile: run decoder, labeler and, in gradient mode, student, divergence and step as one ``torch.compile``d
            graph, replayed as a CUDA graph on a CUDA device (random, prior, gradient). Decoder and labeler are copies:
            BatchNorms are folded into the layers before them, convolutions are in channels last, each where that is
            faster on the first batch and gives the same to a thousandth (so that last bits may differ from run to run);
            :meth:`explain` says what was done. The user's modules stay as they are. The first
            call, and the first of another batch size, takes seconds. Where the parts cannot be compiled they run as
            they are; the reason is logged. A student that draws random numbers or writes to its buffers in eval mode
            is left as it was found here, too.
        logits_of: where the logits are in what the student returns, as for :class:`tgt_fast.TGTObjective` (gradient).
        score: what gradient mode climbs in the place of D, and :class:`tgt_fast.SyntheticReplay` chooses by: a callable
            (student_logits, teacher_logits) -> [B], differentiable, such as those of :mod:`tgt_fast.scores`.
        ball: "l2", or "linf": ``radius`` bounds each coordinate (Madry et al., "Towards deep learning models resistant
            to adversarial attacks", ICLR 2018).
        affine: move whole channels (random, gradient): ``z~ = Enc(x) (1 + e) + scale b``, with e and b a number a
            channel, which take the place of the coordinates above: noise of sigma, steps, and the ball round 0. A
            channel: a slice along dimension 1, of latents with a mask along the last; its scale is the root mean square
            over it. After Zhang et al., "Expanding small-scale datasets with guided imagination" (NeurIPS 2023).

    Attributes:
        sigma, step_size, ...: the arguments above. An assignment (``sampler.sigma = 0.0``) is checked and takes effect
            at the next call; ``mode``, ``bank_size``, ``rank``, ``world_size`` and ``compile`` are fixed.
        scale: None until known, then [latent shape] float32 (size 1 along masked positions, over which it is
            pooled).
        last_disagreement: the mean of D over the batch before each step of the last call and after the last
            step.

    Raises:
        ArgumentError: an option outside its range, NaN included, or options that contradict each other.

    A number a class: a tensor, an array or a sequence, a number for each class; or a dict, which may leave classes out,
    {0: 1.0, 7: 2.0, None: 1.0}. Classes that it leaves out have the number under None, and so have rows without a label
    (a negative one); without it 1. The class of a row is that of its anchor, as ``calibrate`` was told, where anchors
    are drawn; else its label, which a call then needs (``labels=``; :class:`tgt_fast.TGTObjective` passes y). With
    replicas by class a batch makes as many examples as its rows' classes have, perhaps none, replica by replica, and a
    CUDA device is waited for. Weights, numbers and sigmas may change from step to step; of a saved state the largest
    number of replicas must be the same.

    Persistent mode's chains move where a backward pass reaches ``Synthetic.latents.z``: ``loss.backward()`` does.
    ``torch.autograd.grad(loss, student.parameters())`` and ``loss.backward(inputs=...)`` do not ask for the latents'
    gradient and leave every chain where it stands, silently; add ``synthetic.latents.z`` to what they ask for.

    Gradient mode differentiates through the student in eval mode, and the teacher always is in it. There cuDNN
    refuses the backward pass of a recurrent network (LSTM, GRU, RNN) on a CUDA device: call the sampler, or the
    backward of persistent mode, within ``torch.backends.cudnn.flags(enabled=False)``.

    On a CUDA device persistent mode reads ids and step back to the host once a call; the other modes do not
    synchronise, but for ``repeats="error"`` and calls of more than 2**16 synthetic examples with ids of yours, whose
    copies could be too many.

    >>> import torch, tgt_fast as tgt
    >>> from torch import nn
    >>> teacher = tgt.Teacher(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 3))
    >>> sampler = tgt.LatentSampler(teacher, mode="random", sigma=0.5, units="absolute")
    >>> synth = sampler(torch.zeros(4, 8))
    >>> synth.x.shape, synth.teacher_logits.shape, synth.ids.tolist()
    (torch.Size([4, 8]), torch.Size([4, 3]), [0, 1, 2, 3])
    """

    def __init__(
        self,
        teacher: Teacher,
        mode: Literal["prior", "random", "gradient", "persistent"] | str = "random",
        *,
        sigma: float | PerClass = 1.0,
        step_size: float = 1.0,
        steps: int = 1,
        radius: float | None = None,
        norm: str = "l2",
        step_noise: float = 0.0,
        units: str = "std",
        anchors: str | PerClass = "batch",
        replicas: int | PerClass = 1,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        restart_probability: float = 0.1,
        bank_size: int = 65536,
        truncation: float | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        backend: str = "auto",
        record_disagreement: bool = False,
        compile: bool = False,
        repeats: str = "distinct",
        logits_of: LogitsOf = None,
        score: Score | None = None,
        ball: str = "l2",
        affine: bool = False,
    ) -> None:
        if not isinstance(teacher, Teacher):
            raise ArgumentError(f"LatentSampler: teacher must be a tgt_fast.Teacher, got {type(teacher).__name__}")
        self.options = SamplerOptions(
            mode, sigma, step_size, steps, radius, norm, step_noise, units, anchors, replicas, divergence,  # type: ignore[arg-type]
            beta, temperature, restart_probability, bank_size, truncation, backend, record_disagreement, repeats,
            logits_of, score, ball, affine,
        )  # fmt: skip
        if mode == "prior" and teacher.prior is None:
            raise ArgumentError(
                'LatentSampler: mode="prior" needs a teacher with a prior: Teacher(..., prior="normal")'
            )
        self.teacher = teacher
        self.scale: Tensor | None = None
        self.last_disagreement: list[float] = []
        compile = flag("LatentSampler", "compile", compile)
        if compile and mode == "persistent":
            raise ArgumentError(
                'LatentSampler: compile=True serves the modes random, prior and gradient, not "persistent", whose step '
                "is the user's own backward pass"
            )
        compiled = CompiledExploration() if compile else None
        self._compiled = compiled
        self._ascend = ascend if compiled is None else compiled.ascend
        self._examples = examples if compiled is None else compiled.examples
        self._counters = Counters(seed, rank, world_size)
        self._bank = LatentBank(self.options.bank_size)
        self._pool: AnchorPool | None = None

    rank = fixed("rank", lambda sampler: sampler._counters.place[0])
    world_size = fixed("world_size", lambda sampler: sampler._counters.place[1])
    compile = fixed("compile", lambda sampler: sampler._ascend is not ascend)

    @property
    def seed(self) -> int:
        return int(self._counters.seed)

    @seed.setter
    def seed(self, value: int) -> None:
        self._counters.seed = seed_tensor(value)

    def __repr__(self) -> str:
        options, defaults = vars(self.options), vars(SamplerOptions())
        shown = [f"{k}={v!r}" for k, v in options.items() if k == "mode" or v != defaults[k]]
        return f"LatentSampler({', '.join(shown)})"

    def __call__(
        self,
        x: Any,
        *,
        student: Callable[..., Any] | None = None,
        sample_ids: Tensor | None = None,
        step: int | Tensor | None = None,
        occurrence: Tensor | None = None,
        logits_of: LogitsOf = None,
        latents: Latents | Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Synthetic:
        """Explore from a batch.

        Args:
            x: data, a pytree of B examples, in the teacher's data space.
            student: the model in training, a module, called as ``student(teacher.student_view(x~))`` ->
                logits [B, ..., C] (gradient mode). A plain function is called as it is: a module that it
                hides keeps its train mode.
            sample_ids: [B] integers, 0 <= id < 2**48, what the noise and the chains are keyed by. Of ids that
                repeat within a batch see ``repeats``; persistent chains refuse them with "same". By default
                a running counter over the global batch: rank r of R takes the r-th part of it. Ranks are
                taken to see batches of one size, the last excepted, which may be smaller.
            step: 0 <= step < 2**28 (divided by ``steps`` with step noise); by default an internal counter
                that advances once a call. Pass the optimizer's step when several calls make one batch.
            occurrence: [B] integers >= 0, which copy of its id each row is (``repeats="distinct"``), where calls
                of one step, or processes, may hold copies of one example; by default counted within the call, in
                the order of its rows. :meth:`tgt_fast.TGTObjective.occurrences` counts over calls.
            logits_of: in the place of the sampler's own, in this call.
            latents: ``Enc(x)`` of the B examples where it is known already, as a :class:`tgt_fast.TeacherCache` gives
                it; the encoder is then not asked. Not looked at where nothing is encoded (``encodes``).
            labels: [B] integers, a negative one for a row without a label, or [B, C] shares, of which the largest
                counts; what replicas and sigma by class go by (``asks_labels``).

        Returns:
            :class:`Synthetic` of replicas * B examples; detached, except in persistent mode.

        Raises:
            ArgumentError: a missing student, ids, labels or calibration; a student that is the labeler; on a CPU, an
                id, a copy or a label out of range; with ``repeats="error"``, and in persistent mode with "same", an
                id twice.
            ShapeError: a decoder that changes the batch size, a student whose class count is not the
                labeler's.
        """
        refuse_tracing("LatentSampler")
        self.teacher.check_data(x)
        if sample_ids is None and self.mode == "persistent":
            raise ArgumentError("LatentSampler: persistent mode keeps one chain an example: pass sample_ids=")
        where = tree.batch_size(x), tree.first_device(x)
        key = self._counters.key(*where, sample_ids, step, occurrence, self.options)
        options = self.options if logits_of is None else dataclasses.replace(self.options, logits_of=logits_of)
        drawn = self._drawn(key) if options.pooled else None
        classes = self._classes(drawn, labels, *where)
        count, rows, options = where[0], None, options.of_rows()
        known = self._checked_latents(latents, count)
        if isinstance(self.options.sigma, ByClass) and classes is not None:
            key = dataclasses.replace(key, sigma=self.options.sigma.at(classes))
        if isinstance(self.options.replicas, ByClass) and classes is not None:
            rows, key = spread(key, classes, self.options)
            classes = classes[rows]
        with named_range(f"explore ({self.mode})"):
            if self.mode == "persistent":
                if rows is not None:
                    x, known = tree.take(x, rows), None if known is None else tree.take(known, rows)
                found = chain_latents(self.teacher, self._bank, x, key, self._scale_for, options, known)
                made = decoded(self.teacher, found, key, options.most_replicas, relaxed=True)
                logits = self.teacher.label(made)
            else:
                found = tree.concat(self._explored(x, known, student, key, drawn, rows, options))
                made, logits = self._examples(self.teacher, found, key, options.most_replicas)
        self._counters.advance(count, ids=sample_ids is None, step=step is None)
        ids, anchors, classes = (
            None if t is None else t.repeat(options.most_replicas)
            for t in (key.ids, key.ids if drawn is None else drawn.ids, classes)
        )
        assert ids is not None
        return Synthetic(made, found, logits, self.mode, ids, None if self.mode == "prior" else anchors, classes)

    def _classes(self, drawn: Anchors | None, labels: Any, count: int, device: torch.device) -> Tensor | None:
        """The class of each row, where it is known."""
        if drawn is not None:
            return drawn.labels
        if labels is None:
            if self.options.asks_labels:
                raise ArgumentError("LatentSampler: replicas and sigma by class go by the rows' classes: pass labels=")
            return None
        found = labels_of_rows(labels, count, device)
        for name in ("replicas", "sigma"):
            if isinstance(value := getattr(self.options, name), ByClass):
                value.check(name, found)
        return found

    def _explored(
        self, x: Any, known: Latents | None, student: Callable[..., Any] | None, key: Key, drawn: Anchors | None,
        rows: Tensor | None, options: SamplerOptions,
    ) -> list[Latents]:  # fmt: skip
        """The latents of each replica; with ``rows``, of those of the batch that they start from."""
        keys = [key.of_replica(replica) for replica in range(options.most_replicas)]
        if self.mode == "prior":
            return [prior_latents(self.teacher, x, k, options, known) for k in keys]
        if self.mode == "gradient":
            student = checked_student(self.teacher, student)
        anchors = drawn.latents if drawn is not None else self.teacher.encode(x) if known is None else known
        scale = self._scale_for(anchors)
        if rows is not None:
            anchors = tree.take(anchors, rows)
        found = [with_noise(anchors, scale, k, options) for k in keys]
        if self.mode == "random" or student is None or not anchors.z.shape[0]:
            return found
        ascended = [
            self._ascend(self.teacher, student, z, anchors, scale, k, options) for z, k in zip(found, keys, strict=True)
        ]
        histories = [history for _, history in ascended]
        self.last_disagreement = [sum(values) / len(values) for values in zip(*histories, strict=True)]
        return [latents for latents, _ in ascended]

    def explain(self) -> list[str]:
        """What ``compile=True`` has made of the teacher and the steps, a line a part; nothing before the first call.

        Which backend serves an op, and why, says :func:`tgt_fast.explain`.
        """
        return [] if self._compiled is None else self._compiled.report()

    @property
    def encodes(self) -> bool:
        """Whether a call looks at ``Enc(x)``; else balanced anchors, or a prior of a given shape, take its place."""
        prior = self.mode == "prior" and isinstance(self.teacher.prior, tuple)
        return not prior and not self.options.pooled

    @property
    def asks_labels(self) -> bool:
        """Whether a call needs the classes of its rows: with replicas, or with batch anchors sigma, by class."""
        return self.options.asks_labels

    def _checked_latents(self, given: Latents | Tensor | None, count: int) -> Latents | None:
        if given is None or not self.encodes:
            return None
        if not isinstance(given, (Latents, Tensor)):
            raise DTypeError(f"LatentSampler: latents must be a tensor or Latents, got {type(given).__name__}")
        latents = Latents(given) if isinstance(given, Tensor) else given
        return tree.detach(latents.check(count, "LatentSampler"))
