"""`lpd-export build`: the options of a bundle's build."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from lpd_export.build.recipes import named_recipe
from lpd_export.build.request import CHOICES, BuildRequest
from lpd_export.cli.options import verbosity_options
from lpd_export.cli.output import json_option, print_json
from lpd_export.cli.progress import stages


@click.command()
@click.argument("recipe", required=False)
@click.option("--res", type=int, help="Resolution in pixels; 256 alone means the published lpd-l.")
@click.option("--model", help="Published model: lpd-l, lpd-xl or lpd-xxl.")
@click.option("--steps", type=int, help="Steps an image; by default the published number.")
@click.option("--checkpoint", metavar="FILE|hf:ORG/NAME", help="LPD weights.")
@click.option("--tokenizer", metavar="FILE|hf:ORG/NAME/FILE", help="VQ tokenizer weights.")
@click.option("--heads", type=int, help="Attention heads, if not the model's width / 64.")
@click.option(
    "--classes",
    metavar="FILE.json",
    help="Class names: a JSON list. By default classes.json beside the checkpoint, or ImageNet's.",
)
@click.option(
    "--schedule",
    metavar="FILE",
    help="Schedule: an .npz of `schedule make`, or a JSON list of orders with --steps.",
)
@click.option("--orders", type=int, help="Orders to make for the schedule.  [default: 64]")
@click.option("--repulsion", type=int, help="Repulsion threshold of these orders.")
@click.option("--cfg", type=float, help="Guidance scale to recommend in the bundle.")
@click.option(
    "--guidance",
    type=click.Choice(CHOICES["guidance"]),
    help="How guidance grows over the tokens.  [default: linear]",
)
@click.option(
    "--precision",
    type=click.Choice(CHOICES["precision"]),
    help="Of weights and activations.  [default: fp32]",
)
@click.option(
    "--keep-layers",
    metavar="FILE.json",
    help="INT8: leave these layers in higher precision, as found by `verify --bisect`.",
)
@click.option(
    "--backend",
    type=click.Choice(CHOICES["backend"]),
    help="What runs the bundle.  [default: onnxruntime]",
)
@click.option(
    "--max-batch",
    type=int,
    help="Largest batch.  [default: any for onnxruntime, 8 for engines]",
)
@click.option("--workspace", type=int, metavar="MIB", help="Engines: scratch memory of a kernel.")
@click.option("--optimization-level", type=int, metavar="0-5", help="Engines: how long to search.")
@click.option("--timing-cache", metavar="FILE", help="TensorRT: kernel timings to use and add to.")
@click.option(
    "--hardware-compatible", is_flag=True, default=None, help="TensorRT: for Ampere and later."
)
@click.option(
    "--compute-capability",
    multiple=True,
    metavar="8.9",
    help="TensorRT-RTX: a GPU to compile for; may be repeated.",
)
@click.option(
    "--random-weights", is_flag=True, default=None, help="A full-size model without a checkpoint."
)
@click.option("--seed", type=int, help="Of the orders and of random weights.  [default: 0]")
@click.option(
    "--out",
    metavar="DIR",
    help="The bundle.  [default: engines/MODEL-RES-PRECISION, or the recipe's name beside it]",
)
@click.option("--force", is_flag=True, default=None, help="Replace the bundle if there is one.")
@click.option("--dry-run", is_flag=True, help="Say what would be built; make and fetch nothing.")
@verbosity_options
@json_option
def build(
    recipe: str | None, dry_run: bool, quiet: bool, verbose: bool, as_json: bool, **options: Any
) -> None:
    """Makes a bundle from a checkpoint, from a RECIPE's settings, or from both.

    RECIPE is a TOML file, or the name of one that comes with lpd-export, such as lpd-xl-512 or
    lpd-l-256-int8.

    Options override the recipe's settings. The architecture and the resolution are read off the
    weights; a --res of another grid resizes the model's positions.

    \b
    Examples:
      lpd-export build --res 256
      lpd-export build --checkpoint lpd_l_256.pth --tokenizer vq_ds16_c2i.pt
      lpd-export build --model lpd-l --res 512 --random-weights --out engines/test
      lpd-export build --res 256 --precision fp16 --backend tensorrt-rtx
      lpd-export build lpd-l-256 --backend tensorrt-rtx --dry-run
      lpd-export build engines/demo.toml --force
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    request = BuildRequest(**((named_recipe(recipe, given) if recipe else {}) | given))
    from lpd_export.build.refusals import check_request

    check_request(request)  # a slip is told before torch is loaded
    if dry_run:
        tell_plan(request, as_json)
        return
    with stages(quiet, verbose) as (report, advance):
        report("loading torch and onnx")
        from lpd_export.build.build import build as build_bundle

        out = build_bundle(request, report, advance)
    if as_json:
        from lpd_export.bundle.manifest import Bundle

        print_json({"bundle": str(out), "manifest": dataclasses.asdict(Bundle.open(out).manifest)})
    else:
        click.echo(f"{out}: {folder_size(out) / 1e6:.0f} MB")


def tell_plan(request: BuildRequest, as_json: bool) -> None:
    from lpd_export.build.plan import plan

    planned = plan(request)
    if as_json:
        print_json(dataclasses.asdict(planned))
    else:
        click.echo("\n".join(planned.lines()))


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
