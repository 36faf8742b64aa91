"""The command line, ``tgt-fast``: ``demo``, ``report``, ``bench``, ``profile``, ``reproduce``, ``cache`` and others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tgt_fast
from tgt_fast import _interrupted, reproduce
from tgt_fast.demos.catalog import DEMOS, Demo
from tgt_fast.errors import TgtError

# Those of bench/ops.py, which imports all that it measures
BENCH_OPS = ("distill", "latent", "explore", "linear", "topk", "tokens", "contrast", "listwise", "step")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 (it could not be done), 2 (misuse), 130 (interrupted)."""
    given = None
    try:
        _results().clear()
        given = _parser().parse_args(arguments)  # what only asks for help waits for no PyTorch
        tgt_fast._import_all()
        _interrupted.leave_to_main()
        if given.command == "doctor":
            _doctor()
        elif given.command == "cache":
            return _cache(given)
        elif given.command == "synthesize":
            _synthesize(given)
        elif given.command == "bench":
            return _bench(given)
        elif given.command == "profile":
            _profile(given)
        elif given.command == "reproduce":
            return reproduce.run(given)
        elif given.command == "report":
            _report(given)
        else:
            _demo(given)
    except TgtError as error:
        print(f"tgt-fast: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = given is not None and given.command in ("cache", "synthesize")  # what it has
        written = ", ".join(map(str, _results()))
        _interrupted.say("" if kept else f"after it wrote {written}" if written else _interrupted.NOTHING)
        return _interrupted.STATUS
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        sys.stderr.close()
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tgt-fast", description="Teacher-guided training for PyTorch.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="a complete example on real data, with a report")
    demos = demo.add_subparsers(dest="demo", required=True, metavar="DEMO")
    for one in DEMOS.values():
        _add_demo(demos, one)

    report = commands.add_parser(
        "report",
        help="a page of a training run, from its log, also while it runs",
        description="Write one HTML file of a run that fit(log=...) logs: curves, what its sampler makes, diagnostics, "
        "settings. Plots need tgt-fast[demo].",
    )
    report.add_argument("folder", type=Path, metavar="RUN_DIR", help="what fit(log=...) was given")
    report.add_argument(
        "--out", type=Path, default=argparse.SUPPRESS, metavar="FILE", help="the page (default: RUN_DIR/report.html)"
    )

    bench = commands.add_parser(
        "bench",
        help="how fast each op is here, beside plain copies and its rivals",
        description="Check each op against the float64 reference, time it, and show it beside a plain copy of as many "
        "bytes and beside the rivals that are installed. Exit status 1: a result of ours was wrong or failed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.add_argument(
        "--ops",
        type=_names,
        default=argparse.SUPPRESS,
        metavar="OP,...",
        help=f"{', '.join(BENCH_OPS)} (default: all)",
    )
    bench.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to measure")
    bench.add_argument("--shapes", choices=("quick", "full"), default="full", help="few small cases, or all of them")
    bench.add_argument(
        "--seconds",
        type=float,
        default=argparse.SUPPRESS,
        metavar="S",
        help="time for timing a case (default: 0.2 to 6)",
    )
    bench.add_argument(
        "--backends", type=_names, default="available", metavar="NAME,...", help="ours: native, triton, reference, ..."
    )
    bench.add_argument(
        "--rivals", type=_names, default="available", metavar="NAME,...",
        help="theirs: eager, compile, liger, orda, quack, cce, or none",
    )  # fmt: skip
    bench.add_argument("--json", type=Path, default=argparse.SUPPRESS, metavar="FILE", help="write the numbers here")
    bench.add_argument("--plot", type=Path, default=argparse.SUPPRESS, metavar="FILE", help="write a roofline PNG here")

    profile = commands.add_parser(
        "profile",
        help="where the time of a training step goes: a trace and a table",
        description="Run some steps of training, of yours or of a small teacher-guided one, under PyTorch's profiler; "
        "print where their time goes and write a Chrome trace.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    profile.add_argument("--out", type=Path, default=Path("profile"), metavar="DIR", help="folder of the trace")
    profile.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run the built-in step"
    )
    profile.add_argument("--steps", type=int, default=5, metavar="N", help="steps to trace, after a warm-up")
    profile.add_argument(
        "--mode", choices=("random", "gradient", "persistent", "prior"), default="gradient",
        help="of exploration, in the built-in step",
    )  # fmt: skip
    for name, gives in (
        ("objective", "(student, objective) or (student, objective, optimizer)"),
        ("data", "batches, as fit takes them"),
    ):
        profile.add_argument(
            f"--{name}", metavar="MODULE:FACTORY", default=argparse.SUPPRESS,
            help=f"profile your own step: a function without arguments that returns {gives}",
        )  # fmt: skip
    reproduce.add_parser(commands)
    _add_cache(commands)
    _add_synthesize(commands)
    commands.add_parser("doctor", help="what was built, what can run here, and why the rest cannot")
    return parser


