"""`lpd-export merge`: the shards of a run as one folder."""

from __future__ import annotations

from pathlib import Path

import click

from lpd_export.cli.output import json_option, print_json
from lpd_export.cli.progress import say


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path),
    help="New folder, or that of the same merge.",
)
@json_option
def merge(folder: Path, out: Path, as_json: bool) -> None:
    """Puts the shards of a run together: the files that one process would have written.

    DIR is what the runs with --shard had as their --out. All shards must be there, and whole.

    \b
    Example:
      lpd-export run engines/demo --class all -n 50 --shard 0/2 --out shards
      lpd-export run engines/demo --class all -n 50 --shard 1/2 --out shards
      lpd-export merge shards --out samples
    """
    from lpd_export.run import merge_shards

    result = merge_shards(folder, out, say)
    if as_json:
        print_json(result.as_json())
    else:
        failed = f"; {result.failed} failed" if result.failed else ""
        click.echo(f"{result.images} images of {result.shards} shards in {out}{failed}")
