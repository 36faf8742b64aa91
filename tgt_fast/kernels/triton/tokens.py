"""The soft embedding in Triton: how a call is cut, and how its parts are put together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels.options import OP_GUMBEL, SoftOptions, SoftState
from tgt_fast.kernels.tokens_table import given_back, taken
from tgt_fast.kernels.triton import kernels, launch, planning_device, running_on
from tgt_fast.kernels.triton.latent import noise_key
from tgt_fast.kernels.triton.tuning import SOFT_REGISTERS, SoftPlan, slope_width, soft_plan


class _Call:
    """The arguments that every kernel of a call takes."""

    def __init__(
        self, logits: Tensor, table: Tensor, options: SoftOptions, plan: SoftPlan | None, seed: int | Tensor,
        sample_ids: Tensor, step: int | Tensor, replica: int,
    ) -> None:  # fmt: skip
        self.logits, self.table = logits.detach(), table.detach()
        if self.table.stride(1) != 1:
            self.table = self.table.contiguous()
        self.count, self.classes = logits.shape
        self.width = table.shape[1]
        self.positions = max(1, self.count // max(1, sample_ids.shape[0]))
        self.inverse_tau = 1.0 / options.tau
        self.key = noise_key(logits.device, seed, sample_ids, step, replica, OP_GUMBEL)
        self.plan = plan or soft_plan(self.count, self.classes, self.width, table.dtype, planning_device(logits))
        self._constants: dict[str, Any] = {
            "GUMBEL": options.gumbel,
            # Three products of tensor cores give float32 its digits; where there are none, or none of that kind, one.
            "PRECISION": "ieee" if kernels().interpreted or torch.version.hip else "tf32x3",
            "ROWS": self.plan.rows, "CLASSES": self.plan.classes, "WIDTH": self.plan.width,
        }  # fmt: skip

    def tiles(self, count: int, size: int) -> int:
        return -(-count // size)

    def run(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        with running_on(self.logits):
            launch(
                kernel, programs, *arguments, self.inverse_tau, *self.key, **{**self._constants, **constants},
                warps=self.plan.warps, registers=SOFT_REGISTERS,
            )  # fmt: skip

    def forward(self, hard: bool) -> tuple[Tensor | None, SoftState]:
        """(the soft embedding in float32 or None, the state): the splits' parts, merged in their order."""
        splits, new = self.plan.splits, self.logits.new_empty
        sums = None if hard else new((splits, self.count, self.width), dtype=torch.float32)
        largest, total = new((2, splits, self.count), dtype=torch.float32)
        places = new((splits if hard else 0, self.count), dtype=torch.int64)
        if self.count:
            widths = 1 if hard else max(1, self.tiles(self.width, self.plan.width))
            self.run(
                kernels().tokens.soft_fwd_kernel, self.tiles(self.count, self.plan.rows) * splits * widths,
                self.logits, self.table, sums, largest, total, places if hard else None, self.count, self.classes,
                self.width, self.logits.stride(0), self.table.stride(0), self.positions, splits, HARD=hard,
            )  # fmt: skip
        peak = largest.amax(0)  # NaN where a part is
        peak = peak.masked_fill(peak == -math.inf, math.nan)
        share = ((largest - peak) * self.inverse_tau).exp()
        state = torch.stack([peak, (total * share).sum(0)])
        if sums is not None:
            out = (sums * share[..., None]).sum(0) / state[1][:, None]
            return out, SoftState(state, places.new_empty(0))
        first = (largest == peak).int().argmax(0, keepdim=True)
        return None, SoftState(state, places.gather(0, first)[0].masked_fill(peak.isnan(), -1))

    @property
    def slope_cut(self) -> dict[str, int]:
        """The cut of both kernels of the slopes: differently cut, they would differ in their last bits."""
        return {"WIDTH": slope_width(self.plan, self.table.dtype)}

    def slopes(self, upstream: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(centre [N], mean [N]): the slope d_out . table at a row's largest logit, and the mean of the slopes less it,
        under the row's probabilities; the splits' parts, merged in float64."""
        splits = self.plan.splits
        parts = self.logits.new_empty((4, splits, self.count), dtype=torch.float32)
        self.run(
            kernels().tokens.soft_mean_kernel, self.tiles(self.count, self.plan.rows) * splits, self.logits, self.table,
            upstream, *rows, *parts, self.count, self.classes, self.width, self.logits.stride(0), self.table.stride(0),
            self.positions, splits, **self.slope_cut,
        )  # fmt: skip
        highest, centres, means, shares = parts
        centre = centres.gather(0, highest.argmax(0, keepdim=True))
        moved = means.double() + shares.double() * (centres.double() - centre.double())
        return centre[0], moved.sum(0).float()


def soft_forward(
    logits: Tensor,  # [N, V]
    table: Tensor,  # [V, D]
    options: SoftOptions,
    *,
    keep: bool = False,
    plan: SoftPlan | None = None,
    **key: Any,
) -> tuple[Tensor, SoftState | None]:
    """softmax((logits + noise) / tau) @ table; with ``keep`` what backward needs."""
    out, state = _Call(logits, table, options, plan, **key).forward(options.hard)
    made = taken(table, state.chosen) if out is None else out.to(table.dtype)
    return made, state if keep else None


def soft_backward(
    logits: Tensor,
    table: Tensor,
    state: SoftState,
    d_out: Tensor,  # [N, D]
    options: SoftOptions,
    *,
    wanted: tuple[bool, bool],
    plan: SoftPlan | None = None,
    **key: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to logits and table, from probabilities made anew."""
    call = _Call(logits, table, options, plan, **key)
    upstream = d_out.detach().to(table.dtype).contiguous()
    largest, total = state.rows
    d_logits = d_table = None
    if wanted[0]:
        d_logits = logits.new_empty(logits.shape)
        if d_logits.numel():
            centre, mean = call.slopes(upstream, state.rows)
            call.run(
                kernels().tokens.soft_bwd_logits_kernel,
                call.tiles(call.count, call.plan.rows) * call.tiles(call.classes, call.plan.classes), call.logits,
                call.table, upstream, largest, total, centre, mean, d_logits, call.count, call.classes, call.width,
                call.logits.stride(0), call.table.stride(0), call.positions, **call.slope_cut,
            )  # fmt: skip
    if wanted[1] and options.hard:
        d_table = given_back(table, state.chosen, d_out)
    elif wanted[1]:
        d_table = table.new_zeros(table.shape) if not call.count else table.new_empty(table.shape)
        if d_table.numel() and call.count:
            call.run(
                kernels().tokens.soft_bwd_table_kernel,
                call.tiles(call.classes, call.plan.classes) * call.tiles(call.width, call.plan.width), call.logits,
                upstream, largest, total, d_table, call.count, call.classes, call.width, call.logits.stride(0),
                call.positions,
            )  # fmt: skip
    return d_logits, d_table
