"""`lpd-export doctor`: what this machine can do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from lpd_export.cli.output import json_option, print_json


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Says what this machine can build and run, and what to install for the rest.

    \b
    Example:
      lpd-export doctor
    """
    from lpd_export.machine.doctor import examine, report_lines

    diagnosis = examine(Path("engines"))
    if as_json:
        print_json(dataclasses.asdict(diagnosis))
    else:
        for line in report_lines(diagnosis):
            click.echo(line)
