"""Right calls of everything public, for ``fuzz.py`` to make wrong: functions, classes, calls of their methods."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training_kit import make_student, make_teacher

import tgt_fast as tgt
from tgt_fast import train
from tgt_fast.teacher.batches import Batch

N, C, H = 4, 5, 3
X, WIDTH = 6, 4  # of the kit's data, and its classes


@dataclass
class Call:
    """``function(*arguments, **options)``."""

    name: str
    function: Callable[..., Any]
    arguments: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Subject:
    """A first call, and those that may follow on its result."""

    first: Callable[[Any], Call]
    methods: list[Callable[[Any], Call]] = field(default_factory=list)


Maker = Callable[[random.Random, Path], Subject]
SUBJECTS: dict[str, Maker] = {}


def subject(name: str) -> Callable[[Maker], Maker]:
    def add(make: Maker) -> Maker:
        SUBJECTS[name] = make
        return make

    return add


def function(
    name: str, call: Callable[..., Any], make: Callable[[random.Random], tuple[list[Any], dict[str, Any]]]
) -> None:
    def made(draw: random.Random, folder: Path) -> Subject:
        arguments, options = make(draw)
        return Subject(lambda _: Call(name, call, arguments, options))

    SUBJECTS[name] = made


def rows(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, requires_grad=grad)


def some(draw: random.Random, **options: Any) -> dict[str, Any]:
    """A part of them, in any order."""
    return {name: options[name] for name in draw.sample(list(options), draw.randrange(len(options) + 1))}


def with_backward(call: Callable[..., Any]) -> Callable[..., Any]:
    """And the gradients, where there are any."""

    def both(*arguments: Any, **options: Any) -> Any:
        made = call(*arguments, **options)
        for one in made if type(made) is tuple else (made,):
            if isinstance(one, Tensor) and one.requires_grad and one.device.type == "cpu" and not one.is_complex():
                inputs = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
                torch.autograd.grad(one.sum(), inputs, allow_unused=True)
        return made

    return both


def record() -> tgt.TeacherTopK:
    return tgt.topk_teacher(torch.randn(N, C), 3, 2.0)


def loss_options(draw: random.Random) -> dict[str, Any]:
    return some(
        draw, divergence=draw.choice(("forward_kl", "reverse_kl", "jsd", "symmetric")), beta=0.3, temperature=2.0,
        teacher_temperature=1.5, soft_weight=0.5, hard_weight=0.5, label_smoothing=0.1, reduction="mean",
        return_stats=True, backend="auto",
    )  # fmt: skip


def call_options(draw: random.Random) -> dict[str, Any]:
    return some(draw, target=torch.randint(0, C, (N,)), sample_weight=torch.rand(N), normalizer=3.0)


def indices(draw: random.Random) -> dict[str, Any]:
    return some(draw, ignore_index=-100, unlabeled_index=-1)


def key(draw: random.Random) -> dict[str, Any]:
    return some(draw, seed=3, sample_ids=torch.arange(N), step=2, replica=1, backend="auto")


def capped(draw: random.Random) -> dict[str, Any]:
    return some(
        draw, student_scale=0.5, student_softcap=10.0, teacher_scale=2.0, teacher_softcap=5.0, vocab_size=C,
        vocab_map=torch.randperm(C), vocab_mask=torch.ones(C, dtype=torch.bool), memory_budget=1 << 16,
    )  # fmt: skip


def distill(draw: random.Random) -> tuple[list[Any], dict[str, Any]]:
    teacher = record() if draw.random() < 0.3 else rows(N, C, grad=draw.random() < 0.3)
    options = {**loss_options(draw), **call_options(draw), **indices(draw)}
    if isinstance(teacher, tgt.TeacherTopK):
        options["temperature"] = 2.0
    return [rows(N, C, grad=True), teacher], options


def linear(draw: random.Random) -> tuple[list[Any], dict[str, Any]]:
    student = [rows(N, H, grad=True), rows(C, H, grad=True)]
    options = {**loss_options(draw), **call_options(draw), **indices(draw), **capped(draw)}
    if draw.random() < 0.3:
        return student, {**options, "teacher_logits": rows(N, C)}
    if draw.random() < 0.5:
        options |= {"student_bias": rows(C), "teacher_bias": rows(C)}
    return [*student, rows(N, 2), rows(C, 2)], options


def contrast(draw: random.Random) -> tuple[list[Any], dict[str, Any]]:
    options = {**loss_options(draw), **some(
        draw, positives=torch.arange(N), passage_ids=torch.arange(N), sample_weight=torch.rand(N), normalizer=2.0,
        memory_budget=1 << 16,
    )}  # fmt: skip
    options["temperature"] = 0.5
    return [rows(N, H, grad=True), rows(N, H, grad=True), rows(N, 2), rows(N, 2)], options


function("distillation_loss", with_backward(tgt.distillation_loss), distill)
function("linear_distillation_loss", with_backward(tgt.linear_distillation_loss), linear)
function("contrastive_distillation_loss", with_backward(tgt.contrastive_distillation_loss), contrast)
function("topk_teacher", tgt.topk_teacher, lambda draw: ([rows(N, C), 3], some(draw, temperature=2.0, tail="bucket")))
function("align_logits", with_backward(tgt.align_logits), lambda draw: (
    [rows(N, C, grad=True), rows(N, C)],
    some(draw, vocab_size=C, vocab_map=torch.randperm(C), vocab_mask=torch.ones(C, dtype=torch.bool)),
))  # fmt: skip
function("sample_tokens", tgt.sample_tokens, lambda draw: (
    [rows(N, C)], {**some(draw, temperature=0.7, top_k=3, top_p=0.9, min_p=0.1), **key(draw)}
))  # fmt: skip
function("soft_embedding", with_backward(tgt.soft_embedding), lambda draw: (
    [rows(N, C, grad=True), rows(C, H, grad=True)], {**some(draw, tau=0.7, gumbel=True, hard=True), **key(draw)}
))  # fmt: skip
function("perturb_latents", with_backward(tgt.perturb_latents), lambda draw: (
    [rows(N, C, grad=draw.random() < 0.5), draw.choice((0.5, torch.rand(N), torch.rand(C)))],
    {**some(draw, truncation=2.0, sphere_radius="keep", op="perturb"), **key(draw)},
))  # fmt: skip
function("ascend_latents", tgt.ascend_latents, lambda draw: (
    [rows(N, C), rows(N, C)],
    {"step_size": 0.5, **some(draw, scale=torch.rand(C), anchor=rows(N, C), radius=1.0, norm="l2", radius_norm="l2",
                              sigma=0.1), **key(draw)},
))  # fmt: skip
function("teacher_fingerprint", tgt.teacher_fingerprint, lambda draw: (
    [nn.Linear(2, 3)],
    some(draw, k=3, temperature=2.0, tail="bucket", latents=False, dtype=None, transforms=(), version="v"),
))  # fmt: skip
function("explain", tgt.explain, lambda draw: (["distill", rows(N, C), rows(N, C)], {}))
function("backends", tgt.backends, lambda draw: ([], {}))
function("release_buffers", tgt.release_buffers, lambda draw: ([], {}))
for metric in (train.agreement, train.mean_kl):
    function(metric.__name__, metric, lambda draw: ([rows(N, C), rows(N, C)], {}))
for metric in (train.accuracy, train.class_accuracy):
    function(metric.__name__, metric, lambda draw: ([rows(N, C), torch.randint(0, C, (N,))], {}))
function("class_thirds", train.class_thirds, lambda draw: ([[5, 4, 3, 2, 1]], {}))


def batches() -> list[Any]:
    return [(torch.arange(i, i + N), rows(N, X), torch.randint(0, WIDTH, (N,))) for i in (0, N)]


function("evaluate", train.evaluate, lambda draw: ([make_student(), make_teacher(), batches()], {}))


def teacher_of(draw: random.Random) -> tgt.Teacher:
    return make_teacher(prior="normal")


def sampler_of(draw: random.Random) -> tgt.LatentSampler:
    mode = draw.choice(("prior", "random", "gradient", "persistent"))
    return tgt.LatentSampler(teacher_of(draw), mode, sigma=0.5, units="absolute")


@subject("fit")
def fit(draw: random.Random, folder: Path) -> Subject:
    student, teacher = make_student(), teacher_of(draw)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    options = some(
        draw, accumulate=2, clip_grad_norm=1.0, evaluate=lambda s: {"accuracy": 0.5}, eval_every=1, monitor="accuracy",
        mode="max", checkpoint_dir=folder / "run", checkpoint_every=1, resume=False, seed=3, columns=None,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1),
    )  # fmt: skip
    options |= {"steps": 2, "optimizer": optimizer, "progress": False}
    return Subject(lambda _: Call("fit", tgt.fit, [student, tgt.TGTObjective(teacher), batches()], options))


@subject("checkpoint")
def checkpoints(draw: random.Random, folder: Path) -> Subject:
    student = make_student()
    optimizer = torch.optim.Adam(student.parameters())
    parts: dict[str, Any] = {"student": student, "optimizer": optimizer}
    more = {"step": 3, "extra": {"a": [1, 2.5, None, (torch.ones(2), "x")]}}
    return Subject(
        lambda _: Call("save_checkpoint", train.save_checkpoint, [folder / "run"], {**parts, **more}),
        [
            lambda _: Call("load_checkpoint", train.load_checkpoint, [folder / "run"], dict(parts)),
            lambda _: Call("save_weights", train.save_weights, [folder / "w.safetensors", dict(student.state_dict())]),
        ],
    )


@subject("BatchStream")
def stream(draw: random.Random, folder: Path) -> Subject:
    return Subject(
        lambda _: Call("BatchStream", train.BatchStream, [batches()]),
        [
            lambda made: Call("take", made.take),
            lambda made: Call("load_state_dict", made.load_state_dict, [made.state_dict()]),
        ],
    )


@subject("DistillationLoss")
def distillation(draw: random.Random, folder: Path) -> Subject:
    options = {**loss_options(draw), **some(draw, ignore_index=-100, unlabeled_index=-1, inplace=True)}

    def call(made: Any) -> Call:
        arguments, _ = distill(draw)
        return Call("call", with_backward(made), [arguments[0] + 0, *arguments[1:]], call_options(draw))

    def soft(made: Any) -> Call:
        return Call(
            "soft", made.soft, [rows(N, C), rows(N, C)], some(draw, sample_weight=torch.rand(N), normalizer=2.0)
        )

    return Subject(lambda _: Call("DistillationLoss", tgt.DistillationLoss, [], options), [call, soft])


@subject("LinearDistillationLoss")
def linear_loss(draw: random.Random, folder: Path) -> Subject:
    options = {**loss_options(draw), **indices(draw), **capped(draw)}
    student = [rows(N, H, grad=True), rows(C, H, grad=True)]
    call = lambda made: Call("call", with_backward(made), [*student, rows(N, 2), rows(C, 2)], call_options(draw))  # noqa: E731
    soft = lambda made: Call("soft", made.soft, [*student, rows(N, 2), rows(C, 2)])  # noqa: E731
    return Subject(lambda _: Call("LinearDistillationLoss", tgt.LinearDistillationLoss, [], options), [call, soft])


@subject("ListwiseDistillationLoss")
def listwise_loss(draw: random.Random, folder: Path) -> Subject:
    options = {**some(draw, teacher_temperature=2.0, reduction="mean", backend="auto"), **indices(draw)}
    known = options.get("teacher_temperature") == 2.0 and draw.random() < 0.3
    teacher = record() if known else rows(N, C)
    call = lambda made: Call("call", with_backward(made), [rows(N, C, grad=True), teacher], call_options(draw))  # noqa: E731
    return Subject(lambda _: Call("ListwiseDistillationLoss", tgt.ListwiseDistillationLoss, [], options), [call])


@subject("tgt_fast.losses")
def loss_of_rows(draw: random.Random, folder: Path) -> Subject:
    kind = draw.choice((
        tgt.losses.DIST, tgt.losses.MLKDClass, tgt.losses.NKD, tgt.losses.GDKD, tgt.losses.WTTM,
        tgt.losses.SymmetricCE, tgt.losses.TopKReverseKL, tgt.losses.BiLD, tgt.losses.MarginMSE,
        tgt.losses.RKDDistance, tgt.losses.RKDAngle, tgt.losses.EmbeddingDistillation, tgt.losses.FitNets,
    ))  # fmt: skip
    options = {**some(draw, reduction="mean"), **indices(draw)}
    more = some(draw, target=torch.randint(0, C, (N,)), weight=torch.rand(N), normalizer=3.0)
    call = lambda made: Call("call", with_backward(made), [rows(N, C, grad=True), rows(N, C)], more)  # noqa: E731
    return Subject(lambda _: Call(kind.__name__, kind, [], options), [call])


@subject("ContrastiveDistillationLoss")
def contrast_loss(draw: random.Random, folder: Path) -> Subject:
    options = {**loss_options(draw), "temperature": 0.5}
    call = lambda made: Call("call", with_backward(made), contrast(draw)[0], some(draw, positives=torch.arange(N)))  # noqa: E731
    return Subject(lambda _: Call("ContrastiveDistillationLoss", tgt.ContrastiveDistillationLoss, [], options), [call])


@subject("TeacherTopK")
def topk(draw: random.Random, folder: Path) -> Subject:
    made = record()
    arguments = [made.ids, made.log_probs, made.tail_log_prob, made.temperature, made.num_classes]
    return Subject(
        lambda _: Call("TeacherTopK", tgt.TeacherTopK, arguments, some(draw, tail="bucket")),
        [
            lambda made: Call("check", made.check),
            lambda made: Call("rest", made.rest),
            lambda made: Call("getitem", made.__getitem__, [draw.choice((0, slice(1, 3), torch.tensor([1, 0])))]),
            lambda made: Call("loss", with_backward(tgt.distillation_loss), [rows(N, C, grad=True), made],
                              {"temperature": 2.0}),
        ],
    )  # fmt: skip


@subject("Teacher")
def teacher(draw: random.Random, folder: Path) -> Subject:
    parts = [nn.Linear(X, H), nn.Linear(H, X), nn.Linear(X, WIDTH)]
    options = some(
        draw, prior="normal", labeler_transform=lambda x: x, student_transform=lambda x: x, max_batch=2,
        modules=[nn.Linear(2, 2)],
    )  # fmt: skip
    return Subject(
        lambda _: Call("Teacher", tgt.Teacher, parts, options),
        [
            lambda made: Call("encode", made.encode, [rows(N, X)]),
            lambda made: Call("decode", made.decode, [draw.choice((rows(N, H), tgt.Latents(rows(N, H))))]),
            lambda made: Call("label", made.label, [rows(N, X)]),
            lambda made: Call("student_view", made.student_view, [rows(N, X)]),
            lambda made: Call("from_prior", made.from_prior, [tgt.Latents(rows(N, H))]),
            lambda made: Call("join", made.join, [[rows(N, X), rows(N, X)]]),
            lambda made: Call("check_data", made.check_data, [rows(N, X)]),
        ],
    )


@subject("Latents")
def latents(draw: random.Random, folder: Path) -> Subject:
    return Subject(
        lambda _: Call("Latents", tgt.Latents, [rows(N, 2, H)], some(draw, mask=torch.ones(N, 2, dtype=torch.bool))),
        [lambda made: Call("check", made.check), lambda made: Call("decode", teacher_of(draw).decode, [made])],
    )


@subject("LatentSampler")
def sampler(draw: random.Random, folder: Path) -> Subject:
    options = some(
        draw, sigma=0.5, step_size=0.5, steps=2, radius=1.0, norm="l2", step_noise=0.1, anchors="batch", replicas=2,
        divergence="forward_kl", beta=0.3, temperature=2.0, restart_probability=0.5, bank_size=8, truncation=2.0,
        seed=3, rank=0, world_size=1, record_disagreement=True, repeats="distinct", score=tgt.scores.entropy,
        ball="linf",
    )  # fmt: skip
    mode = draw.choice(("prior", "random", "gradient", "persistent"))

    def call(made: Any) -> Call:
        given = some(draw, sample_ids=torch.arange(N), step=2, occurrence=torch.zeros(N, dtype=torch.int64))
        return Call("call", made, [rows(N, X)], {"student": make_student(), **given})

    def load(made: Any) -> Call:
        return Call("load_state_dict", made.load_state_dict, [made.state_dict()])

    def load_changed(made: Any) -> Call:
        return Call("load_state_dict(**)", lambda **state: made.load_state_dict(state), [], made.state_dict())

    return Subject(
        lambda _: Call("LatentSampler", tgt.LatentSampler, [teacher_of(draw), mode], {"units": "absolute", **options}),
        [
            call,
            call,
            load,
            load_changed,
            lambda made: Call("calibrate", made.calibrate, [batches()], some(draw, per_class=2)),
        ],
    )


@subject("SyntheticReplay")
def replay(draw: random.Random, folder: Path) -> Subject:
    options = some(draw, reuse=2, capacity=8, select="disagreement", candidates=2, retire=0.1, device="cpu", seed=3)
    sampler = tgt.LatentSampler(teacher_of(draw), draw.choice(("prior", "random")), sigma=0.5, units="absolute")

    def call(made: Any) -> Call:
        given = some(draw, sample_ids=torch.arange(N), step=2, occurrence=torch.zeros(N, dtype=torch.int64))
        return Call("call", made, [rows(N, X)], {"student": make_student(), **given})

    return Subject(
        lambda _: Call("SyntheticReplay", tgt.SyntheticReplay, [sampler], options),
        [
            call,
            call,
            lambda made: Call("statistics", made.statistics, [], some(draw, student=make_student())),
            lambda made: Call("load_state_dict", made.load_state_dict, [made.state_dict()]),
        ],
    )


@subject("TGTObjective")
def objective(draw: random.Random, folder: Path) -> Subject:
    options = some(draw, sampler=sampler_of(draw), loss=tgt.DistillationLoss(), synthetic_weight=0.5)

    def call(made: Any) -> Call:
        given = some(draw, sample_ids=torch.arange(N), step=2, normalizer=3.0, synthetic_normalizer=2.0)
        return Call("call", made, [make_student(), rows(N, X), torch.randint(0, WIDTH, (N,))], given)

    return Subject(
        lambda _: Call("TGTObjective", tgt.TGTObjective, [teacher_of(draw)], options),
        [
            call,
            lambda made: Call("normalizers", made.normalizers, [[Batch(*batch) for batch in batches()]]),
            lambda made: Call("occurrences", made.occurrences, [[Batch(*batch) for batch in batches()]]),
        ],
    )


@subject("TeacherCache")
def cache(draw: random.Random, folder: Path) -> Subject:
    options = some(
        draw, k=draw.choice((3, None)), temperature=2.0, tail="bucket", dtype=None, transforms=(), version="v",
        shard_bytes=100, shard_seconds=0.0, checksums=True,
    )  # fmt: skip
    ids = lambda: torch.tensor(draw.sample(range(20), N))  # noqa: E731
    return Subject(
        lambda _: Call("TeacherCache", tgt.TeacherCache, [folder / "cache", nn.Linear(X, C)], options),
        [
            lambda made: Call("label", made.label, [rows(N, X), ids()]),
            lambda made: Call("add", made.add, [ids(), draw.choice((rows(N, C), record()))]),
            lambda made: Call("read", made.read, [ids()]),
            lambda made: Call("missing", made.missing, [ids()]),
            lambda made: Call("latents", made.latents, [ids()]),
            lambda made: Call("fill", made.fill, [batches()]),
            lambda made: Call("flush", made.flush),
            lambda made: Call("verify", made.verify),
            lambda made: Call("ids", made.ids),
            lambda made: Call("contents", made.contents),
            lambda made: Call("open", tgt.TeacherCache.open, [folder / "cache"]),
            lambda made: Call("close", made.close),
        ],
    )
