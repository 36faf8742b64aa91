"""One side of a loss from hidden states: its logits, a chunk of rows at a time, and the way back to its inputs.

The products are PyTorch's, that is the vendor's. Logits are never rounded below float32: a product of bfloat16 or
float16 gives float32 where PyTorch has such a product (CUDA), else its operands are widened: a weight once a call where
there is room for it, or a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from tgt_fast.kernels.options import TopK
from tgt_fast.kernels.vocabulary import Vocabulary

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]  # memory for (shape, dtype), on the call's device

_HALVES: Final = (torch.bfloat16, torch.float16)
_TINY: Final = 1e-37
_BLOCK: Final = 1 << 23  # bytes of widened weights at a time
_VERSION: Final = tuple(int(part) for part in torch.__version__.split(".")[:2])
_MM_WIDENS: Final = _VERSION >= (2, 8)  # torch.mm(..., out_dtype=)
_ADDMM_WIDENS: Final = _VERSION >= (2, 11)  # torch.addmm(..., out_dtype=) onto a sum of that dtype


def casts_operands(device: torch.device) -> bool:
    """True if PyTorch multiplies bfloat16 or float16 into float32 there."""
    return _MM_WIDENS and device.type == "cuda"


def _product_of_halves(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, in float32. Not yet run on a GPU."""
    if not a.is_cuda:  # the same numbers, for tests
        torch.addmm(out, a.float(), b.float(), beta=float(add), out=out)
    elif not add:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif _ADDMM_WIDENS:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.add_(torch.mm(a, b, out_dtype=torch.float32))


class LogitsTeacher:
    """A teacher whose logits are at hand: a chunk is a slice of them."""

    casts_grad = False

    def __init__(self, logits: Tensor, classes: int, wanted: bool) -> None:
        self._logits = logits[:, :classes]
        self._classes = logits.shape[1]
        self.wanted = wanted
        self._d_logits = torch.zeros_like(logits, memory_format=torch.contiguous_format) if wanted else None

    def bytes_a_row(self, width: int, classes: int | None = None) -> int:
        return 0

    def allocate(self, rows: int, slots: int, empty: Empty) -> None:
        return None

    def logits(self, at: slice, slot: int) -> Tensor:
        rows = self._logits[at]
        if self.wanted and rows.dtype == torch.float16:  # its gradient must not be rounded before it is scaled
            return rows.to(torch.float32, memory_format=torch.contiguous_format)
        return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()

    def set_row_scale(self, coefficient: Tensor, bound: float) -> None:
        return None

    def accumulate_grad(self, at: slice, slot: int, d_logits: Tensor, missing: Tensor | None) -> None:
        if self._d_logits is not None:
            self._d_logits[at, : d_logits.shape[1]] = d_logits

    def grads(self) -> tuple[Tensor | None, ...]:
        return self._d_logits, None, None


class TopKTeacher:
    """A teacher whose top-k record is at hand: a chunk is its rows, by the classes of the loss. No gradient.

    Without a vocabulary its ids are those of the loss already.
    """

    wanted = False
    casts_grad = False

    def __init__(self, topk: TopK, vocabulary: Vocabulary | None) -> None:
        self._topk = topk
        self._vocabulary = vocabulary

    def bytes_a_row(self, width: int, classes: int | None = None) -> int:
        return self._topk.ids.shape[1] * (self._topk.ids.itemsize + self._topk.log_probs.itemsize)

    def allocate(self, rows: int, slots: int, empty: Empty) -> None:
        return None

    def logits(self, at: slice, slot: int) -> TopK:
        ids, log_probs, tail, form = self._topk
        rows = TopK(ids[at], log_probs[at], None if tail is None else tail[at], form)
        return rows if self._vocabulary is None else self._vocabulary.align_topk(rows)

    def set_row_scale(self, coefficient: Tensor, bound: float) -> None:
        return None

    def accumulate_grad(self, at: slice, slot: int, d_logits: Tensor, missing: Tensor | None) -> None:
        return None

    def grads(self) -> tuple[Tensor | None, ...]:
        return None, None, None


