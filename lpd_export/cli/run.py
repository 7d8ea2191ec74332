"""`lpd-export run`: the options of a run, and what is said of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from lpd_export.build.request import CHOICES
from lpd_export.cli.options import device_option, verbosity_options
from lpd_export.cli.output import json_option, print_json
from lpd_export.cli.progress import image_progress
from lpd_export.run_request import ImageFormat, RunRequest, check_request


@click.command()
@click.argument("bundle", type=click.Path())
@click.argument("more_classes", nargs=-1, metavar="")
@click.option(
    "--class",
    "classes",
    multiple=True,
    metavar="NAME|ID ...",
    help="What to draw: names or numbers; `all` is every class, `none` no class.",
)
@click.option(
    "-n", "--per-class", "count", type=int, default=1, show_default=True, help="Images a class."
)
@click.option(
    "--requests",
    metavar="FILE.jsonl|csv",
    help="What to draw, a line or row each: class, and if need be count, seed, index, cfg, "
    "guidance, temperature, top_k, top_p; an edit's image, mask, box, outpaint, fit, order, paste.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same images.")
@click.option("--cfg", type=float, help="Guidance scale.  [default: the bundle's]")
@click.option(
    "--guidance",
    type=click.Choice(CHOICES["guidance"]),
    help="How guidance grows over the tokens.  [default: the bundle's]",
)
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=int, help="Draw among the K most probable tokens.")
@click.option("--top-p", type=float, help="Draw among the fewest tokens of probability P together.")
@click.option("--batch", type=int, help="Images generated together.  [default: up to 4]")
@click.option("--schedule", metavar="FILE", help="Instead of the bundle's own.")
@click.option("--steps", type=int, help="With a --schedule that is a JSON list of orders.")
@device_option
@click.option("--threads", type=int, help="CPU threads.  [default: the physical cores]")
@click.option("--save-tokens", metavar="FILE.npy", help="Also save the token ids [images, cells].")
@click.option(
    "--trace", is_flag=True, help="Also save each image after each of its steps, in DIR/trace."
)
@click.option(
    "--format",
    type=click.Choice(get_args(ImageFormat)),
    default="png",
    show_default=True,
    help="A PNG each, .tar shards by WebDataset's convention, or images.npz with uint8 arr_0 "
    "[N, H, W, 3].",
)
@click.option(
    "--per-file",
    type=int,
    help="Images a .tar, or a folder of PNGs.  [default: 1000; up to 10,000 PNGs in one folder]",
)
@click.option(
    "--shard",
    metavar="I/N|auto",
    help="Make part I of N, from 0, in a folder of its own in DIR; `auto` asks RANK and WORLD_SIZE "
    "or SLURM's array. `lpd-export merge` puts them together.",
)
@click.option(
    "--workers",
    type=int,
    help="Processes that make images on Ray Data, one a GPU or a part of the cores; RAY_ADDRESS "
    "names a cluster.",
)
@click.option(
    "--keep-going",
    is_flag=True,
    help="Record an image whose logits are not finite in failures.jsonl, and make the others.",
)
@click.option(
    "--resume",
    is_flag=True,
    expose_value=False,
    help="Not needed any more: the same command goes on.",
)
@click.option("--out", metavar="DIR", required=True, help="New folder, or that of the same run.")
@verbosity_options
@json_option
def run(
    bundle: str,
    classes: tuple[str, ...],
    more_classes: tuple[str, ...],
    quiet: bool,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Generates images: a PNG each, a contact sheet, and images.jsonl.

    Stopped or killed at any moment, the same command goes on, and ends with the same bytes.

    With --trace one sees how the steps fill an image in: it is decoded after each of them, cells
    that are not there yet left blank.

    \b
    Examples:
      lpd-export run engines/demo --class heart clock -n 4 --out images
      lpd-export run engines/lpd-l-256-fp32 --class 207 "red panda" --seed 1 --out images
      lpd-export run engines/demo --class heart --trace --out steps
      lpd-export run engines/demo --class all --per-class 50 --format npz --out samples
      lpd-export run engines/demo --class all --per-class 50 --shard 0/8 --out shards
    """
    request = RunRequest(Path(bundle), [*classes, *more_classes], **options)
    check_request(request)
    with image_progress(quiet, verbose) as (report, advance):
        from lpd_export.run import TRACES, generate_images  # once the mistakes are told

        result = generate_images(request, report, advance)
    for note in result.notes:
        click.echo(f"lpd-export: {note}", err=True)
    if as_json:
        print_json(result.as_json())
    else:
        steps = f"; steps in {request.out / TRACES}" if request.trace else ""
        sheet = f"; contact sheet {result.contact_sheet}" if result.contact_sheet else ""
        click.echo(
            f"{result.made} image{'s' * (result.made != 1)} in {result.seconds:.1f} s, written to "
            f"{result.out}{sheet}{steps}"
        )
