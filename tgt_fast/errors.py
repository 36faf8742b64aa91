"""Typed errors. Each also derives from the built-in that PyTorch users already catch."""

from __future__ import annotations


class TgtError(Exception):
    """Base of every error that tgt_fast raises on purpose."""


class ShapeError(TgtError, ValueError):
    """Tensors whose shapes do not fit together."""


class DTypeError(TgtError, TypeError):
    """A tensor of a dtype that the operation does not take."""


class DeviceError(TgtError, ValueError):
    """Tensors on different devices, or on one that the operation does not serve."""


class ArgumentError(TgtError, ValueError):
    """An option outside its range, or options that contradict each other."""


class BackendError(TgtError, RuntimeError):
    """A backend that was asked for by name cannot run this call; the message says why and what to do."""


class CheckpointError(TgtError, RuntimeError):
    """A checkpoint that is corrupt, incomplete or of another program."""


class ProcessError(TgtError, RuntimeError):
    """Another process of a distributed run failed; the message says which, and how."""


class CacheError(TgtError, RuntimeError):
    """A teacher cache that cannot be opened, written or read."""


class StaleCacheError(CacheError):
    """A teacher cache of another teacher, or of other settings; the message says what differs."""


class UnknownIdError(TgtError, KeyError):
    """Sample ids that a teacher cache does not hold."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class DependencyError(TgtError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""