class Head:
    """Logits ``scale * (hidden @ weight.T + bias)``, softcapped, and the gradients that are wanted of the three."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, classes: int,
        counted: Tensor | None, dtype: torch.dtype, wanted: tuple[bool, ...], empty: Empty, keep: int,
    ) -> None:  # fmt: skip
        self._hidden = hidden  # [N, H]
        self._counted = counted  # [N] bool
        self._whole = weight  # [C, H], of which the first classes count
        self._weight = weight[:classes]
        self._scale = scale
        self.softcap = softcap
        # Everything that multiplies goes into the hidden states, a small matrix; tanh then needs no division.
        self._factor = scale if softcap is None else scale / softcap
        self._dtype = dtype
        self._bias = None if bias is None else bias[:classes].to(dtype) * self._factor
        self._bias_dtype = dtype if bias is None else bias.dtype
        self._wants_hidden, self._wants_weight, self._wants_bias = wanted
        self.wanted = any(wanted)
        same = hidden.dtype == weight.dtype and dtype == torch.float32
        self._casts_operands = same and hidden.dtype in _HALVES and casts_operands(hidden.device)
        self._cast_weight: Tensor | None = None
        shape = tuple(self._weight.shape)
        if weight.dtype != dtype and not self._casts_operands and shape[0] * shape[1] * dtype.itemsize <= keep:
            self._cast_weight = empty(shape, dtype).copy_(self._weight)
        # Gradients of float16 are held to float16's precision: their products take float32.
        self.casts_grad = self._casts_operands and hidden.dtype == torch.bfloat16 and any(wanted)
        self._d_hidden = hidden.new_empty(hidden.shape) if self._wants_hidden else None
        self._d_weight = empty(tuple(weight.shape), dtype) if self._wants_weight else None
        self._d_bias = hidden.new_zeros(weight.shape[0], dtype=dtype) if self._wants_bias else None
        self._started = False

    def bytes_a_row(self, width: int, classes: int | None = None) -> int:
        """Of a chunk: the logits, and what stands beside them on the way back."""
        beside = width * (self.softcap is not None) + 2 * self.casts_grad
        return (self._weight.shape[0] if classes is None else classes) * (width + beside * self.wanted)

    def allocate(self, rows: int, slots: int, empty: Empty) -> None:
        """Memory for the logits of a chunk, or of one chunk while another is in use."""
        classes = self._weight.shape[0]
        self._slots = empty((slots, rows, classes), self._dtype)
        if self.casts_grad:
            self._rounded = self._hidden.new_empty(rows, classes, dtype=torch.float16)

    def logits(self, at: slice, slot: int) -> Tensor:
        out: Tensor = self._slots[slot, : at.stop - at.start]
        if self._casts_operands:
            _product_of_halves(self._rows(at), self._weight.t(), out)
            if self._factor != 1.0:
                out.mul_(self._factor)
        else:
            hidden = self._scaled(at)
            for columns, weight in self._blocks():
                torch.mm(hidden, weight.t(), out=out[:, columns])
        if self._bias is not None:
            out.add_(self._bias)
        if self.softcap is not None:
            out.tanh_().mul_(self.softcap)
        return out

    def accumulate_grad(self, at: slice, slot: int, d_logits: Tensor, missing: Tensor | None) -> None:
        """Adds a chunk's part to the gradients; overwrites ``d_logits`` and the slot."""
        if self.softcap is not None:  # tanh' = 1 - tanh^2
            logits = self._slots[slot, : at.stop - at.start]
            d_logits.addcmul_(d_logits, logits.mul_(logits), value=-1.0 / self.softcap**2)
            if missing is not None:  # there the logits are -inf, and 0 * inf is not 0
                d_logits.masked_fill_(missing, 0.0)
        if self._d_bias is not None:
            self._d_bias[: d_logits.shape[1]].add_(d_logits.sum(dim=0), alpha=self._scale)
        if self.casts_grad:
            self._products_of_halves(at, d_logits)
        else:
            self._products(at, d_logits)
        self._started = True

    def hidden_grad(self, at: slice) -> Tensor | None:
        """Those rows of the hidden states' gradient, once their chunk is done."""
        return None if self._d_hidden is None else self._d_hidden[at]

    def grads(self) -> tuple[Tensor | None, ...]:
        d_weight, d_bias = self._d_weight, self._d_bias
        if d_weight is not None:
            rest = d_weight[self._weight.shape[0] if self._started else 0 :]
            rest.zero_()
            if self.casts_grad:
                d_weight = torch.mul(d_weight, self._peak * self._scale, out=torch.empty_like(self._whole))
            d_weight = d_weight.to(self._whole.dtype)
        return self._d_hidden, d_weight, None if d_bias is None else d_bias.to(self._bias_dtype)

    def _rows(self, at: slice) -> Tensor:
        """The hidden states, 0 in dropped rows: their gradient, 0, times NaN would spoil a sum over rows."""
        rows = self._hidden[at]
        return rows if self._counted is None else torch.where(self._counted[at, None], rows, 0.0)

    def _scaled(self, at: slice) -> Tensor:
        hidden = self._rows(at).to(self._dtype)
        return hidden if self._factor == 1.0 else hidden * self._factor

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the dtype of the arithmetic, whole or in blocks of classes."""
        weight = self._weight if self._cast_weight is None else self._cast_weight
        if weight.dtype == self._dtype:
            yield slice(None), weight
            return
        step = max(1, _BLOCK // (weight.shape[1] * self._dtype.itemsize))
        for start in range(0, weight.shape[0], step):
            yield slice(start, start + step), weight[start : start + step].to(self._dtype)

    def _products(self, at: slice, d_logits: Tensor) -> None:
        if self._d_hidden is not None:
            d_hidden = self._d_hidden[at]
            out = d_hidden if d_hidden.dtype == self._dtype else d_hidden.new_empty(d_hidden.shape, dtype=self._dtype)
            for columns, weight in self._blocks():
                if columns.start:
                    out.addmm_(d_logits[:, columns], weight)
                else:
                    torch.mm(d_logits[:, columns], weight, out=out)
            if self._scale != 1.0:
                out.mul_(self._scale)
            if out is not d_hidden:
                d_hidden.copy_(out)
        if self._d_weight is not None:
            total = self._d_weight[: d_logits.shape[1]]
            # The hidden states hold the factor: for softcapped logits that lacks a softcap.
            alpha = 1.0 if self.softcap is None else self.softcap
            beta = 1.0 if self._started else 0.0
            torch.addmm(total, d_logits.t(), self._scaled(at), beta=beta, alpha=alpha, out=total)

    def set_row_scale(self, coefficient: Tensor, bound: float) -> None:
        """Prepare the products of halves: each row's weight in the result, [N], and a size that gradients have."""
        if self.casts_grad:
            self._unit = coefficient.abs().to(torch.float32) * bound
            self._peak = self._unit.amax().clamp_min(_TINY) if len(self._unit) else self._unit.new_ones(())
            self._inverse = torch.where(self._unit > _TINY, 1.0 / self._unit, 0.0)
            if self._wants_hidden:
                self._mean_weight = self._weight.mean(dim=0, dtype=torch.float32)
                self._centred = torch.empty_like(self._weight, dtype=torch.float16)
                torch.sub(self._weight, self._mean_weight, out=self._centred)

    def _products_of_halves(self, at: slice, d_logits: Tensor) -> None:
        """The same for bfloat16 on a device. Not yet run on a GPU.

        Gradients of logits are rounded to float16, each row in units of its weight in the result. Thus they are about
        1 at most, nothing underflows that counts, and rounding costs an eighth of what it would in bfloat16. Those of
        a row (nearly) sum to 0, so the mean weight, which may be large, is kept out of the rounded product.
        """
        count = d_logits.shape[0]
        rounded = torch.mul(d_logits, self._inverse[at, None], out=self._rounded[:count])
        if self._d_hidden is not None:
            made = d_logits.new_empty(count, self._weight.shape[1])
            _product_of_halves(rounded, self._centred, made)
            made.mul_(self._unit[at, None]).addr_(d_logits.sum(dim=1), self._mean_weight)
            self._d_hidden[at] = made.mul_(self._scale)
        if self._d_weight is not None:
            hidden = torch.mul(self._rows(at), (self._unit[at] / self._peak)[:, None]).to(torch.float16)
            total = self._d_weight[: d_logits.shape[1]]
            _product_of_halves(rounded.t(), hidden, total, add=self._started)


