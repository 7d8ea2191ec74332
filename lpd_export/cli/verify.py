"""`lpd-export verify`: the options of a verification, its table and its verdict."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from lpd_export.cli.exit_codes import EXIT_FAILED
from lpd_export.cli.options import device_option, reference_options, verbosity_options
from lpd_export.cli.output import json_option, print_json
from lpd_export.cli.progress import stages


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--against",
    default="reference",
    show_default=True,
    metavar="reference|OTHER_BUNDLE",
    help="What the bundle is compared with.",
)
@reference_options
@click.option("--images", type=int, default=8, show_default=True, help="Images to compare.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of these images.")
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="METRIC=LIMIT",
    help="Another limit than the precision's; may be repeated.",
)
@click.option(
    "--by-layer", is_flag=True, help="Also compare the output of every layer, on the CPU."
)
@click.option("--bisect", is_flag=True, help="Find the fewest layers that must not be quantized.")
@click.option(
    "--save-phases",
    metavar="PHASE,...|all|none",
    help="Phases to leave for Polygraphy.  [default: a few, and the first that fails]",
)
@click.option(
    "--onnx", is_flag=True, help="Run the ONNX graphs on the CPU, not the engines made of them."
)
@device_option
@click.option("--threads", type=int, help="CPU threads.  [default: the physical cores]")
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder of the report.  [default: BUNDLE-verification]",
)
@verbosity_options
@json_option
def verify(
    bundle: Path,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compares a bundle with the PyTorch reference, phase by phase and end to end.

    Every phase is run on the same inputs through Polygraphy; whole images are drawn from the same
    random numbers. The exit code is 1 if a threshold of the bundle's precision does not hold.

    \b
    Examples:
      lpd-export verify engines/demo
      lpd-export verify engines/demo-int8 --images 64 --by-layer
      lpd-export verify engines/demo-fp16 --against engines/demo
      lpd-export verify engines/demo-int8 --threshold sequence_kl=0.005 --bisect
    """
    from lpd_export.accuracy.request import VerifyRequest

    request = VerifyRequest(bundle, **options)
    request.check()  # a slip is told before torch is loaded
    with stages(quiet, verbose) as (report, _):
        report("loading torch and Polygraphy")
        from lpd_export.accuracy.verify import verify as verify_bundle

        verification = verify_bundle(request, report)
    if as_json:
        print_json(verification.as_json())
    else:
        from rich.console import Console

        from lpd_export.accuracy.report import print_table

        print_table(verification, Console())
        click.echo(f"report: {request.folder / 'report.html'}")
    if not verification.passed:
        sys.exit(EXIT_FAILED)
