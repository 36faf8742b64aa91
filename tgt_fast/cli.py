"""The command line: ``tgt-fast demo digits`` and ``tgt-fast doctor``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tgt_fast.errors import TgtError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 (it could not be done), 2 (misuse), 130 (interrupted)."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        if given.command == "doctor":
            _doctor()
        else:
            _digits(given)
    except TgtError as error:
        print(f"tgt-fast: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tgt-fast: interrupted; nothing was written", file=sys.stderr)
        return 130
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
    digits = demos.add_parser(
        "digits",
        help="a small student learns scikit-learn's digits from 118 labels (needs the [demo] extra)",
        description="Train a teacher and, in seven ways, a student on scikit-learn's digits; write a report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    digits.add_argument(
        "--seeds", type=_seeds, default=argparse.SUPPRESS, metavar="N,N,...",
        help="the runs to average (default: 0,1,2; with --quick: 0)",
    )  # fmt: skip
    digits.add_argument("--quick", action="store_true", help="one seed and fewer steps: less than a minute")
    digits.add_argument("--curve", action="store_true", help="also train on fewer and on more labels")
    digits.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="folder of the report")
    digits.add_argument(
        "--json", type=Path, default=argparse.SUPPRESS, metavar="FILE", help="also write the numbers here"
    )
    commands.add_parser("doctor", help="what was built, what can run here, and why the rest cannot")
    return parser


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected different integers from 0 to 2^31 - 1, like 0,1,2; got {text!r}")
    return seeds


def _version() -> str:
    import tgt_fast

    return f"tgt-fast {tgt_fast.__version__}"


def _doctor() -> None:
    from rich.console import Console

    from tgt_fast.doctor import print_doctor

    print_doctor(Console())


def _digits(given: argparse.Namespace) -> None:
    from rich.console import Console

    from tgt_fast.demos.digits.command import run_command

    run_command(
        getattr(given, "seeds", None),
        given.quick,
        given.curve,
        given.out,
        getattr(given, "json", None),
        Console(),
    )


if __name__ == "__main__":
    sys.exit(main())
