"""`lpd-export evaluate`: the options of an evaluation, and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lpd_export.build.request import CHOICES
from lpd_export.cli.options import device_option, verbosity_options
from lpd_export.cli.output import json_option, print_json
from lpd_export.cli.progress import stages
from lpd_export.evaluation.request import PER_CLASS, EvaluateRequest

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("images", metavar="BUNDLE|FOLDER|FILE.npz", type=FILE)
@click.option(
    "--against",
    metavar="STATISTICS.npz|FOLDER",
    type=FILE,
    help="Mean and covariance of features, as the ADM suite has them, or images.  [default: "
    "statistics.npz beside the bundle's checkpoint]",
)
@click.option(
    "--features",
    metavar="FILE",
    type=FILE,
    help="Weights of what sees the images: torch-fidelity's Inception, or a classifier.  [default: "
    "classifier.safetensors beside the bundle's checkpoint]",
)
@click.option(
    "--per-class",
    type=int,
    help=f"Images that a bundle generates of each class.  [default: {PER_CLASS}]",
)
@click.option("--seed", type=int, help="Of what a bundle generates.  [default: 0]")
@click.option("--cfg", type=float, help="Guidance scale.  [default: the bundle's]")
@click.option(
    "--guidance",
    type=click.Choice(CHOICES["guidance"]),
    help="How guidance grows over the tokens.  [default: the bundle's]",
)
@click.option("--temperature", type=float, help="[default: 1]")
@click.option("--top-k", type=int, help="Draw among the K most probable tokens.")
@click.option("--top-p", type=float, help="Draw among the fewest tokens of probability P together.")
@click.option("--batch", type=int, help="Images generated together.  [default: up to 4]")
@click.option("--schedule", metavar="FILE", help="Instead of the bundle's own.")
@device_option
@click.option("--threads", type=int, help="CPU threads.  [default: the physical cores]")
@click.option(
    "--save-statistics",
    metavar="FILE.npz",
    type=FILE,
    help="Also write mean and covariance of the images' features, for another --against.",
)
@click.option("--out", metavar="FILE.json", type=FILE, help="Also write the result as JSON.")
@verbosity_options
@json_option
def evaluate(images: Path, quiet: bool, verbose: bool, as_json: bool, **options: Any) -> None:
    """Measures images: Fréchet distance, inception score, precision and recall.

    Images are those of a folder, of an .npz (arr_0), or what a bundle generates, as many of each
    class. What was seen of them is kept: the same command goes on after it was stopped.

    \b
    Examples:
      lpd-export evaluate engines/demo
      lpd-export evaluate engines/lpd-l-256 --against adm_in256_stats.npz \\
          --features weights-inception-2015-12-05-6726825d.pth --batch 64 --device cuda
      lpd-export evaluate images.npz --against photos --features classifier.safetensors
    """
    request = EvaluateRequest(images, **options)
    request.check()
    with stages(quiet, verbose) as (report, advance):
        from lpd_export.evaluation.evaluate import evaluate as measure  # torch, after the mistakes

        result = measure(request, report, advance)
    if as_json:
        print_json(result.as_json())
    else:
        click.echo("\n".join(result.lines()))
