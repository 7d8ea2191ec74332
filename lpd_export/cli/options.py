"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from lpd_export.bounds import DEVICE

Command = Callable[..., Any]


class Device(click.ParamType[str]):
    """`cpu`, `cuda`, or `cuda:1` for one of several GPUs."""

    name = "device"

    def convert(
        self, value: str, parameter: click.Parameter | None, context: click.Context | None
    ) -> str:
        if not DEVICE.fullmatch(value):
            self.fail(f"{value!r} is not cpu, cuda, or a GPU by its number such as cuda:1")
        return value


def device_option(function: Command) -> Command:
    return click.option(
        "--device",
        type=Device(),
        metavar="cpu|cuda|cuda:N",
        help="Where ONNX Runtime runs the graphs; engines run on a GPU.  [default: cpu]",
    )(function)


def batching_options(queue_help: str) -> Callable[[Command], Command]:
    """Adds `batch`, `max_queue` and `max_wait`, how requests come to share batches."""
    batch = click.option(
        "--batch",
        type=int,
        help="Images made together at most.  [default: the bundle's limit, or 4]",
    )
    queue = click.option("--max-queue", type=int, default=256, show_default=True, help=queue_help)
    wait = click.option(
        "--max-wait",
        type=float,
        metavar="MS",
        default=5.0,
        show_default=True,
        help="Milliseconds that an image waits for others to share its batch.",
    )
    return lambda function: batch(queue(wait(function)))


def reference_options(function: Command) -> Command:
    """Adds `checkpoint` and `tokenizer`, what the reference is made of."""
    checkpoint = click.option(
        "--checkpoint",
        metavar="FILE|hf:ORG/NAME",
        help="The reference's LPD weights.  [default: those that the bundle was made from]",
    )
    tokenizer = click.option(
        "--tokenizer", metavar="FILE|hf:ORG/NAME/FILE", help="The reference's tokenizer, likewise."
    )
    return checkpoint(tokenizer(function))


def verbosity_options(function: Command) -> Command:
    """Adds `quiet` and `verbose`, which the showing of progress takes."""
    verbose = click.option(
        "-v", "--verbose", is_flag=True, help="Tell every step, also where there is no terminal."
    )
    return click.option("-q", "--quiet", is_flag=True, help="No progress.")(verbose(function))
