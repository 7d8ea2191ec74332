"""`lpd-export inspect`: what a bundle holds."""

from __future__ import annotations

import dataclasses
import shutil

import click

from lpd_export.bounds import Positive, checked
from lpd_export.cli.output import json_option, print_json
from lpd_export.errors import UserError


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--classes", is_flag=True, help="List the classes instead.")
@click.option("--check", is_flag=True, help="Verify alone, and say so in a line.")
@click.option(
    "--batch", type=int, default=1, show_default=True, help="Say how much memory this batch needs."
)
@json_option
def inspect(bundle: str, classes: bool, check: bool, batch: int, as_json: bool) -> None:
    """Says what a bundle holds, and verifies every file of it.

    With --check it also refuses a bundle with files that its manifest does not name.

    \b
    Example:
      lpd-export inspect engines/demo
      lpd-export inspect engines/demo --classes
      lpd-export inspect engines/demo --check
      lpd-export inspect engines/lpd-l-256 --batch 8
    """
    from lpd_export.bundle.inspection import class_lines, report_lines
    from lpd_export.bundle.manifest import Bundle

    checked("--batch", batch, Positive)
    opened = Bundle.open(bundle)
    limit = opened.manifest.max_batch
    if limit is not None and batch > limit:
        raise UserError(f"{bundle} takes batches of up to {limit} images, not {batch}")
    if classes:
        if as_json:
            print_json(opened.manifest.class_names)
        else:
            lines = list(class_lines(opened.manifest))
            fits = len(lines) < shutil.get_terminal_size().lines
            (click.echo if fits else click.echo_via_pager)("\n".join(lines))
        return
    files = opened.files()
    opened.schedule()
    if check:
        opened.check_nothing_else()
    if check and not as_json:
        click.echo(f"{bundle}: {len(files)} files, all whole")
    elif as_json:
        print_json({"bundle": bundle, "manifest": dataclasses.asdict(opened.manifest)})
    else:
        click.echo("\n".join(report_lines(opened, batch)))
