"""Whose outputs, and under which settings: what makes stored rows usable, or stale."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from tgt_fast.cache.arguments import as_transforms, flag
from tgt_fast.cache.identity import Identity
from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.options import TAILS, TEMPERATURES
from tgt_fast.ops import _checks
from tgt_fast.teacher import Teacher
from tgt_fast.teacher.returned import LogitsOf, check_logits_of

DTYPES: Final = ("float64", "float32", "bfloat16", "float16")
_SHOWN: Final = 3  # names in a message
_warned: set[tuple[str, ...]] = set()
_HASHES: Final = ("weights", "code")


class Fingerprint(str):
    """A SHA-256 in hexadecimal, which is what it compares as.

    Attributes:
        parts: what it was taken of, by name: ``weights`` and ``code`` (hashes, or None), ``version``, and the settings
            ``k``, ``temperature``, ``tail``, ``latents`` and ``dtype``.
        unseen: what the hashes could not look into.
    """

    parts: Mapping[str, Any]
    unseen: tuple[str, ...]

    def __new__(cls, parts: Mapping[str, Any], unseen: Sequence[str] = ()) -> Fingerprint:
        text = json.dumps(dict(parts), sort_keys=True)
        made = super().__new__(cls, hashlib.sha256(text.encode()).hexdigest())
        made.parts, made.unseen = dict(parts), tuple(unseen)
        return made

    def __reduce__(self) -> Any:
        return Fingerprint, (self.parts, self.unseen)


def teacher_fingerprint(
    teacher: Callable[..., Any] | None = None,
    *,
    k: int | None = 64,
    temperature: float = 2.0,
    tail: str = "bucket",
    latents: bool = False,
    dtype: torch.dtype | None = None,
    transforms: Sequence[Callable[..., Any]] = (),
    version: str | None = None,
    logits_of: LogitsOf = None,
) -> Fingerprint:
    """SHA-256 over a teacher's weights and code and over the settings under which its outputs are stored.

    Seen: parameters and buffers (names, dtypes, shapes, bytes), packed and scripted ones as well; the attributes,
    public and private, of every module and object that can be found, such as numbers, strings, tensors, containers,
    callables and modules in them; the structure of the modules; the qualified name and source of functions, of
    ``forward`` of modules and of the transforms, with their closures, default values, attributes and the globals that
    they name; of the user's classes and modules the methods and constants that these name. PyTorch and the standard
    library are taken by name, and so is what an installed package keeps for itself, such as a registry (but for
    functions of the user's in it).

    **Not seen**: hooks, locks, loggers, devices, random generators but for the seed of PyTorch's, properties that are
    kept once they were computed, and the caches of installed packages; methods that are called on other objects; what
    the loader does to the data, unless it is given as ``transforms``; versions of PyTorch and of the driver; weights
    that change after the fingerprint was taken. Objects that hide their state (compiled code, an open connection) are
    listed in ``.unseen``, and so is a ``*_cache`` of the user's that is not empty. Say all those by ``version``. Give
    one also for a teacher whose attributes change as it runs, as a counter's do: it would be another teacher each time.

    Args:
        teacher: a :class:`~tgt_fast.Teacher` (of which only what the outputs depend on is taken: the labeler, its
            transform, ``modules=``, with ``latents`` the encoder, and what a subclass of yours adds), a module or a
            callable.
        k: how many classes a record lists; None: logits are stored. Then ``temperature`` and ``tail`` do not matter.
        temperature, tail: of the records; see :func:`tgt_fast.topk_teacher`.
        latents: whether the encoder's latents are stored as well.
        dtype: that logits, or log-probabilities, are rounded to; None: not rounded.
        transforms: what data goes through before it reaches the teacher.
        version: a name for all code, in the place of sources; the weights are still looked at. Without a teacher it is
            the name of everything.
        logits_of: where the logits are in what a module or callable returns; see :class:`~tgt_fast.TeacherCache`.

    Returns:
        A :class:`Fingerprint`, a string. Equal on every machine and in every process; where a function has no source,
        or is one of several lambdas on a line, with the same version of Python.

    Raises:
        ArgumentError: neither a teacher nor a version; a setting out of its range.
        DTypeError: a teacher of which this process holds a part (DTensors, FSDP) or no numbers (the meta device, freed
            storage).

    >>> import torch, tgt_fast as tgt
    >>> teacher = torch.nn.Linear(3, 5)
    >>> before = tgt.teacher_fingerprint(teacher, k=2)
    >>> with torch.no_grad():
    ...     _ = teacher.bias.add_(1)
    >>> before == tgt.teacher_fingerprint(teacher, k=2), before.unseen
    (False, ())
    """
    op = "teacher_fingerprint"
    if teacher is None and version is None:
        raise ArgumentError(f"{op}: whose outputs? Give the teacher, or a version= that names it")
    if teacher is not None and not callable(teacher):
        raise ArgumentError(f"{op}: a teacher must be callable, got {type(teacher).__name__}")
    if version is not None and not isinstance(version, str):
        raise ArgumentError(f"{op}: version must be a string, got {version!r}")
    check_logits_of(op, logits_of)
    if logits_of is not None and (teacher is None or isinstance(teacher, Teacher)):
        raise ArgumentError(f"{op}: logits_of is of a module or callable; a Teacher has its own, Teacher(logits_of=)")
    parts = checked_settings(op, k=k, temperature=temperature, tail=tail, latents=latents, dtype=dtype)
    identity = Identity(latents=latents)
    if teacher is not None:
        identity.add("teacher", teacher)
    if logits_of is not None:
        identity.add("logits_of", logits_of)
    identity.add("transforms", as_transforms(op, transforms))
    parts["weights"] = identity.weights
    parts["code"] = identity.code if version is None else None
    parts["version"] = version
    return Fingerprint(parts, identity.unseen if version is None else ())


def warn_of_unseen(fingerprint: Fingerprint) -> None:
    """In a line, and once a process for the same things."""
    unseen = tuple(dict.fromkeys(fingerprint.unseen))
    if not unseen or unseen in _warned:
        return
    _warned.add(unseen)
    more = f" and {len(unseen) - _SHOWN} more" if len(unseen) > _SHOWN else ""
    warnings.warn(
        f"TeacherCache: the fingerprint cannot look into {', '.join(unseen[:_SHOWN])}{more}; name the state of the "
        "teacher and its transforms by version=, and change it when they change",
        stacklevel=3,
    )


def checked_settings(
    op: str, *, k: int | None, temperature: float, tail: str, latents: bool, dtype: torch.dtype | None
) -> dict[str, Any]:
    """The settings as JSON, without those that do not matter."""
    if k is not None:
        k = _checks.integer(op, "k", k, 1, 2**31)
    temperature = _checks.number(op, "temperature", temperature, *TEMPERATURES)
    tail = _checks.choice(op, "tail", tail, TAILS)
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in DTYPES:
        raise ArgumentError(f"{op}: dtype must be None or one of {', '.join(DTYPES)}, got {dtype}")
    return {
        "k": k,
        "temperature": None if k is None else temperature,
        "tail": None if k is None else tail,
        "latents": flag(op, "latents", latents),
        "dtype": name,
    }


def differences(stored: Fingerprint, given: Fingerprint) -> str:
    """In words, the parts that differ."""
    found = []
    for name in sorted({*stored.parts, *given.parts}):
        one, two = stored.parts.get(name), given.parts.get(name)
        if one != two:
            if name.endswith(_HASHES):
                one, two = (f"{x[:12]}..." if isinstance(x, str) else "none" for x in (one, two))
            found.append(f"{name} (stored {one}, given {two})")
    return "they differ in " + ", ".join(found)
