"""LatentSampler: fresh, labelled examples from a frozen teacher, by exploring its latent space."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tgt_fast._ranges import named_range
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.explore.anchors import AnchorPool, Anchors
from tgt_fast.explore.bank import LatentBank, latest
from tgt_fast.explore.calibration import StreamingStd, measure, measure_together
from tgt_fast.explore.compiled import CompiledExploration, examples
from tgt_fast.explore.counters import Counters, seed_tensor
from tgt_fast.explore.draws import decoded, with_noise
from tgt_fast.explore.gradient import ascend, checked_student
from tgt_fast.explore.options import Adjustable, SamplerOptions, checked_integer, fixed
from tgt_fast.explore.persistent import chain_latents
from tgt_fast.explore.prefetch import Prefetching
from tgt_fast.explore.prior import prior_latents
from tgt_fast.explore.processes import of_all_processes, warn_of_foreign_chains, warn_of_own_chains, warn_of_shards
from tgt_fast.explore.scores import Score
from tgt_fast.explore.state import SamplerState, checked_state
from tgt_fast.explore.synthetic import Synthetic
from tgt_fast.kernels.options import MAX_SAMPLE_ID
from tgt_fast.ops._checks import flag, refuse_tracing
from tgt_fast.ops.counts import counting_group
from tgt_fast.teacher import Latents, Teacher, tree
from tgt_fast.teacher.key import Key
from tgt_fast.teacher.returned import LogitsOf


class LatentSampler(Adjustable, Prefetching):
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
            mode).
        step_size: >= 0, length of a step in units of ``scale`` (gradient, persistent).
        steps: >= 1, steps a call (gradient; persistent takes one a visit).
        radius: > 0 or None, of the ball round Enc(x) in units of ``scale`` (gradient, persistent). Noise of
            sigma in d coordinates lies about sigma * sqrt(d) away.
        norm: "l2" (a step along u/||u||), "linf" (along its sign) or "raw" (along u; not in persistent mode).
        step_noise: >= 0, standard deviation of the noise added at each step, in units of ``scale``.
        units: "std" or "absolute".
        anchors: "batch", or "balanced" (random, gradient; after ``calibrate``): each anchor is of a class
            drawn uniformly.
        replicas: in [1, 32768], synthetic examples a real one, each with its own noise.
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
        sigma: float = 1.0,
        step_size: float = 1.0,
        steps: int = 1,
        radius: float | None = None,
        norm: str = "l2",
        step_noise: float = 0.0,
        units: str = "std",
        anchors: str = "batch",
        replicas: int = 1,
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
            mode, sigma, step_size, steps, radius, norm, step_noise, units, anchors, replicas, divergence,
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
        options = dataclasses.asdict(self.options)
        defaults = dataclasses.asdict(SamplerOptions())
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

        Returns:
            :class:`Synthetic` of replicas * B examples; detached, except in persistent mode.

        Raises:
            ArgumentError: a missing student, ids or calibration; a student that is the labeler; on a CPU, an
                id or a copy out of range; with ``repeats="error"``, and in persistent mode with "same", an id twice.
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
        drawn = self._drawn(key) if self.options.anchors == "balanced" else None
        known = self._checked_latents(latents, where[0])
        with named_range(f"explore ({self.mode})"):
            if self.mode == "persistent":
                latents = chain_latents(self.teacher, self._bank, x, key, self._scale_for, self.options, known)
                made = decoded(self.teacher, latents, key, self.options.replicas, relaxed=True)
                logits = self.teacher.label(made)
            else:
                latents = tree.concat(self._explored(x, known, student, key, drawn, options))
                made, logits = self._examples(self.teacher, latents, key, self.options.replicas)
        self._counters.advance(key.ids.shape[0], ids=sample_ids is None, step=step is None)
        ids = key.ids.repeat(self.options.replicas)
        if drawn is None:
            return Synthetic(made, latents, logits, self.mode, ids, None if self.mode == "prior" else ids)
        origin = (None if t is None else t.repeat(self.options.replicas) for t in (drawn.ids, drawn.labels))
        return Synthetic(made, latents, logits, self.mode, ids, *origin)

    @torch.inference_mode(False)  # what is kept must be normal tensors, to serve in any mode later
    @torch.no_grad()
    def calibrate(
        self,
        loader: Iterable[Any],
        *,
        per_class: int = 1024,
        columns: Sequence[Any] | None = None,
        group: Any = None,
        progress: bool | None = None,
        cache: Any = None,
    ) -> LatentSampler:
        """Measure ``scale``, the standard deviation of Enc(x) over a loader, and collect balanced anchors.

        Args:
            loader: batches ``x``, ``(x,)``, ``(x, y)`` or ``(ids, x, y)``. In data parallel runs give every
                rank the same data, or its part of them and a ``group``, so that all measure in the same unit; what is
                seen to be one rank's part of the data, without a group, warns.
            per_class: anchors kept a class, the first ones (balanced anchors only; class: y, or, where y is
                missing or negative, the labeler's argmax; ``Synthetic.anchor_ids`` are the loader's ids, or, where it
                gives none, places in it, counted from 0).
            columns: ``(ids, x, y)``, where they are in other batches, as for :func:`tgt_fast.fit`.
            group: "world", or a process group of ``torch.distributed``, whose processes measure together, each on its
                part of the data: the same ``scale`` to the bit on each, and balanced anchors of them all, those of the
                first process first (their ids are then the loader's, or places in each one's part). Each process
                calls, even with no data. Examples that a ``DistributedSampler`` repeats as padding are left out.
            progress: show a bar; None: on a terminal, where it takes longer than a second.
            cache: a :class:`tgt_fast.TeacherCache` with ``latents=True``, or an ensemble's, which then gives Enc(x) and
                the labeler's argmax by the loader's ids, and keeps what it lacked.

        Returns:
            The sampler itself.

        Raises:
            ArgumentError: fewer than two examples, latents that are not finite or all the same, or batches that can
                be read in more than one way.
        """
        per_class = checked_integer("per_class", per_class, 1, MAX_SAMPLE_ID)
        given = self.teacher, loader, columns, per_class if self.options.anchors == "balanced" else None, cache
        together = counting_group("calibrate", group, name="group")
        if together is None:
            std, pool = measure(*given, padding=True, progress=progress)
        else:
            std, pool = measure_together(together, *given, progress)
        scale = std.result()
        self._pool = None if pool is None else pool.build()
        self.scale = scale
        if self.options.needs_scale and together is None:
            warn_of_shards(loader, scale)
        return self

    def state_dict(self, group: Any = None) -> dict[str, Tensor | int]:
        """The state that a resumed run needs to go on with the same numbers: tensors and ints, not the teacher's.

        In persistent mode the chains are this process's alone: with several, save every rank's state. The first one's
        warns, as frameworks save that one alone. With ``group="world"``, or a process group whose processes all call,
        it holds the chains of all of them, on the CPU, the same in each; any number of processes can load it.
        """
        counters = self._counters
        state: dict[str, Tensor | int] = {"version": 1, **self.options.fingerprint(), "stride": counters.stride}
        for name in ("seed", "step", "next_id"):
            state[name] = getattr(counters, name).clone()
        if self.scale is not None:
            state["scale"] = self.scale.clone()
        together = counting_group("LatentSampler", group, name="group")
        if together is not None:
            if self.mode == "persistent":
                state |= latest(of_all_processes("state_dict", together, self._bank.everything))
        elif len(self._bank):
            warn_of_own_chains(counters.place)
            state |= {"rank": counters.place[0], "world_size": counters.place[1], **self._bank.state_dict()}
        elif self.mode == "persistent":
            state |= self._bank.state_dict()  # those that wait
        if self._pool is not None:
            state |= self._pool.state_dict()
        return state

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Take over a :meth:`state_dict`, the seed included; the options stay this sampler's (a schedule may have
        changed its sigma, step size, steps or radius). Chains of another rank than this one warn; those of all ranks
        wait until their id is met, in whichever process that is.

        Raises:
            CheckpointError: contents that are missing or foreign, or a sampler of another mode, units, norm or
                number of replicas. This one is then unchanged.
        """
        checked: SamplerState = checked_state(state, self.options)
        counters = self._counters
        if len(checked.bank) and checked.place is not None:
            warn_of_foreign_chains(checked.place, counters.place)
        counters.seed, counters.step, counters.next_id = checked.seed, checked.step, checked.next_id
        counters.stride = checked.stride
        self.scale, self._bank, self._pool = checked.scale, checked.bank, checked.pool

    def _explored(
        self, x: Any, known: Latents | None, student: Callable[..., Any] | None, key: Key, drawn: Anchors | None,
        options: SamplerOptions,
    ) -> list[Latents]:  # fmt: skip
        """The latents of each replica."""
        keys = [key.of_replica(replica) for replica in range(options.replicas)]
        if self.mode == "prior":
            return [prior_latents(self.teacher, x, k, options, known) for k in keys]
        if self.mode == "gradient":
            student = checked_student(self.teacher, student)
        anchors = drawn.latents if drawn is not None else self.teacher.encode(x) if known is None else known
        scale = self._scale_for(anchors)
        found = [with_noise(anchors, scale, k, options) for k in keys]
        if self.mode == "random" or student is None:
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
        return not prior and self.options.anchors != "balanced"

    def _checked_latents(self, given: Latents | Tensor | None, count: int) -> Latents | None:
        if given is None or not self.encodes:
            return None
        if not isinstance(given, (Latents, Tensor)):
            raise DTypeError(f"LatentSampler: latents must be a tensor or Latents, got {type(given).__name__}")
        latents = Latents(given) if isinstance(given, Tensor) else given
        return tree.detach(latents.check(count, "LatentSampler"))

    def _drawn(self, key: Key) -> Anchors:
        """Balanced anchors."""
        if self._pool is None:
            raise ArgumentError(
                'LatentSampler: anchors="balanced" needs to know the classes: call calibrate(loader) first'
            )
        self._pool = self._pool.to(key.ids.device)
        return self._pool.draw(key)

    def _scale_for(self, latents: Latents) -> Tensor | None:
        if not self.options.needs_scale:
            return None
        if self.scale is None:
            std = StreamingStd()
            std.update(latents)
            self.scale = std.result()
            warnings.warn(
                "LatentSampler: the latents' standard deviation was estimated from the first batch "
                f"({latents.z.shape[0]} examples) and is kept; call calibrate(loader) before training for a "
                "better one and, with several processes, for the same one on each",
                stacklevel=4,
            )
        shape, latent = self.scale.shape, latents.z.shape[1:]
        if len(shape) != len(latent) or any(a not in (1, b) for a, b in zip(shape, latent, strict=True)):
            raise ShapeError(
                f"LatentSampler: calibrated for latents of shape {tuple(shape)}, the encoder now gives {tuple(latent)}"
            )
        self.scale = self.scale.to(latents.z.device)
        return self.scale
