"""`lpd-export edit`: what of an image is made anew; everything else is as `run` has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from lpd_export.bounds import EditOrder
from lpd_export.cli.output import print_json
from lpd_export.cli.progress import image_progress
from lpd_export.cli.run import run
from lpd_export.edit_request import EditRequest
from lpd_export.pictures import Fit
from lpd_export.run_request import RunRequest, check_request


class Box(click.ParamType[tuple[int, ...]]):
    """X0,Y0,X1,Y1."""

    name = "box"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[int, ...]:
        try:
            left, top, right, bottom = map(int, value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not four whole numbers such as 16,0,48,32")
        return left, top, right, bottom


OF_RUN = {parameter.name: parameter for parameter in run.params}
OWN = [
    click.Option(["--mask"], metavar="FILE", help="White where the image is made anew."),
    click.Option(
        ["--box"], type=Box(), metavar="X0,Y0,X1,Y1", help="Made anew: a box of its pixels."
    ),
    click.Option(
        ["--outpaint"],
        type=int,
        metavar="PIXELS",
        help="Shrink the image by so many of the model's pixels on each side, and fill around it.",
    ),
    click.Option(
        ["--fit"],
        type=click.Choice(get_args(Fit)),
        default="crop",
        show_default=True,
        help="How image and mask become the model's square.",
    ),
    click.Option(
        ["--order"],
        type=click.Choice(get_args(EditOrder)),
        default="locality",
        show_default=True,
        help="How the new cells come: grown from the kept ones, or anyhow.",
    ),
    click.Option(
        ["--paste/--no-paste"],
        default=True,
        show_default=True,
        help="Keep the image's own pixels, or show what the decoder makes of its tokens.",
    ),
]
FIRST = ("bundle", "more_classes", "classes")
BULK = ("requests", "format", "per_file", "keep_going", "shard", "workers")
"""What an edit has not."""


@click.command(
    params=[
        OF_RUN["bundle"],
        click.Argument(["image"]),
        OF_RUN["more_classes"],
        OF_RUN["classes"],
        *OWN,
        *(parameter for name, parameter in OF_RUN.items() if name not in FIRST + BULK),
    ]
)
def edit(
    bundle: str,
    image: str,
    classes: tuple[str, ...],
    more_classes: tuple[str, ...],
    quiet: bool,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Makes a part of an image anew: what a mask, a box or a margin leaves out of it.

    IMAGE is any picture, token ids as .npy, or an image of an earlier run by its record
    (images/images.jsonl:3), whose tokens are exact. Without --class an image of a run stays of its
    class, another is of none. Written are a PNG each, a contact sheet with the original and the
    mask, and images.jsonl.

    \b
    Examples:
      lpd-export edit engines/demo face.png --box 32,0,64,64 -n 4 --out faces
      lpd-export edit engines/demo images/images.jsonl:0 --outpaint 16 --out wider
      lpd-export edit engines/lpd-l-256-fp32 cat.jpg --mask cat.png --class 207 --out dog
    """
    own = {parameter.name: options.pop(str(parameter.name)) for parameter in OWN}
    request = EditRequest(image, **own)
    request.check()
    chosen = [*classes, *more_classes] or [request.default_class()]
    of_run = RunRequest(Path(bundle), chosen, **options)
    check_request(of_run)
    with image_progress(quiet, verbose) as (report, advance):
        from lpd_export.run import generate_images  # once the mistakes are told

        result = generate_images(of_run, report, advance, request)
    for note in result.notes:
        click.echo(f"lpd-export: {note}", err=True)
    if as_json:
        print_json(result.as_json())
    else:
        click.echo(
            f"{result.made} edit{'s' * (result.made != 1)} in {result.seconds:.1f} s, written to "
            f"{of_run.out}; contact sheet {result.contact_sheet}"
        )
