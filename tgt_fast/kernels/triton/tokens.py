"""The soft embedding in Triton: how a call is cut, and how its parts are put together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels.tokens_calls import (
    Gradients,
    Outputs,
    SoftCall,
    SoftState,
    give_back,
    positions_of,
    state_of,
    take,
)
from tgt_fast.kernels.triton import kernels, launch, planning_device, running_on
from tgt_fast.kernels.triton.latent import noise_values
from tgt_fast.kernels.triton.tuning import SOFT_REGISTERS, SoftPlan, slope_width, soft_plan


class _Call:
    """The arguments that every kernel of a call takes."""

    def __init__(self, call: SoftCall, plan: SoftPlan | None) -> None:
        self.logits, self.table = call.logits.detach(), call.table.detach()
        if self.table.stride(1) != 1:
            self.table = self.table.contiguous()
        self.count, self.classes = self.logits.shape
        self.width = self.table.shape[1]
        self.positions = positions_of(call)
        self.noise = call.options.gumbel
        self.inverse_tau = 1.0 / call.options.tau
        self.key = noise_values(self.logits.device, call.noise)
        shape = (self.count, self.classes, self.width)
        self.plan = plan or soft_plan(*shape, self.table.dtype, planning_device(self.logits))
        self._constants: dict[str, Any] = {
            "GUMBEL": self.noise,
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

    def forward(self, hard: bool, out: Tensor, state: SoftState) -> None:
        """The embeddings and the state: the splits' parts, merged in their order."""
        splits, new, plan = self.plan.splits, self.logits.new_empty, self.plan.forward(self.noise)
        sums = None if hard else new((splits, self.count, self.width), dtype=torch.float32)
        largest, total = new((2, splits, self.count), dtype=torch.float32)
        places = new((splits if hard else 0, self.count), dtype=torch.int64)
        if self.count:
            widths = 1 if hard else max(1, self.tiles(self.width, plan.width))
            self.run(
                kernels().tokens.soft_fwd_kernel, self.tiles(self.count, plan.rows) * splits * widths,
                self.logits, self.table, sums, largest, total, places if hard else None, self.count, self.classes,
                self.width, self.logits.stride(0), self.table.stride(0), self.positions, splits, HARD=hard,
                ROWS=plan.rows, CLASSES=plan.classes, WIDTH=plan.width,
            )  # fmt: skip
        peak = largest.amax(0)  # NaN where a part is
        peak = peak.masked_fill(peak == -math.inf, math.nan)
        share = ((largest - peak) * self.inverse_tau).exp()
        torch.stack([peak, (total * share).sum(0)], out=state.rows)
        if sums is not None:
            out.copy_((sums * share[..., None]).sum(0) / state.rows[1][:, None])
            return
        first = (largest == peak).int().argmax(0, keepdim=True)
        state.chosen.copy_(places.gather(0, first)[0].masked_fill_(peak.isnan(), -1))
        take(self.table, state.chosen, out)

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


def forward(call: SoftCall, out: Outputs, *, plan: SoftPlan | None = None) -> None:
    """softmax((logits + noise) / tau) @ table, and what backward needs where it is wanted."""
    _Call(call, plan).forward(call.options.hard, out.out, out.state or state_of(call))


def backward(
    call: SoftCall, state: SoftState, d_out: Tensor, grads: Gradients, *, plan: SoftPlan | None = None
) -> None:
    """The gradients to logits and table, from probabilities made anew."""
    job = _Call(call, plan)
    d_logits, d_table = grads
    upstream = d_out.detach().to(call.table.dtype).contiguous()
    largest, total = state.rows
    if d_logits is not None and d_logits.numel():
        centre, mean = job.slopes(upstream, state.rows)
        job.run(
            kernels().tokens.soft_bwd_logits_kernel,
            job.tiles(job.count, job.plan.rows) * job.tiles(job.classes, job.plan.classes), job.logits, job.table,
            upstream, largest, total, centre, mean, d_logits, job.count, job.classes, job.width, job.logits.stride(0),
            job.table.stride(0), job.positions, **job.slope_cut,
        )  # fmt: skip
    if d_table is None:
        return
    if call.options.hard:
        give_back(d_table, state.chosen, d_out)
    elif not job.count:
        d_table.zero_()
    elif d_table.numel():
        job.run(
            kernels().tokens.soft_bwd_table_kernel,
            job.tiles(job.classes, job.plan.classes) * job.tiles(job.width, job.plan.width), job.logits, upstream,
            largest, total, d_table, job.count, job.classes, job.width, job.logits.stride(0), job.positions,
        )  # fmt: skip
