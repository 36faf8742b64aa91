"""torch.compile with fullgraph=True: equal to eager, forward and backward, static and dynamic, alone and in a step.

Most tests stop before code generation (backend "aot_eager"), which traces, fakes and functionalises all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tgt_fast as tgt

pytestmark = [
    pytest.mark.once("torch.compile"),
    pytest.mark.skipif(
        not hasattr(torch._dynamo.config, "recompile_limit"),
        reason="the compiler of PyTorch 2.6 traces no _replace of a NamedTuple",
    ),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """One recompilation is allowed, for the second shape; another is an error, as fullgraph=True makes it."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], *, dynamic: bool | None = None, backend: str = "aot_eager") -> Any:
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


def values(count: int, *sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes))
    return [torch.randn(sizes, generator=generator).to(dtype).requires_grad_() for _ in range(count)]


OPTIONS: dict[str, dict[str, Any]] = {
    "rows": {"reduction": "none", "temperature": 2.0},
    "jsd, normalizer": {"divergence": "jsd", "normalizer": 7.0},
    "normalizer on the device": {"normalizer": torch.tensor(7.0)},
    "in place": {"inplace": True},
    "reference": {"backend": "reference"},
}


def cases(names: Iterable[str], *also_static: str) -> pytest.MarkDecorator:
    """Each is traced for any number of rows; some, which differ in what is traced, for a given number as well."""
    return pytest.mark.parametrize(
        ("name", "dynamic"), [*((name, True) for name in names), *((name, False) for name in also_static)]
    )


