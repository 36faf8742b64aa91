"""Teacher: a frozen generator and a frozen labeler, through which gradients flow."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from tgt_fast._ranges import named_range
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.teacher import tree
from tgt_fast.teacher.key import Key
from tgt_fast.teacher.latents import Latents
from tgt_fast.teacher.parts import modules_of
from tgt_fast.teacher.returned import LogitsOf, call, check_logits_of, checked_class_dim, data_in, latents_in, logits_in

Inputs: TypeAlias = Any  # a tensor, or a pytree of tensors that share the batch dimension
Prior: TypeAlias = "str | tuple[int, ...] | Callable[[Tensor], Tensor | Latents] | None"


class Opinion(NamedTuple):
    """One of the distributions that a student is to learn."""

    logits: Tensor  # [B, ..., C]
    weight: float | Tensor | None  # of its soft term, a number or [B]; None: it is the only one
    known: Tensor | None = None  # [C] bool, the classes that exist in its term; None: all


class Teacher(nn.Module):
    r"""The frozen teacher: ``z = Enc(x)``, ``x = Dec(z)``, ``logits = h(x)``.

    Source: Zaheer et al., "Teacher Guided Training" (ICLR 2023). Frozen means: parameters need no gradient,
    modules stay in eval mode whatever a parent module does, and nothing of the teacher enters
    ``state_dict()``, ``parameters()`` or ``modules()``. It does not mean ``no_grad``: gradients flow through
    ``decode`` and ``label`` to the latents. ``.to()``, ``.cuda()``, ``.half()`` of this module or of a parent
    do move the teacher.

    All inputs live in one *data space*: what the loader gives, the encoder takes and the decoder makes.

    Args:
        encoder: data -> latents, a floating-point [B, ...] tensor or a :class:`Latents` (with a mask). Of an
            autoencoder of diffusers (``vae.encode``) the posterior's mode is taken.
        decoder: latents -> data with the same B. It is called with the tensor z, or with the whole
            ``Latents`` where they carry a mask. If it has a parameter named ``relaxed`` it is told whether a
            differentiable output is wanted (decoders of discrete data); any other decoder is taken to be
            differentiable as it is. If it has a parameter named ``key`` it is given what its random choices are
            keyed by (a :class:`tgt_fast.teacher.Key`: seed, sample ids, step, replica). Of an output object of
            diffusers (``vae.decode``) the ``sample`` is taken.
        labeler: ``labeler_transform(data)`` -> logits [B, ..., C], or a tuple, dict or output object that holds them.
        prior: None; "normal" (z ~ N(0, I) in the shape of the encoder's latents); a shape such as (16,) (the
            same, and no encoder call is needed to learn the shape); or a callable that turns normal noise in
            the shape of the encoder's latents into latents.
        labeler_transform: data -> what the labeler expects, for example a normalisation. Deterministic.
        student_transform: data -> what the student expects; applied by :meth:`student_view`. Deterministic.
        max_batch: run encoder, decoder and labeler on at most so many examples at a time; None: all at once.
        modules: modules that the callables use and that are not found in them, to be frozen and moved too.
        logits_of: where the logits are in what the labeler returns: a name, an index, or a function of it. By default
            what is named ``logits``, or the first floating-point tensor of at least two dimensions.
        class_dim: which dimension of the labeler's logits, and of those of students beside it, the classes are; 1 for
            segmentation, [B, C, H, W]. :meth:`label` gives them in the last one, [B, H, W, C], a view.

    Data that is a dict, or another mapping, goes into a model of transformers or peft as keywords, and so it does into
    any callable with several parameters that names its keys; one with a single parameter gets the dict.

    Each part is any callable: a module, a method, a ``functools.partial``, a function such as
    ``lambda x: hf(**x).logits``, or an object that can be called. The modules that it computes with are found, frozen
    and moved: in closures and default values, in globals and attributes that the code names, in lists, dicts and
    dataclasses. They are looked for when the teacher is made. A callable with an attribute ``teacher_modules``, a tuple
    of modules, is not searched; those are taken. Parameters of these modules are frozen for the student, too, if it
    shares them: :func:`tgt_fast.fit` refuses an optimizer over such, :class:`tgt_fast.TGTObjective` warns of them,
    unless they needed no gradient before.

    Raises:
        ArgumentError: a part that cannot be called, a prior or ``max_batch`` of the wrong kind.

    >>> import torch, tgt_fast as tgt
    >>> from torch import nn
    >>> teacher = tgt.Teacher(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 3), prior="normal")
    >>> z = teacher.encode(torch.zeros(4, 8)).z.requires_grad_()
    >>> teacher.label(teacher.decode(z)).sum().backward()
    >>> z.grad.shape, list(teacher.parameters())
    (torch.Size([4, 2]), [])
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        decoder: Callable[..., Any],
        labeler: Callable[..., Any],
        *,
        prior: Prior = None,
        labeler_transform: Callable[..., Any] | None = None,
        student_transform: Callable[..., Any] | None = None,
        max_batch: int | None = None,
        modules: Sequence[nn.Module] = (),
        logits_of: LogitsOf = None,
        class_dim: int = -1,
    ) -> None:
        super().__init__()
        # In a plain dict, because nn.Module registers what is assigned to an attribute.
        self._parts: dict[str, Any] = {"encoder": encoder, "decoder": decoder, "labeler": labeler}
        self._parts |= {"labeler_transform": labeler_transform, "student_transform": student_transform}
        for name, part in self._parts.items():
            if not callable(part) and (part is not None or not name.endswith("transform")):
                raise ArgumentError(f"Teacher: {name} must be callable, got {type(part).__name__}")
        self._parts["prior"] = _checked_prior(prior)
        if max_batch is not None and (not isinstance(max_batch, int) or max_batch < 1):
            raise ArgumentError(f"Teacher: max_batch must be a positive integer or None, got {max_batch!r}")
        self.max_batch = max_batch
        self.logits_of = check_logits_of("Teacher", logits_of)
        self.class_dim = checked_class_dim("Teacher", class_dim)
        self._decoder_takes_relaxed = _has_parameter(decoder, "relaxed")
        self.decoder_takes_key = _has_parameter(decoder, "key")
        if not isinstance(modules, Iterable) or not all(isinstance(module, nn.Module) for module in modules):
            raise ArgumentError(f"Teacher: modules must be a list of torch.nn.Module, got {modules!r}")
        modules = tuple(modules)
        found = [module for part in self._parts.values() for module in modules_of(part)]
        unique = {id(module): module for module in [*found, *modules]}
        self._frozen: tuple[nn.Module, ...] = tuple(unique.values())
        self._given = tuple(modules)
        self._switched_off: set[int] = set()  # ids of parameters that needed a gradient
        self.training = False
        self._keep_frozen()

    def with_parts(self, **parts: Callable[..., Any]) -> Teacher:
        """Another teacher, of these parts (``encoder``, ``decoder``, ``labeler``) and otherwise of this one's."""
        given = {**self._parts, **parts}
        return Teacher(
            **given, max_batch=self.max_batch, modules=self._given, logits_of=self.logits_of, class_dim=self.class_dim
        )

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode, whatever ``mode`` says: a parent's ``train()`` ends here."""
        self._keep_frozen()
        return self

    def _keep_frozen(self) -> None:
        # At every call: a module may also hang in a parent that was put in train mode since the last one.
        for root in self._frozen:
            thawed = False
            for module in root.modules():  # one walk, as this is most of what a call of a small teacher costs
                thawed |= module.training
                for parameter in module._parameters.values():
                    if parameter is not None and parameter.requires_grad:
                        parameter.requires_grad_(False)
                        self._switched_off.add(id(parameter))
            if thawed:
                root.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self._frozen:
            module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def frozen_tensors(self) -> Iterator[Tensor]:
        """The parameters and buffers of every module behind the teacher, which is what others do not see."""
        for module in self._frozen:
            yield from module.parameters()
            yield from module.buffers()

    def frozen_by_it(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Of these parameters the teacher's own that were to be trained before it froze them."""
        self._keep_frozen()
        own = {id(tensor) for tensor in self.frozen_tensors()} & self._switched_off
        return [parameter for parameter in parameters if id(parameter) in own]

    @property
    def encoder(self) -> Callable[..., Any]:
        encoder: Callable[..., Any] = self._parts["encoder"]
        return encoder

    @property
    def decoder(self) -> Callable[..., Any]:
        decoder: Callable[..., Any] = self._parts["decoder"]
        return decoder

    @property
    def labeler(self) -> Callable[..., Any]:
        labeler: Callable[..., Any] = self._parts["labeler"]
        return labeler

    @property
    def labelers(self) -> tuple[Callable[..., Any], ...]:
        """All that label; no student is one of them."""
        return (self.labeler,)

    @property
    def labeler_transform(self) -> Callable[..., Any] | None:
        transform: Callable[..., Any] | None = self._parts["labeler_transform"]
        return transform

    @property
    def hidden_modules(self) -> tuple[nn.Module, ...]:
        """Those named by ``modules=`` that no part shows."""
        shown = {id(module_behind(part)) for part in self._parts.values()}
        return tuple(module for module in self._given if id(module) not in shown)

    @property
    def prior(self) -> Prior:
        prior: Prior = self._parts["prior"]
        return prior

    @property
    def device(self) -> torch.device | None:
        """The device of the teacher's first tensor; None for a teacher without modules."""
        return next((tensor.device for tensor in self.frozen_tensors()), None)

    def extra_repr(self) -> str:
        lines = [f"{name}={_name_of(part)}" for name, part in self._parts.items()]
        return ", ".join([*lines, f"max_batch={self.max_batch}"])

    def check_data(self, x: Inputs) -> None:
        """An error that says what to do where ``x`` cannot be data at all; of any teacher a tensor or a pytree can."""

    @torch.no_grad()
    def encode(self, x: Inputs) -> Latents:
        """``Enc(x)``: data, a pytree of B examples -> :class:`Latents` of B examples, without a graph.

        Raises:
            ShapeError, DTypeError: the encoder gave another number of examples, or no floating-point latents.
        """
        self.check_data(x)
        self._keep_frozen()
        with named_range("encode"):
            return tree.concat([self._encode(piece) for piece in tree.chunks(x, self.max_batch)])

    def _encode(self, x: Inputs) -> Latents:
        return _as_latents(latents_in(call(self.encoder, x)), tree.batch_size(x), "encoder")

    def decode(self, latents: Latents | Tensor, relaxed: bool = False, key: Key | None = None) -> Inputs:
        """``Dec(z)``, differentiable in z.

        Args:
            latents: B latents, or a bare tensor [B, ...].
            relaxed: ask a decoder of discrete data for an output through which gradients flow.
            key: for a decoder that draws random numbers, what they are keyed by, with B ids; a sampler passes its own.
                By default seed 0, ids 0..B-1, step 0.

        Returns:
            Data, a pytree of B examples.

        Raises:
            ShapeError: the decoder changed the batch size.
        """
        self._keep_frozen()
        if isinstance(latents, Tensor):
            latents = Latents(latents)
        if not self.decoder_takes_key:
            key = None
        elif key is None:
            key = Key(
                torch.tensor(0, device=latents.z.device), torch.arange(latents.z.shape[0], device=latents.z.device), 0
            )
        with named_range("decode"):
            pieces = tree.chunks((latents, key), self.max_batch)
            return self.join([self._decode(*piece, relaxed) for piece in pieces])

    def _decode(self, latents: Latents, key: Key | None, relaxed: bool) -> Inputs:
        options: dict[str, Any] = {"relaxed": relaxed} if self._decoder_takes_relaxed else {}
        if self.decoder_takes_key:
            options["key"] = key
        x = data_in(self.decoder(latents.z if latents.mask is None else latents, **options))
        _same_batch("decoder", latents.z.shape[0], tree.batch_size(x, "decoder's output"))
        return x

    def join(self, pieces: Sequence[Inputs]) -> Inputs:
        """Batches of data one after the other. A teacher whose examples differ in length pads them here.

        Raises:
            ShapeError: the pieces differ in structure or in the shape of an example.
        """
        return tree.concat(pieces)

    def label(self, x: Inputs) -> Tensor:
        """``h(labeler_transform(x))``, logits [B, ..., C], also where ``class_dim`` is another; differentiable in x.

        There is no graph where x needs none.

        Raises:
            ShapeError, DTypeError: the labeler changed the batch size, or gave no floating-point logits.
        """
        self.check_data(x)
        self._keep_frozen()
        with named_range("label"), torch.set_grad_enabled(torch.is_grad_enabled() and tree.requires_grad(x)):
            return tree.concat([self._label(piece) for piece in tree.chunks(x, self.max_batch)])

    def opinions(self, x: Inputs) -> tuple[Opinion, ...]:
        """The distributions that soft terms are taken of: here one, :meth:`label`."""
        return (Opinion(self.label(x), None),)

    def _label(self, x: Inputs) -> Tensor:
        transform = self._parts["labeler_transform"]
        made = call(self.labeler, x if transform is None else transform(x))
        logits = logits_in("labeler", made, self.logits_of, self.class_dim)
        return checked_logits(logits, tree.batch_size(x), "labeler")

    forward = label

    def student_view(self, x: Inputs) -> Inputs:
        """``student_transform(x)``: the data as the student expects it; x itself without a transform."""
        transform = self._parts["student_transform"]
        if transform is None:
            return x
        self.check_data(x)
        self._keep_frozen()
        view = transform(x)
        _same_batch("student_transform", tree.batch_size(x), tree.batch_size(view, "student_transform's output"))
        return view

    def from_prior(self, noise: Latents) -> Latents:
        """Latents of the generator's prior from standard normal noise of their shape.

        Raises:
            ArgumentError: the teacher was built without a prior.
        """
        if self.prior is None:
            raise ArgumentError(
                'this teacher has no prior: build it with Teacher(..., prior="normal"), a shape or a callable'
            )
        if not callable(self.prior):
            return noise
        self._keep_frozen()
        made = self.prior(noise.z)
        made = made if isinstance(made, Latents) else Latents(made, noise.mask)
        return made.check(noise.z.shape[0], "prior")


def module_behind(part: Any) -> nn.Module | None:
    """The module that a callable is, or is a method or ``functools.partial`` of; None where none is seen."""
    while isinstance(part, functools.partial):
        part = part.func
    if isinstance(part, nn.Module):
        return part
    owner = getattr(part, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def checked_logits(logits: Any, batch: int, who: str) -> Tensor:
    """The logits, if they are a floating-point tensor [batch, ..., C]."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise DTypeError(f"{who}: expected a floating-point tensor of logits, got {found}")
    if logits.ndim < 2:
        raise ShapeError(f"{who}: logits must be [batch, ..., classes], got {tuple(logits.shape)}")
    _same_batch(who, batch, logits.shape[0])
    return logits


def _same_batch(who: str, given: int, made: int) -> None:
    if given != made:
        raise ShapeError(f"{who} changed the batch size: it was given {given} examples and returned {made}")


def _as_latents(made: Any, batch: int, who: str) -> Latents:
    if isinstance(made, Tensor):
        made = Latents(made)
    if not isinstance(made, Latents):
        raise DTypeError(
            f"{who}: expected a tensor or Latents, got {type(made).__name__}; "
            "wrap it to return the latent itself (of a VAE: the mean)"
        )
    return made.check(batch, who)


def _checked_prior(prior: Any) -> Prior:
    if prior is None or prior == "normal" or callable(prior):
        return cast("Prior", prior)
    if isinstance(prior, (tuple, list)) and prior and all(isinstance(n, int) and n > 0 for n in prior):
        return tuple(prior)
    raise ArgumentError(f'Teacher: prior must be None, "normal", a shape or a callable, got {prior!r}')


def _has_parameter(part: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(part.forward if isinstance(part, nn.Module) else part).parameters
    except (TypeError, ValueError):  # a built-in without a signature
        return False


def _name_of(part: Any) -> str:
    if part is None or isinstance(part, (str, tuple)):
        return repr(part)
    return getattr(part, "__qualname__", type(part).__name__)
