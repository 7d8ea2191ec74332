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
import warnings
from collections.abc import Callable

import click

from lpd_export.cli.exit_codes import EXIT_INTERRUPTED, EXIT_MISTAKE
from lpd_export.errors import Interrupted, UserError

COMMANDS = ("build", "run", "verify", "schedule", "inspect", "doctor")
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
    try:
        with warnings.catch_warnings():
            warnings.showwarning = say_warning
            commands.main(arguments, prog_name="lpd-export", standalone_mode=False)
    except UserError as error:
        fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(EXIT_MISTAKE)
    except click.ClickException as error:
        fail(error.format_message().rstrip("."), hint=help_hint(error))
    except Interrupted as stopped:
        click.echo(f"lpd-export: {stopped}", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except click.Abort:
        click.echo("lpd-export: interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        if error.filename is None:
            # Standard output is full or closed: what it still holds cannot go there either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        what = f"use {error.filename}" if error.filename else "write the result"
        fail(f"cannot {what}: {error.strerror or error}")


def say_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a line for the user, without the place in the code that it comes from."""
    click.echo(f"lpd-export: {message}", err=True)


def interrupter() -> Callable[[int, object], None]:
    """A signal handler like Python's for Ctrl-C, deaf to those that an impatient user adds."""
    last = -math.inf

    def interrupt(number: int, frame: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > DEAF_SECONDS:
            last = now
            raise KeyboardInterrupt

    return interrupt


def fail(message: str, hint: str = "") -> None:
    """Says in one line what was wrong, and exits."""
    one_line = " ".join(message.split())
    click.echo(f"lpd-export: error: {one_line}{hint}", err=True)
    sys.exit(EXIT_MISTAKE)


def help_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see `{context.command_path} --help`)" if context else ""


class LazyGroup(click.Group):
    """Commands that are imported when they are asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"lpd_export.cli.{name}"), name)
        return command

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