class RemappedTeacher:
    """A teacher's side whose classes are those of the loss in another order, some of them missing."""

    def __init__(self, side: Head | LogitsTeacher, source: Tensor, back: Tensor, unused: Tensor) -> None:
        self._side = side
        self._source, self._back, self._unused = source, back, unused  # see Vocabulary
        self.wanted = side.wanted
        self.casts_grad = side.casts_grad

    def bytes_a_row(self, width: int, classes: int | None = None) -> int:
        return self._side.bytes_a_row(width, classes) + width * (
            self._source.numel() + self._back.numel() * self.wanted
        )

    def allocate(self, rows: int, slots: int, empty: Empty) -> None:
        self._side.allocate(rows, slots, empty)

    def logits(self, at: slice, slot: int) -> Tensor:
        return self._side.logits(at, slot).index_select(1, self._source)

    def set_row_scale(self, coefficient: Tensor, bound: float) -> None:
        self._side.set_row_scale(coefficient, bound)

    def accumulate_grad(self, at: slice, slot: int, d_logits: Tensor, missing: Tensor | None) -> None:
        made = d_logits.index_select(1, self._back).masked_fill_(self._unused, 0.0)
        self._side.accumulate_grad(at, slot, made, None)

    def grads(self) -> tuple[Tensor | None, ...]:
        return self._side.grads()
