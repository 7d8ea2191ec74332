"""`lpd-export bench`: the options of a benchmark, and its table."""

from __future__ import annotations

from pathlib import Path

import click

from lpd_export.bundle.manifest import Bundle
from lpd_export.cli.options import verbosity_options
from lpd_export.cli.output import json_option, print_json
from lpd_export.cli.progress import stages


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--batch", "batches", default="1", show_default=True, metavar="N,...", help="Batch sizes."
)
@click.option(
    "--roofline",
    "device_name",
    metavar="DEVICE",
    required=True,
    help="The least time on a device: cpu, which is measured, or by its data sheet a100, h100, "
    "h200, l4, l40s, rtx-4090, rtx-5090 or jetson-thor.",
)
@click.option("--threads", type=int, help="CPU threads.  [default: the physical cores]")
@verbosity_options
@json_option
def bench(
    bundle: Path,
    batches: str,
    device_name: str,
    threads: int | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Says how fast a bundle is, and the least time that a device allows.

    \b
    Examples:
      lpd-export bench engines/lpd-l-256 --roofline h100 --batch 1,16
    """
    from lpd_export.bench.devices import check_name
    from lpd_export.bench.request import read_batches

    opened = Bundle.open(bundle)
    check_name(device_name)
    sizes = read_batches(batches, opened)
    with stages(quiet, verbose) as (report, _):
        report("counting operations and bytes")
        from lpd_export.bench.devices import find_device
        from lpd_export.bench.roofline import print_roofline, roofline

        found = roofline(opened, find_device(device_name, threads), sizes)
    if as_json:
        print_json(found.as_json())
        return
    from rich.console import Console

    print_roofline(found, Console())
