"""The ops as PyTorch's dispatcher knows them, in the namespace ``torch.ops.tgt_fast``.

A public function has two doors to the same kernels. The direct one calls them from Python, which costs the least. The
dispatcher's serves whoever must see an op in order to work: ``torch.compile``, ``torch.export``, fake tensors, dispatch
and function modes. Both doors give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._functorch.utils import enable_single_level_autograd_function
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.errors import BackendError
from tgt_fast.kernels.plain import PLAIN
from tgt_fast.ops._readable import all_readable

LIBRARY: Final = torch.library.Library("tgt_fast", "DEF")
NAMES: Final[list[str]] = []  # of the registered ops, in the order of their definition

_TRACED: Final = (FakeTensor, FunctionalTensor)
_AUTOCAST: Final = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)


def seen_by_dispatcher(*tensors: Any) -> bool:
    """Whether a call must go through the dispatcher: it is traced, fake, or watched by a mode.

    Arguments that are no tensors do not count. Other subclasses of Tensor go to the reference, which is made of
    PyTorch's own ops: what those do with them is right.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._are_functorch_transforms_active():
        return False  # no compiled kernel serves them: the reference does, in plain PyTorch
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return all(type(t) in PLAIN or isinstance(t, _TRACED) for t in tensors if isinstance(t, Tensor))
    for tensor in tensors:  # noqa: SIM110, a loop costs a third of any(), and this runs at every call
        if type(tensor) not in PLAIN and isinstance(tensor, _TRACED):  # which is slow to say no
            return True
    return False


def split(value: float | Tensor | None, number: float | None = None) -> tuple[Tensor | None, Any]:
    """An argument that may be a tensor or a number, as the two of a schema; ``number`` stands beside a tensor."""
    return (value, number) if isinstance(value, Tensor) else (None, value)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, also for an op inside ``torch.func.grad``: as one level of it, like PyTorch's own ops."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def without_autocast() -> Any:
    """A context in which PyTorch's own ops keep their arguments' precision too."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
    differentiable: int = 0,
) -> Any:
    """Registers an op and returns it.

    Args:
        schema: ``name(arguments) -> results``; see ``torch.library``.
        kernel: what it does to tensors with data, on a CPU or a CUDA device.
        fake: empty results with the kernel's shapes, strides, dtypes and devices.
        autograd: what it does where a graph is wanted; elsewhere, and without it, the results ask for no gradients.
        differentiable: how many arguments, the first ones, can want a graph.

    Autocast rule: arguments are taken in the precision they come in, for every kernel computes in float32 or wider, and
    autocast is off inside, also for what the kernel asks of PyTorch.
    """
    name = schema[: schema.index("(")]
    assert (autograd is None) == (differentiable == 0), (
        f"{name} says how it is differentiated, or in what, but not both"
    )
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"tgt_fast::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.tgt_fast, name).default
    names = [argument.name for argument in op._schema.arguments]

    def with_memory(*arguments: Any) -> Any:
        all_readable(name, **dict(zip(names, arguments, strict=False)))
        return kernel(*arguments)

    def without_graph(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    def with_graph(*arguments: Any) -> Any:
        if autograd is not None and torch.is_grad_enabled():
            for argument in arguments[:differentiable]:
                if isinstance(argument, Tensor) and argument.requires_grad:
                    return autograd(*arguments)
        return without_graph(*arguments)

    def under_autocast(*arguments: Any) -> Any:
        with without_autocast():
            return op(*arguments)

    def under_vmap(*_: Any) -> Any:
        raise BackendError(f"{name}: no compiled kernel runs under vmap; backend='reference' does")

    LIBRARY.impl(name, one_thread_in_forks(with_memory), "CPU")
    LIBRARY.impl(name, with_memory, "CUDA")
    LIBRARY.impl(name, without_graph if autograd is None else with_graph, "Autograd")
    torch.library.register_vmap(f"tgt_fast::{name}", under_vmap, lib=LIBRARY)
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl(name, under_autocast, key)
    NAMES.append(name)
    return op
