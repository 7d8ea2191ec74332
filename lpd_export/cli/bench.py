"""`lpd-export bench`: the options of a benchmark, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lpd_export.bundle.manifest import Bundle
from lpd_export.cli.options import device_option, reference_options, verbosity_options
from lpd_export.cli.output import json_option, print_json
from lpd_export.cli.progress import stages
from lpd_export.errors import UserError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--batch", "batches", default="1", show_default=True, metavar="N,...", help="Batch sizes."
)
@click.option(
    "--against",
    multiple=True,
    metavar="reference|OTHER_BUNDLE",
    help="What takes turns with the bundle; may be repeated.",
)
@reference_options
@click.option(
    "--runs", type=int, default=5, show_default=True, help="Timed rounds; one more warms up."
)
@click.option(
    "--roofline",
    metavar="DEVICE",
    help="Run nothing: tell the least time on a device, cpu, which is measured, or by its data "
    "sheet a100, h100, h200, l4, l40s, rtx-4090, rtx-5090 or jetson-thor.",
)
@device_option
@click.option("--threads", type=int, help="CPU threads.  [default: the physical cores]")
@click.option(
    "--details/--no-details",
    default=True,
    show_default=True,
    help="Also profile operators, and time processes of their own from their start.",
)
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder of a report as HTML."
)
@verbosity_options
@json_option
def bench(
    bundle: Path,
    batches: str,
    roofline: str | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Times a bundle by parts, beside the least time that the device allows.

    With --against, the reference or other bundles take turns with it in this process, and the
    ratios of pairs are told.

    \b
    Examples:
      lpd-export bench engines/demo --batch 1,4,16
      lpd-export bench engines/demo-int8 --against reference --against engines/demo --out speed
      lpd-export bench engines/lpd-l-256 --roofline h100 --batch 1,16
    """
    from lpd_export.bench.devices import check_name, find_device
    from lpd_export.bench.request import BenchRequest, read_batches

    opened = Bundle.open(bundle)
    sizes = read_batches(batches, opened)
    request = BenchRequest(bundle, sizes, **options)
    request.check()
    found: Any
    show: Any
    if roofline is not None:
        check_name(roofline)
        for option in ("against", "device", "out"):
            if options[option]:
                raise UserError(f"--roofline runs nothing: it does not go with --{option}")
        from lpd_export.bench.roofline import count, print_roofline

        with stages(quiet, verbose) as (report, _):
            report("counting operations and bytes")
            found = count(opened, find_device(roofline, request.threads), sizes)
        show = print_roofline
    else:
        with stages(quiet, verbose) as (report, _):
            report("loading torch")
            from lpd_export.bench.benchmark import bench as bench_bundle
            from lpd_export.bench.terminal import print_benchmark

            found = bench_bundle(request, report)
        show = print_benchmark
    if as_json:
        print_json(found.as_json())
        return
    from rich.console import Console

    show(found, Console())
    if request.out is not None:
        click.echo(f"report: {request.out / 'report.html'}")
