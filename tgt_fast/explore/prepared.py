"""A frozen teacher as it runs fastest: copies of its parts, BatchNorms folded and channels last, where that pays."""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from tgt_fast.teacher import Latents, Teacher

_LOG = logging.getLogger("tgt_fast")
_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS: Final = (nn.Conv2d, nn.ConvTranspose2d)
_LAYERS: Final = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_RUNS: Final = 3  # of each form, of which the fastest counts
_CLOSE: Final = 1e-3  # of the output's norm: beyond it a form computes something else
_PAYS: Final = 0.98  # of the time as it was


class Prepared:
    """The teacher that a compiled exploration runs; the user's modules are only read."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] = ()
        self._made: Teacher | None = None
        self.report: list[str] = []  # what was done, a line a part

    @torch.inference_mode(False)
    def __call__(self, teacher: Teacher, latents: Latents) -> Teacher:
        """For this teacher, measured on these latents; made anew where its weights have changed."""
        state = (teacher, *((tensor, tensor._version) for tensor in teacher.frozen_tensors()))
        if self._made is None or not _unchanged(self._of, state):
            self._of, self._made = state, self._prepare(teacher, latents)
        return self._made

    def _prepare(self, teacher: Teacher, latents: Latents) -> Teacher:
        self.report = []
        if type(teacher) is not Teacher:
            self.report.append(f"teacher: a {type(teacher).__name__} has parts of its own, which run as they are")
            return teacher
        z = latents.z.detach().clone()
        made = teacher.with_parts(decoder=self._part("decoder", teacher, z if latents.mask is None else None))
        try:
            with torch.no_grad():
                x: Any = teacher.decode(Latents(z)) if latents.mask is None else None
        except Exception:
            x = None
        transform = teacher.labeler_transform
        view = x if transform is None or x is None else transform(x)
        return made.with_parts(labeler=self._part("labeler", teacher, view))

    def _part(self, name: str, teacher: Teacher, given: Any) -> Any:
        """The fastest form of a part, as given to it, and a line that says which."""
        part = getattr(teacher, name)
        if not isinstance(part, nn.Module) or not isinstance(given, Tensor):
            self.report.append(f"{name}: as it is; it is no module, or takes more than a tensor")
            return part
        forms: dict[str, Callable[..., Any]] = {"as it is": part}
        done: list[str] = []
        try:
            copied, count = _folded(part)
            if count:
                done.append(f"{count} BatchNorms folded")
                forms[done[0]] = copied
        except Exception as error:  # a model that fx cannot follow
            copied = part
            self.report.append(f"{name}: BatchNorms stay, fx cannot follow it: {_brief(error)}")
        if any(isinstance(module, _CONVOLUTIONS) for module in part.modules()):
            try:
                last = copy.deepcopy(copied).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                forms[", ".join([*done, "channels last"])] = last
            except Exception as error:  # a model that cannot be copied
                self.report.append(f"{name}: no copy in channels last: {_brief(error)}")
        if len(forms) == 1:
            self.report.append(f"{name}: as it is")
            return part
        times = _measured(forms, given)
        best = min(times, key=times.__getitem__)
        if times[best] > _PAYS * times["as it is"]:
            best = "as it is"
        others = ", ".join(f"{form} {value * 1e3:.3g} ms" for form, value in times.items() if form != best)
        self.report.append(f"{name}: {best}, {times[best] * 1e3:.3g} ms on the first batch ({others})")
        _LOG.info("LatentSampler: %s", self.report[-1])
        return forms[best]


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]


def _unchanged(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    if len(before) != len(now) or before[0] is not now[0]:
        return False
    return all(a[0] is b[0] and a[1] == b[1] for a, b in zip(before[1:], now[1:], strict=True))


def _folded(part: nn.Module) -> tuple[nn.Module, int]:
    """A copy in whose layers the BatchNorms behind them are folded, and how many those are."""
    if not any(isinstance(module, _NORMS) for module in part.modules()):
        return part, 0
    made = torch.fx.symbolic_trace(copy.deepcopy(part).eval())
    modules, count = dict(made.named_modules()), 0
    calls = [node for node in made.graph.nodes if node.op == "call_module"]
    uses = Counter(node.target for node in calls)
    for node in calls:
        norm = modules[str(node.target)]
        before: Any = node.args[0] if node.args else None
        if not isinstance(norm, _NORMS) or norm.running_mean is None or before not in calls or len(before.users) > 1:
            continue
        layer: Any = modules[str(before.target)]
        turned = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        if (
            not isinstance(layer, _LAYERS)
            or uses[node.target] + uses[before.target] > 2
            or (turned and getattr(layer, "groups", 1) != 1)
        ):
            continue
        if isinstance(layer, nn.Linear):
            folded: nn.Module = fuse_linear_bn_eval(layer, norm)
        else:
            folded = fuse_conv_bn_eval(layer, norm, turned)
        made.set_submodule(str(before.target), folded)
        modules[str(before.target)] = folded
        node.replace_all_uses_with(before)
        made.graph.erase_node(node)
        count += 1
    made.delete_all_unused_submodules()
    made.recompile()
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made, count


def _measured(forms: dict[str, Callable[..., Any]], given: Tensor) -> dict[str, float]:
    """Seconds of each form that computes what the first one does."""
    found: dict[str, float] = {}
    with torch.no_grad():
        expected = next(iter(forms.values()))(given)
        for name, form in forms.items():
            try:
                made = form(given)
                close = isinstance(made, Tensor) and isinstance(expected, Tensor)
                close = close and bool((made - expected).norm() <= _CLOSE * expected.norm())
            except Exception:  # what a copy cannot do
                close = False
            if close or name == "as it is":
                found[name] = min(_seconds(form, given) for _ in range(_RUNS))
    return found


def _seconds(form: Callable[..., Any], given: Tensor) -> float:
    if given.is_cuda:
        torch.cuda.synchronize(given.device)
    start = time.perf_counter()
    form(given)
    if given.is_cuda:
        torch.cuda.synchronize(given.device)
    return time.perf_counter() - start
