"""Measure one suite and set it against the goals.

    python -m benchmarks.run --suite block|video|model|train|sample|data [--device cuda] [--out FILE.json]

Competitors of a suite take turns in one process, after those that compute the same were found to agree: outputs and
gradients (block, video, model; not the floor), gradients and how far weights go (train; not diffusers' DiT), latents
(sample). In `data` nothing is compared, and one way of reading measured after the other. Defaults are the goals'
settings, by device; `--suite NAME --help` lists what else a suite takes. Reading it: docs/performance.md.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks import block, data, model, sample, train
from benchmarks.goals import DEVICES, goals_table
from benchmarks.measure import check_device, describe_machine
from benchmarks.options import positive
from iwin_dit.files import write_json
from iwin_dit.training.runtime import keep_freed_memory


class Suite(Protocol):
    """What a module must have to be a suite."""

    def add_options(self, parser: argparse.ArgumentParser, suite: str, device: str) -> None:
        """Add the suite's options, with the defaults of the device; `repeats` must get one."""

    def prepare(self, arguments: argparse.Namespace) -> None:
        """Check what was asked for; ValueError where it cannot work."""

    def measure(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """Measure: `results`, those of `goals.Result`, and what else belongs into the JSON."""

    def tables(self, record: dict[str, Any]) -> str:
        """Format a record for the terminal and for Markdown."""


SUITES: Mapping[str, Suite] = {
    "block": block,
    "video": block,
    "model": model,
    "train": train,
    "sample": sample,
    "data": data,
}


def goals_of(record: dict[str, Any]) -> str:
    """The goals table of one record."""
    return goals_table(record["device"], {record["suite"]: record}, suites=[record["suite"]])


def build_parser(suite: str, device: str) -> argparse.ArgumentParser:
    """Build the command line of a suite.

    Args:
        suite: A key of `SUITES`.
        device: Chooses the defaults.

    Returns:
        The parser.
    """
    parser = _start(add_help=True)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=positive, help="rounds that are counted")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    if device == "cpu" and suite != "sample":  # as training does, and sampling does not
        keep = "leave freed memory to the C library, where training would ask it to keep it"
        parser.add_argument("--no-keep-memory", dest="keep_memory", action="store_false", help=keep)
    SUITES[suite].add_options(parser, suite, device)
    return parser


def _start(add_help: bool) -> argparse.ArgumentParser:
    """The options that decide which others there are."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Measure a suite.", add_help=add_help, allow_abbrev=False
    )
    parser.add_argument("--suite", required=True, choices=tuple(SUITES))
    parser.add_argument("--device", default="cpu", choices=tuple(DEVICES))
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, without a look at the machine; exits with a message where something cannot work.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The arguments, as the suite prepared them.
    """
    given, _ = _start(add_help=False).parse_known_args(argv)
    parser = build_parser(given.suite, given.device)
    arguments = parser.parse_args(argv)
    try:
        SUITES[arguments.suite].prepare(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = parse_arguments(argv)
    check_device(build_parser(arguments.suite, arguments.device), arguments.device)
    torch.set_num_threads(arguments.threads)
    if getattr(arguments, "keep_memory", False):
        keep_freed_memory()
    suite = SUITES[arguments.suite]
    record: dict[str, Any] = {
        "suite": arguments.suite,
        "device": arguments.device,
        "command": " ".join(["python -m benchmarks.run", *(sys.argv[1:] if argv is None else argv)]),
        "machine": describe_machine(torch.device(arguments.device)),
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("out", "shapes")},
    }
    record |= suite.measure(arguments)
    print(f"{suite.tables(record)}\n\n{goals_of(record)}")
    if arguments.out is not None:
        write_json(arguments.out, record)


if __name__ == "__main__":
    main()
