"""The command line: finds the command that the user typed, and says how it went.

Does the talking and nothing else: each command is a module beside this one, loaded when it is
called, and hands its work to the package. Results go to standard output, everything else to
standard error. A user's mistake is one line; the codes are in `exit_codes`.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable

import click

from lpd_export.bounds import printable
from lpd_export.cli.exit_codes import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_MISTAKE,
    EXIT_READER_GONE,
)
from lpd_export.cli.streams import lossy_stderr
from lpd_export.errors import Interrupted, UserError

COMMANDS = (
    "build",
    "run",
    "merge",
    "edit",
    "serve",
    "triton",
    "verify",
    "bench",
    "evaluate",
    "schedule",
    "inspect",
    "doctor",
)
"""In the order of use; each is a function in the module of its name."""
DEAF_SECONDS = 1
"""After a Ctrl-C, so that the next does not stop the cleaning up before it begins."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `lpd-export`; ends the process."""
    # A polite kill or a closed terminal is answered like Ctrl-C: nothing half-written is left.
    interrupt = interrupter()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # What nohup or a script's `&` have us ignore stays ignored.
        if number and signal.getsignal(number) is not signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(number, interrupt)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(AttributeError, OSError):  # closed, or not a file
            stack.enter_context(lossy_stderr(sys.stderr.fileno()))
        sys.exit(run_command(arguments))


def run_command(arguments: list[str] | None) -> int:
    """Runs what was typed, says what went wrong with it, and gives the exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = say_warning
            return commands.main(arguments, prog_name="lpd-export", standalone_mode=False) or 0
    except UserError as error:
        return mistake(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_MISTAKE
    except click.ClickException as error:
        return mistake(error.format_message().rstrip("."), hint=help_hint(error))
    except Interrupted as stopped:
        click.echo(f"lpd-export: {one_line(stopped)}", err=True)
        return EXIT_INTERRUPTED
    except click.Abort:
        click.echo("lpd-export: interrupted", err=True)
        return EXIT_INTERRUPTED
    except ReaderGoneError:
        drop_output()
        return EXIT_READER_GONE
    except OSError as error:
        if error.filename is None:
            drop_output()
        what = f"use {error.filename}" if error.filename else "write the result"
        return mistake(f"cannot {what}: {error.strerror or error}")
    except Exception as error:
        for line in traceback.format_exc().splitlines():
            click.echo(printable(line), err=True)
        click.echo(
            f"lpd-export: {type(error).__name__}: {one_line(error)}: this is a fault of "
            "lpd-export, not of what you asked for; please report it, with the lines above and "
            "what `lpd-export doctor` says, as an issue of the repository that it came from",
            err=True,
        )
        return EXIT_FAULT


def drop_output() -> None:
    """Standard output is full or closed: what it still holds cannot go there either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a line for the user, without the place in the code that it comes from."""
    click.echo(f"lpd-export: {one_line(message)}", err=True)


def interrupter() -> Callable[[int, object], None]:
    """A signal handler like Python's for Ctrl-C; those that an impatient user adds are ignored."""
    last = -math.inf

    def interrupt(number: int, frame: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > DEAF_SECONDS:
            last = now
            raise KeyboardInterrupt

    return interrupt


def mistake(message: str, hint: str = "") -> int:
    """Says in one line what was wrong, and gives the exit code."""
    click.echo(f"lpd-export: error: {one_line(message)}{hint}", err=True)
    return EXIT_MISTAKE


def one_line(message: object) -> str:
    return printable(" ".join(str(message).split()))


def help_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see `{context.command_path} --help`)" if context else ""


class ReaderGoneError(Exception):
    """What reads standard output closed it."""


class LazyGroup(click.Group):
    """Commands that are imported when they are asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"lpd_export.cli.{name}"), name)
        return command

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except BrokenPipeError as error:  # click would exit with 1, and standard error is lossy
            raise ReaderGoneError from error

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(context, args)
        except click.NoSuchCommand:  # with what click would suggest, had it loaded them all
            raise click.NoSuchCommand(args[0], possibilities=COMMANDS, ctx=context) from None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lpd-export")
def commands() -> None:
    """Exports LPD image generators to ONNX, and generates images with them.

    \b
    Example:
      lpd-export build engines/demo.toml
      lpd-export run engines/demo --class heart --out hearts
    """