def _add_demo(demos: argparse._SubParsersAction[argparse.ArgumentParser], demo: Demo) -> None:
    parser = demos.add_parser(
        demo.name,
        help=demo.summary,
        description=demo.description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--seeds", type=_seeds, default=argparse.SUPPRESS, metavar="N,N,...",
        help="the runs to average (default: 0,1,2; with --quick: 0)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help=demo.quick)
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="folder of the report")
    parser.add_argument(
        "--json", type=Path, default=argparse.SUPPRESS, metavar="FILE", help="also write the numbers here"
    )
    if demo.with_curve:
        parser.add_argument("--curve", action="store_true", help="also train on fewer and on more labels")
    if demo.with_recipes:
        parser.add_argument(
            "--with", dest="recipes", action="append", metavar="NAME",
            help="also train by this recipe, a loss or a long-tail method; again for another; 'all': every one, and an "
            "unknown name lists them",
        )  # fmt: skip
    if demo.with_cache:
        parser.add_argument(
            "--no-cache", dest="cache", action="store_false", default=argparse.SUPPRESS,
            help="use nothing that an earlier run kept in the user's cache folder, and keep nothing",
        )  # fmt: skip


def _add_cache(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    cache = commands.add_parser("cache", help="a teacher's outputs on disk, by sample id")
    verbs = cache.add_subparsers(dest="cache", required=True, metavar="VERB")
    build = verbs.add_parser(
        "build",
        help="ask a teacher about every sample that is not stored yet",
        description="Ask a teacher about every sample of a data set that the cache does not hold. Run it again to go "
        "on where it was interrupted; several may run at once, on a part of the data each.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    build.add_argument("folder", type=Path, help="of the cache; made if need be")
    for name, gives in (("teacher", "a teacher"), ("data", "batches (ids, x) or (ids, x, y)")):
        build.add_argument(
            f"--{name}", required=True, metavar="MODULE:FACTORY", default=argparse.SUPPRESS,
            help=f"a function without arguments that returns {gives}",
        )  # fmt: skip
    form = build.add_mutually_exclusive_group()
    form.add_argument("--topk", type=int, default=64, metavar="K", help="classes that a record lists")
    form.add_argument("--dense", action="store_true", help="store logits")
    build.add_argument("--temperature", type=float, default=2.0, metavar="T", help="of the records")
    build.add_argument("--tail", choices=("bucket", "renormalize", "uniform"), default="bucket", help="of the records")
    build.add_argument("--latents", action="store_true", help="store the encoder's latents, too")
    build.add_argument(
        "--dtype", choices=("float64", "float32", "bfloat16", "float16"), default=argparse.SUPPRESS,
        help="round outputs to this (default: not rounded)",
    )  # fmt: skip
    build.add_argument(
        "--teacher-version", default=argparse.SUPPRESS, metavar="NAME",
        help="stands for the code of teacher and transforms in the fingerprint (default: their sources)",
    )  # fmt: skip
    build.add_argument(
        "--batch-size", type=int, default=argparse.SUPPRESS, metavar="N",
        help="samples that the teacher is given at a time (default: those of a batch)",
    )  # fmt: skip
    for verb, does in (
        ("info", "what a cache holds"),
        ("verify", "compare all checksums; exit status 1: some are torn"),
    ):
        verbs.add_parser(verb, help=does).add_argument("folder", type=Path, help="of the cache")


def _add_synthesize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "synthesize",
        help="synthetic examples with the teacher's labels, made once and kept in a folder",
        description="Make synthetic examples from every sample of a data set and keep them, with what the teacher says "
        "of them, in a folder. Run it again to go on where it was stopped. The rows are the same, bit for bit, for any "
        "number of workers and every engine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    left_out: dict[str, Any] = {"default": argparse.SUPPRESS}
    for name, gives, required in (
        ("teacher", "a tgt.Teacher, or a tgt.LatentSampler, which has its own options", True),
        ("data", "batches (ids, x) or (ids, x, y), the same each time", True),
        ("student", "the student, for --mode gradient", False),
    ):
        parser.add_argument(
            f"--{name}", required=required, metavar="MODULE:FACTORY",
            help=f"a function without arguments that returns {gives}", **left_out,
        )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FOLDER", help="made if need be", **left_out)
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="synthetic examples a real one")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="part of the key of noise and of rows")
    parser.add_argument(
        "--topk", type=int, metavar="K", help="store records of K classes (default: logits)", **left_out
    )
    parser.add_argument("--latents", action="store_true", help="store the latents, too")
    parser.add_argument("--format", choices=("safetensors", "parquet"), default="safetensors", help="of the files")
    parser.add_argument("--shard-bytes", type=int, default=64 << 20, metavar="N", help="of rows in a file, about")
    parser.add_argument("--preview", type=int, metavar="N", help="make N examples, show them, store none", **left_out)

    work = parser.add_argument_group("workers")
    work.add_argument(
        "--engine", choices=("local", "torchrun", "ray"), default="local",
        help="processes of this machine; those of torchrun, which it starts unless it runs in one; a Ray Data pipeline",
    )  # fmt: skip
    work.add_argument("--workers", type=int, default=1, metavar="N", help="processes, a teacher each")
    work.add_argument("--gpus-per-worker", type=float, default=0, metavar="G", help="0: a worker computes on the CPU")
    work.add_argument("--threads", type=int, default=1, metavar="N", help="a worker's; last bits may depend on it")

    options = parser.add_argument_group("the sampler's options (defaults: those of tgt.LatentSampler)")
    options.add_argument("--mode", choices=("prior", "random", "gradient"), **left_out)
    options.add_argument("--units", choices=("std", "absolute"), **left_out)
    options.add_argument("--divergence", metavar="NAME", **left_out)
    for name in ("sigma", "step-size", "radius", "step-noise", "temperature", "truncation"):
        options.add_argument(f"--{name}", type=float, metavar="X", **left_out)
    for name in ("steps", "seed"):
        options.add_argument(f"--{name}", type=int, metavar="N", **left_out)
    options.add_argument(
        "--calibrate",
        type=int,
        default=64,
        metavar="N",
        help="first batches that the unit of --units std is measured on",
    )

    filters = parser.add_argument_group("filters: examples beyond a bound are dropped, and counted")
    filters.add_argument("--max-entropy", type=float, metavar="H", help="of the labeler, in nats", **left_out)
    filters.add_argument(
        "--min-agreement", type=float, metavar="P", help="of labels of an example and its reconstruction", **left_out
    )
    filters.add_argument("--max-distance", type=float, metavar="D", help="of latents after encoding again", **left_out)


