"""`lpd-export triton`: a model repository for NVIDIA's Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lpd_export.cli.options import batching_options, device_option
from lpd_export.cli.output import json_option, print_json


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="REPOSITORY",
    help="The folder to write, which is not there yet.",
)
@click.option(
    "--instances",
    type=int,
    default=1,
    show_default=True,
    help="Of each bundle, on the CPU or on each GPU.",
)
@batching_options("Requests that may wait; Triton refuses more.")
@device_option
@click.option("--threads", type=int, help="Of a CPU, for each instance.")
@json_option
def triton(bundles: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Writes a model repository for NVIDIA's Triton Inference Server.

    Each bundle becomes a model of its name: a copy of the bundle, config.pbtxt, and a model.py for
    Triton's Python backend, whose Python must have lpd-export. Triton batches the requests of its
    clients; an image is the one that `lpd-export run` makes.

    \b
    Example:
      lpd-export triton engines/demo --out repository
      tritonserver --model-repository repository
    """
    from lpd_export.serving.triton_repository import RepositoryRequest, write_repository

    out = write_repository(RepositoryRequest(tuple(map(Path, bundles)), **options))
    if as_json:
        models = sorted(model.name for model in out.iterdir())
        print_json({"repository": str(out), "models": models})
    else:
        click.echo(f"{out}: start it with `tritonserver --model-repository {out}`")
