"""The calls that the model of the CUDA kernels looks at, and their bars: the bench's shapes on an H200."""

from __future__ import annotations

import math
from pathlib import Path

from cuda_model import CHIP, Case, Mark, Pass, constants

UNITS = ("distill_on_chip_kl", "distill_on_chip_mix", "latent", "topk")  # of csrc/cuda, where their kernels are
ROWS = 8192
CLASSES = (32000, 128256, 151936)
LATENT_BYTES = 256 << 20
SHORT, LONG = 4096, 1 << 20  # numbers of a latent

# Bounds in percent of the copy floor at the lower clock, at every width.
BARS = {"forward_kl": 95, "teacher gradient": 80, "reverse_kl": 70, "tvd": 60, "jsd": 50, "sparse": 80}
LATENT_BARS = {"perturb, bf16": 65, "perturb, fp32": 85, "ascend with noise and ball, bf16": 55}

# Eight numbers by one load or two, in halves or not.
_VECTOR = {True: r"unpack_halves<BFloat16>\(", False: r"load16\(from \+ 16 \* i\)"}
# Between blocks: the first warp exchanges, the others wait.
_EXCHANGES = (
    Mark(r"(?s)store_remote\(.*tell<Extremes", 1),
    Mark(r"(?s)cluster_wait\(\);.*tell<Extremes", 1, "others"),
    Mark(r"(?s)store_remote\(.*tell<", 2),
    Mark(r"(?s)cluster_wait\(\);.*tell<", 2, "others"),
)


