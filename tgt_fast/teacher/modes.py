"""Train and eval mode, submodule by submodule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule's own train/eval flag is what it was."""
    flags = [(child, child.training) for module in modules for child in module.modules()]
    try:
        try:
            for child, _ in flags:
                child.training = False  # not eval(): an adapter may merge weights, which flags alone would not undo
            yield
        finally:
            _put_back(flags)
    except BaseException:  # perhaps an interruption of _put_back()
        _put_back(flags)
        raise


def _put_back(flags: list[tuple[nn.Module, bool]]) -> None:
    for child, training in reversed(flags):  # one that was met twice is as at first
        child.training = training