# That every divergence is traced is seen by test_registration.py.
@cases(["rows", "jsd, normalizer", "normalizer on the device"], "in place", "reference")
def test_the_loss(name: str, dynamic: bool) -> None:
    options = OPTIONS[name]

    def loss(student: Tensor, teacher: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        value, stats = tgt.distillation_loss(
            student * 1.0, teacher, target, sample_weight=weight, hard_weight=0.5, return_stats=True, **options
        )
        return value, *stats

    def run(function: Any, rows: int) -> list[Tensor]:
        student, teacher = values(2, rows, 3, 17)
        out = function(student, teacher, torch.arange(3 * rows).reshape(rows, 3) % 17, torch.ones(rows, 3) / 3)
        upstream = torch.linspace(0.5, 2.0, out[0].numel()).reshape(out[0].shape)
        return [*out, *torch.autograd.grad(out[0], (student, teacher), upstream)]

    function = compiled(loss, dynamic=dynamic)
    for rows in (4, 6) if dynamic else (4,):
        for mine, theirs in zip(run(function, rows), run(loss, rows), strict=True):
            assert mine.dtype == theirs.dtype
            if options.get("backend") == "reference":
                torch.testing.assert_close(mine, theirs)
            else:
                assert torch.equal(mine, theirs)


@pytest.mark.always
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_loss_in_other_precisions(dtype: torch.dtype) -> None:
    student, teacher = values(2, 5, 17, dtype=dtype)
    function = compiled(lambda s, t: tgt.distillation_loss(s, t, temperature=2.0))
    results = []
    for run in (function, lambda s, t: tgt.distillation_loss(s, t, temperature=2.0)):
        loss = run(student, teacher)
        results.append((loss, *torch.autograd.grad(1024 * loss, (student, teacher))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


HEADS: dict[str, dict[str, Any]] = {
    "rows": {"vocab_size": 16, "reduction": "none"},
    "softcap, small chunks": {
        "vocab_size": 17,
        "student_softcap": 3.0,
        "teacher_scale": 2.0,
        "memory_budget": 9,
        "normalizer": torch.tensor(7.0),
    },
    "map and mask": {"vocab_map": torch.arange(19) - 1, "vocab_mask": torch.arange(18) != 17},
}


@cases(HEADS, "map and mask")
def test_the_loss_from_hidden_states(name: str, dynamic: bool) -> None:
    options = HEADS[name]

    def loss(*tensors: Tensor) -> tuple[Tensor, ...]:
        hidden, weight, teacher, teacher_weight, bias, target = tensors
        value, stats = tgt.linear_distillation_loss(
            hidden * 1.0, weight, teacher, teacher_weight, target, student_bias=bias, hard_weight=0.5,
            return_stats=True, **options,
        )  # fmt: skip
        return value, *stats

    def run(function: Any, rows: int) -> list[Tensor]:
        inputs = [*values(1, rows, 3, 6), *values(1, 18, 6), *values(1, rows, 3, 5), *values(1, 19, 5), *values(1, 18)]
        out = function(*inputs, torch.arange(3 * rows).reshape(rows, 3) % 16)
        upstream = torch.linspace(0.5, 2.0, out[0].numel()).reshape(out[0].shape)
        return [*out, *torch.autograd.grad(out[0], inputs, upstream)]

    function = compiled(loss, dynamic=dynamic)
    for rows in (4, 6) if dynamic else (4,):
        for mine, theirs in zip(run(function, rows), run(loss, rows), strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


LATENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "perturb": lambda z: tgt.perturb_latents(z, 0.5, seed=3, sample_ids=torch.arange(z.shape[0]) + 5),
    "perturb by coordinate": lambda z: tgt.perturb_latents(z, torch.ones(3, 4), seed=2**63 + 5, step=7, replica=3),
    "perturb by sample": lambda z: tgt.perturb_latents(z, torch.ones(z.shape[0], 1, 1), truncation=1.5),
    "sphere": lambda z: tgt.perturb_latents(z, 0.5, seed=torch.tensor(9), sphere_radius="keep"),
    "ascend": lambda z: tgt.ascend_latents(z, 2 * z, step_size=1.0, anchor=z + 1, radius=0.5, sigma=0.1) * z,
    "ascend by sample": lambda z: tgt.ascend_latents(z, 2 * z, step_size=torch.ones(z.shape[0]), norm="linf") * z,
}


@cases(LATENTS, "ascend by sample")
def test_latents(name: str, dynamic: bool) -> None:
    function = LATENTS[name]
    run = compiled(function, dynamic=dynamic)
    for rows in (4, 6) if dynamic else (4,):
        (z,) = values(1, rows, 3, 4)
        results = [(out := f(z), torch.autograd.grad(out, z, torch.ones_like(out))[0]) for f in (run, function)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Step:
    """A small training step: teacher, sampler, loss, student, optimizer."""

    def __init__(self, mode: str, **options: Any) -> None:
        torch.manual_seed(0)
        encoder, decoder, labeler = nn.Linear(12, 4), nn.Linear(4, 12), nn.Linear(12, 5)
        self.teacher = tgt.Teacher(encoder, decoder, labeler, prior="normal")
        self.student = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.1)
        self.sampler = tgt.LatentSampler(self.teacher, mode, units="absolute", **options)
        self.loss = tgt.DistillationLoss(temperature=2.0, hard_weight=1.0)

    def to(self, device: str) -> Step:
        self.teacher.to(device)
        self.student.to(device)
        return self

    def __call__(self, ids: Tensor | None, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        made = self.sampler(x, sample_ids=ids, student=self.student)
        loss = self.loss(self.student(x), self.teacher.label(x), y)
        return loss + self.loss.soft(self.student(made.x), made.teacher_logits), made.x

    def train(self, forward: Any, ids_given: bool = False) -> list[tuple[Tensor, Tensor]]:
        seen = []
        for rows in (4, 4, 6, 7):
            torch.manual_seed(rows)
            ids = torch.arange(rows) + 3 if ids_given else None
            device = next(self.student.parameters()).device
            loss, made = forward(ids, torch.randn(rows, 12).to(device), torch.randint(0, 5, (rows,)).to(device))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            seen.append((loss.detach(), made.detach().clone()))
        return seen


@pytest.mark.parametrize(
    ("mode", "options", "ids_given", "dynamic"),
    [
        ("random", {}, True, True),
        ("gradient", {"steps": 2, "radius": 1.5, "step_noise": 0.1}, False, None),
    ],
)
def test_a_training_step(mode: str, options: dict[str, Any], ids_given: bool, dynamic: bool | None) -> None:
    """Batches of 4, 4, 6 and 7: the shape that comes third compiles nothing, or the fixture fails the test."""
    eager, traced = Step(mode, **options), Step(mode, **options)
    expected = eager.train(eager, ids_given)
    found = traced.train(compiled(traced.__call__, dynamic=dynamic), ids_given)
    for (loss, made), (other_loss, other_made) in zip(expected, found, strict=True):
        torch.testing.assert_close(loss, other_loss)
        torch.testing.assert_close(made, other_made)
    assert not torch.equal(found[0][1], found[1][1])  # fresh noise for the same batch, from the counter
    for name, tensor in eager.student.state_dict().items():
        torch.testing.assert_close(traced.student.state_dict()[name], tensor)
    assert traced.student.training
    for name in ("seed", "step", "next_id"):
        assert torch.equal(eager.sampler.state_dict()[name], traced.sampler.state_dict()[name])  # type: ignore[arg-type]


def test_generated_code(native: str) -> None:
    """Once through the code generator, at last."""
    step = Step("gradient")
    found = step.train(compiled(step.__call__, backend="inductor", dynamic=True))
    again = Step("gradient")
    for (loss, made), (other_loss, other_made) in zip(found, again.train(again), strict=True):
        torch.testing.assert_close(loss, other_loss)
        torch.testing.assert_close(made, other_made)


# LatentSampler(compile=True)


def test_a_compiled_exploration_equals_the_plain_one(caplog: pytest.LogCaptureFixture) -> None:
    plain, fast = Step("gradient", steps=2), Step("gradient", steps=2, compile=True)
    before = {name: tensor.clone() for name, tensor in fast.student.state_dict().items()}
    random = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "tgt_fast"):
        for rows in (4, 4, 6):
            x = torch.linspace(-1, 1, 12 * rows).reshape(rows, 12)
            a, b = (step.sampler(x, student=step.student) for step in (plain, fast))
            torch.testing.assert_close(a.latents.z, b.latents.z)
            torch.testing.assert_close(a.x, b.x)
    assert caplog.text == ""
    assert fast.student.training
    assert all(torch.equal(before[name], tensor) for name, tensor in fast.student.state_dict().items())
    assert all(p.grad is None for p in fast.student.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_what_cannot_be_compiled_runs_as_it_is_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    step = Step("gradient", compile=True)

    class Stubborn(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            out: Tensor = self.inner(x)
            return out

    student, x = Stubborn(step.student), torch.randn(4, 12)
    with caplog.at_level(logging.WARNING, "tgt_fast"):
        first, second = (step.sampler(x, student=student, step=1, sample_ids=torch.arange(4)) for _ in range(2))
    assert caplog.text.count("exploration runs uncompiled") == 1
    assert torch.equal(first.latents.z, second.latents.z)
    plain = Step("gradient").sampler(x, student=step.student, step=1, sample_ids=torch.arange(4))
    assert torch.equal(plain.latents.z, first.latents.z)


def test_the_students_own_error_is_what_the_caller_sees() -> None:
    step = Step("gradient", compile=True)
    with pytest.raises(tgt.errors.ShapeError, match="7 classes"):
        step.sampler(torch.randn(4, 12), student=nn.Linear(12, 7))


def test_compile_is_not_for_persistent_mode() -> None:
    with pytest.raises(tgt.errors.ArgumentError, match="compile=True"):
        Step("persistent", compile=True)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::mm", "aten::addmm", "aten::bmm")
        return func(*args, **(kwargs or {}))


def test_exploration_computes_no_parameter_gradients() -> None:
    step = Step("gradient")
    step.student = nn.Sequential(nn.Linear(12, 5))
    with Products() as products:
        step.sampler(torch.randn(8, 12), student=step.student)
    # Encode; decode, label and study forward, and back to the latents alone; decode and label what was found. Gradients
    # of the student's, or of all, weights would be 1 or 3 more.
    assert products.count == 1 + 3 + 3 + 2
    assert all(p.grad is None for p in step.student.parameters())


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["random", "gradient"])
def test_a_training_step_on_a_gpu(gpu: str, mode: str) -> None:
    eager, traced = Step(mode).to(gpu), Step(mode).to(gpu)
    expected, found = eager.train(eager), traced.train(compiled(traced.__call__, backend="inductor"))
    for (loss, made), (other_loss, other_made) in zip(expected, found, strict=True):
        torch.testing.assert_close(loss, other_loss)
        torch.testing.assert_close(made, other_made)


@pytest.mark.gpu
def test_a_compiled_exploration_on_a_gpu_replays_with_fresh_noise(gpu: str) -> None:
    plain, fast = Step("gradient", steps=2).to(gpu), Step("gradient", steps=2, compile=True).to(gpu)
    x, found = torch.linspace(-1, 1, 48, device=gpu).reshape(4, 12), []
    for _ in range(4):
        a, b = (step.sampler(x, student=step.student) for step in (plain, fast))
        torch.testing.assert_close(a.latents.z, b.latents.z)
        found.append(b.latents.z)
    assert all(not torch.equal(found[i], found[j]) for i in range(4) for j in range(i))


@pytest.mark.gpu
def test_a_captured_sampler_draws_fresh_noise_at_each_replay(gpu: str) -> None:
    step = Step("random").to(gpu)
    x = torch.zeros(4, 12, device=gpu)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        step.sampler(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step.sampler(x)
    found = []
    for _ in range(3):
        graph.replay()
        found.append(made.latents.z.clone())
    assert all(not torch.equal(found[i], found[j]) for i in range(3) for j in range(i))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["logits", "table", "both"])
def test_a_soft_embedding_and_its_gradients(wanted: tuple[bool, bool], hard: bool) -> None:
    def embed(logits: Tensor, table: Tensor) -> Tensor:
        return tgt.soft_embedding(logits, table, gumbel=True, hard=hard, seed=3)

    made = []
    for function in (embed, compiled(embed)):
        leaves = [
            x.requires_grad_(want) for x, want in zip((*values(1, 5, 17), *values(1, 17, 3)), wanted, strict=True)
        ]
        out = function(*leaves)
        out.square().sum().backward()
        made.append([out, *(x.grad for x in leaves if x.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
