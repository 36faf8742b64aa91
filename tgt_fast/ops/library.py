"""The ops as PyTorch's dispatcher knows them, in the namespace ``torch.ops.tgt_fast``.

A public function has two paths to the same kernels. The eager path calls them from Python, which costs the least. The
dispatcher path serves whoever must see an op in order to work: ``torch.compile``, ``torch.export``, fake tensors,
dispatch and function modes. Both paths give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._functorch.utils import enable_single_level_autograd_function
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.errors import BackendError
from tgt_fast.kernels.plain import PLAIN
from tgt_fast.ops._checks import all_readable

LIBRARY: Final = torch.library.Library("tgt_fast", "DEF")
DIVISOR: Final = "Tensor? divisor, float? divisor_number"  # of a mean, on the device or as a number
NAMES: Final[list[str]] = []  # of the registered ops, in the order of their definition

# Held here, for the question below is put at every call.
_transformed = torch._C._are_functorch_transforms_active
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_TRACED: Final = (FakeTensor, FunctionalTensor)
_AUTOCAST: Final = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)


def seen_by_dispatcher(*tensors: Any) -> bool:
    """True if a call must go through the dispatcher: it is traced, fake, or watched by a mode.

    Arguments that are no tensors do not count. Other subclasses of Tensor go to the reference, which is made of
    PyTorch's own ops: what those do with them is right.
    """
    if torch.compiler.is_compiling():
        return True
    if _transformed():
        return False  # no compiled kernel serves them: the reference does, in plain PyTorch
    if _dispatch_modes() or _function_modes():
        return all(type(t) in PLAIN or isinstance(t, _TRACED) for t in tensors if isinstance(t, Tensor))
    for tensor in tensors:  # a loop costs a third of any(), and this runs at every call
        if tensor is None or type(tensor) in PLAIN:
            continue
        if isinstance(tensor, _TRACED):  # which is slow to say no
            return True
    return False


def split(value: float | Tensor | None, number: float | None = None) -> tuple[Tensor | None, Any]:
    """An argument that may be a tensor or a number, as the two of a schema; ``number`` stands beside a tensor."""
    return (value, number) if isinstance(value, Tensor) else (None, value)


def schema_of(fields: type, prefix: str = "") -> str:
    """The fields of a NamedTuple as arguments of a schema, so that ``*call`` passes them; a tuple holds floats."""
    kinds = {str: "str", float: "float", int: "int", bool: "bool", Tensor: "Tensor", tuple: "float[]"}
    arguments = []
    for name, hint in get_type_hints(fields).items():
        options = [get_origin(option) or option for option in get_args(hint) or (hint,)]
        kind = kinds[next(option for option in options if option in kinds)]
        arguments.append(f"{kind}{'?' if type(None) in options else ''} {prefix}{name}")
    return ", ".join(arguments)


def or_nothing(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An op returns tensors, all of them: one of no elements stands for none."""
    return like.new_empty(0) if tensor is None else tensor


def dispatched(op: Any, *arguments: Any) -> Any:
    """An op as the autograd of another one calls it: seen by a tracer, and without a graph of its own."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def graph_wanted(*tensors: Tensor | None) -> bool:
    """True if a result of these is to be differentiated."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """save_for_backward, which refuses what was made in inference mode, such as a teacher's logits: that is held."""
    ctx.held = tuple(tensor if tensor is not None and tensor.is_inference() else None for tensor in tensors)
    ctx.save_for_backward(*(None if h is not None else t for t, h in zip(tensors, ctx.held, strict=True)))


def saved(ctx: Any) -> tuple[Any, ...]:
    """The values that :func:`save` was given."""
    return tuple(t if h is None else h for t, h in zip(ctx.saved_tensors, ctx.held, strict=True))


def once(refusal: str, grads: Iterable[Tensor | None], inputs: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients that cannot be differentiated again in the inputs: whoever tries is told why not."""
    given = [tensor for tensor in inputs if tensor is not None]
    return tuple(None if grad is None else apply(_Once, grad, refusal, *given) for grad in grads)


class _Once(torch.autograd.Function):
    """Passes a gradient on."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, refusal: str, *inputs: Tensor) -> Tensor:
        ctx.refusal = refusal
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.refusal)


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