def on_chip(classes: int, pair_bytes: int, reserved: int, thirds: bool = False) -> tuple[int, int]:
    """The blocks of a row and the bytes of each, as csrc/cuda/distill.cu and topk.cu lay it."""
    most = CHIP.shared_bytes - 1024  # what a block may ask for
    for limit in ((most - 2048) // 3 if thirds else 0, (most - 1024) // 2, most):
        for blocks in (1, 2, 4, 8):
            asked = reserved + math.ceil(math.ceil(classes / 8) / blocks) * 8 * pair_bytes
            if asked <= limit:
                return blocks, asked
    raise ValueError(f"{classes} classes do not fit on the chip")


def distill(title: str, divergence: str, classes: int, known: dict[str, int]) -> Case:
    """The loss with its hard term at T = 2; its gradients at once."""
    blocks, shared = on_chip(classes, 4, known["kTeamBytes"] + known["kBarrierBytes"], True)
    both = "teacher" in title
    sums = Pass("sums", r"(?s)lean_sums<D.*Power<2>", 4)
    chosen = "Yes" if both else "No"
    gradients = Pass("gradients", rf"(?s)loop\({chosen}\(\), No\(\)\).*Power<2>", 4)
    middle: tuple[Pass, ...] = ()
    if divergence == "Jsd":
        middle = (Pass("mixture", r"lean_halves\(", 4),)
    if divergence == "Tvd":
        middle = (Pass("mixture", r"D::add\(normalised<D>\(", 4),)
        of_student = (r"\(power_of\(c\.q, f\.power\) \* f\.inverse_hard - floor", r"store_eight\(")
        gradients = Pass("gradients", r"student_gradient<D>\(", 4, of_student)
    last = 2 + len(middle)
    marks = (
        Mark(r"copy_start\(row\.student"),
        Mark(r"(?s)^DFMA.*mine\.log = log\(", 2),
        Mark(r"ready\.of_lean = ", last),
    )
    return Case(
        title=f"{title}, T = 2, bf16, {ROWS} x {classes}",
        kernel=rf"distill_fwd_kernel<{divergence}, BlockTeam, 1>",
        rows=ROWS,
        items=classes,
        moved=2 * (4 if both else 3) * ROWS * classes,
        passes=(Pass("maxima", r"student\.add\(load16", 4, times=known["kPieces"]), sums, *middle, gradients),
        threads=known["kPairThreads"],
        marks=(*_EXCHANGES, *marks) if blocks > 1 else marks,
        blocks=blocks,
        shared=shared,
        fetched=shared,
        bench=("distill", title, f"{ROWS} x {classes}", "bfloat16"),
        bar=BARS["teacher gradient" if both else title.split(" + ")[0]],
    )


def sparse(classes: int, hard: bool, known: dict[str, int], entries: int = 64) -> Case:
    """A top-k teacher at T = 2, with or without a hard term."""
    blocks, shared = on_chip(classes, 2, known["kTopKBytes"] + entries * known["kEntryBytes"])
    power = "kSquare" if hard else "kNone"
    forward = r"body\(ForwardKl"
    marks = (
        Mark(r"copy_start\(row\.student"),
        Mark(r"entries\[j\]\.id = mine"),
        Mark(r"sums\.teacher \+= exp_nonpositive", 2),
        Mark(r"settle_topk\(state", 2),
        Mark(r"tail_class\(shared\.state", 2),
        Mark(rf"(?s)topk_row_loss<D>.*{forward}", 2),
        Mark(rf"(?s)double grad = topk_gradient.*{forward}", 3),
    )
    return Case(
        title=f"sparse forward_kl{' + CE' if hard else ''}, k = {entries}, T = 2, bf16, {ROWS} x {classes}",
        kernel=r"topk_fwd_kernel<1>",
        rows=ROWS,
        items=classes,
        moved=ROWS * (4 * classes + 12 * entries + 4),
        passes=(
            Pass("maxima", r"load16\(row\.student", 2, times=known["kChunks"]),
            Pass("sums", rf"(?s)sum_tail<kSummed.*TailPower::{power}>", 2),
            Pass("gradients", rf"(?s)write_tail<kPower, false>.*TailPower::{power}>", 2, (r"store_eight\(",)),
        ),
        threads=known["kTopKThreads"],
        marks=marks,
        blocks=blocks,
        shared=shared,
        fetched=shared,
        unit="class",
        bench=("", "", "", "")
        if hard
        else ("topk", "forward_kl, bucket", f"{ROWS} x {classes}, k {entries}", "bfloat16"),
        leads=math.ceil(entries / 32),
        bar=BARS["sparse"],
    )


def perturbed(title: str, known: dict[str, int]) -> Case:
    """Noise for short latents: two vectors a thread."""
    half = title.endswith("bf16")
    width = 2 if half else 4
    vector = _VECTOR[half]
    each = (r"(?s)^MUFU.*normal_pair", r"store_eight\(")
    way = (rf"(?s){vector}.*z\[0\] = load_padded", rf"(?s){vector}.*z\[1\] = load_padded", *each, *each)
    samples = LATENT_BYTES // width // SHORT
    return Case(
        title=f"{title}, {samples} x {SHORT}",
        kernel=rf"latent_perturb_kernel<float, {int(half)}>",
        rows=samples,
        items=SHORT,
        moved=2 * LATENT_BYTES,
        passes=(),
        threads=known["kThreads"],
        marks=tuple(Mark(line) for line in way),
        item_bytes=width,
        unit="number",
        bench=("latent", "perturb", f"{samples} x {SHORT}", "bfloat16" if half else "float32"),
        bar=LATENT_BARS[title],
    )


def ascended(title: str, known: dict[str, int]) -> Case:
    """A step of long latents in bf16, by a cluster of eight blocks; as much of it as there is room for stays in shared
    memory, in float."""
    vector, noise = _VECTOR[True], r"(?s)^MUFU.*normal_pair"
    share = LONG // 8 // 8  # vectors a block
    room = (CHIP.shared_bytes - 1024 - known["kTeamBytes"]) // 32
    kept = min(1.0, room / share)
    get, grad, anchor = r"places\.get\(k\)", rf"(?s){vector}.*ascent\.grad\(k\)", rf"(?s){vector}.*anchor_at\(k\)"
    z = rf"(?s){vector}.*ascent\.moved\("
    offsets = r"offset\.v\[j\] = out\.v\[j\] - anchor\.v\[j\]"
    written = r"out\.v\[j\] = anchor\.v\[j\] \+ distance_j \* shrink"
    matrices = (1 + 2 + (1 - kept)) + (1 + 2 * (1 - kept)) + 1
    return Case(
        title=f"{title}, {LATENT_BYTES // 2 // LONG} x {LONG}",
        kernel=r"latent_ascend_kernel<float, BlockTeam, 1, false>",
        rows=LATENT_BYTES // 2 // LONG,
        items=LONG,
        moved=4 * LATENT_BYTES,
        passes=(
            Pass("norm", r"add_squared_products\(", 2, (vector,)),
            Pass("reach, kept", offsets, 8, (anchor, get, z, noise), part=kept),
            Pass("reach, not kept", offsets, 6, (anchor, grad, z, noise), part=1 - kept),
            Pass("write, kept", rf"(?s){written}.*places\.get\(k\)", 6, (anchor, r"store_eight\("), part=kept),
            Pass("write, not kept", rf"(?s){written}.*ascent\.moved\(", 6, (grad, z, noise, anchor), part=1 - kept),
        ),
        threads=2 * known["kThreads"],
        blocks=8,
        shared=known["kTeamBytes"] + 32 * room,
        asked=int(matrices * LATENT_BYTES),
        fetched=2 * known["kThreads"] * 3 * 16,
        unit="number",
        bench=("latent", "ascend with noise", f"{LATENT_BYTES // 2 // LONG} x {LONG}", "bfloat16"),
        bar=LATENT_BARS[title],
    )


def cases(root: Path) -> list[Case]:
    """All of them, as the sources below ``root`` lay them on the chip."""
    known = constants(root)
    titles = {"forward_kl": "ForwardKl", "reverse_kl": "ReverseKl", "tvd": "Tvd", "jsd": "Jsd"}
    found = [distill(f"{name} + CE", divergence, c, known) for name, divergence in titles.items() for c in CLASSES]
    found += [distill("forward_kl + CE, teacher gradient", "ForwardKl", c, known) for c in CLASSES]
    found += [sparse(classes, hard, known) for hard in (False, True) for classes in CLASSES]
    found += [(perturbed if title.startswith("perturb") else ascended)(title, known) for title in LATENT_BARS]
    return found