def _results() -> dict[Path, None]:
    """Files that were written so far; the module is imported by commands that write."""
    written: dict[Path, None] = getattr(sys.modules.get("tgt_fast.report.output"), "written", {})
    return written


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected different integers from 0 to 2^31 - 1, like 0,1,2; got {text!r}")
    return seeds


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _version() -> str:
    return f"tgt-fast {tgt_fast.__version__}"


def _doctor() -> None:
    from rich.console import Console

    from tgt_fast.doctor import print_doctor

    print_doctor(Console())


def _cache(given: argparse.Namespace) -> int:
    from rich.console import Console

    from tgt_fast.cache import command

    console = Console()
    if given.cache == "info":
        command.info(given.folder, console)
    elif given.cache == "verify":
        return int(not command.verify(given.folder, console))
    else:
        command.build(
            given.folder,
            given.teacher,
            given.data,
            console,
            batch_size=getattr(given, "batch_size", None),
            k=None if given.dense else given.topk,
            temperature=given.temperature,
            tail=given.tail,
            latents=given.latents,
            dtype=command.dtype_named(getattr(given, "dtype", None)),
            version=getattr(given, "teacher_version", None),
        )
    return 0


def _synthesize(given: argparse.Namespace) -> None:
    from rich.console import Console

    from tgt_fast.synthesis import command

    command.run(vars(given), Console())


def _bench(given: argparse.Namespace) -> int:
    from tgt_fast.bench.command import run_bench
    from tgt_fast.bench.device import chosen_device
    from tgt_fast.bench.run import Plan
    from tgt_fast.bench.table import bench_console

    plan = Plan(
        device=chosen_device(given.device),
        quick=given.shapes == "quick",
        seconds=getattr(given, "seconds", None),
        backends=given.backends,
        rivals=given.rivals,
        **({"nouns": given.ops} if hasattr(given, "ops") else {}),
    )
    json, plot = getattr(given, "json", None), getattr(given, "plot", None)
    rows, _ = run_bench(plan, bench_console(), command=_command(given), json=json, plot=plot)
    return int(any(row.failed for row in rows))


def _command(given: argparse.Namespace) -> str:
    """The command that measures the same again; where the numbers went is left out."""
    said = {name: getattr(given, name, None) for name in ("ops", "device", "shapes", "seconds", "backends", "rivals")}
    usual = {"device": "auto", "shapes": "full", "backends": ("available",), "rivals": ("available",)}
    words = [
        f" --{name} {','.join(value) if isinstance(value, tuple) else value}"
        for name, value in said.items()
        if value is not None and value != usual.get(name)
    ]
    return "tgt-fast bench" + "".join(words)


def _profile(given: argparse.Namespace) -> None:
    from rich.console import Console

    from tgt_fast.bench.device import chosen_device
    from tgt_fast.bench.profile import run_profile

    own = {name: getattr(given, name, None) for name in ("objective", "data")}
    run_profile(given.out, chosen_device(given.device), given.steps, given.mode, Console(), **own)


def _report(given: argparse.Namespace) -> None:
    from tgt_fast.report import of_folder

    print(f"Report: {of_folder(given.folder, getattr(given, 'out', None))}")


def _demo(given: argparse.Namespace) -> None:
    from rich.console import Console

    from tgt_fast.demos.command import run_command

    run_command(
        DEMOS[given.demo],
        getattr(given, "seeds", None),
        given.quick,
        given.out,
        getattr(given, "json", None),
        Console(),
        curve=getattr(given, "curve", False),
        recipes=getattr(given, "recipes", None) or (),
        cache=getattr(given, "cache", True),
    )


if __name__ == "__main__":
    sys.exit(main())
