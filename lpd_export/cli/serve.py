"""`lpd-export serve`: bundles as an HTTP API and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lpd_export.cli.options import batching_options, device_option
from lpd_export.errors import UserError
from lpd_export.serving.request import ServeRequest


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 is every network.")
@click.option("--port", type=int, default=8000, show_default=True, help="0 is any free one.")
@batching_options("Images of a bundle that may wait; more are refused with 429.")
@click.option(
    "--api-key",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keys of which a client must give one, one a line.",
)
@device_option
@click.option("--threads", type=int, help="Of a CPU, for each bundle, or each replica of it.")
@click.option(
    "--replicas",
    type=int,
    help="Processes of each bundle on Ray Serve, on a GPU each or on their part of the cores; if "
    "one dies, it is replaced and no request lost.  [default: this process alone]",
)
@click.option(
    "--ray",
    is_flag=True,
    help="As --replicas: as many as Ray has GPUs, or for a CPU machines.",
)
def serve(bundles: tuple[str, ...], **options: Any) -> None:
    """Serves bundles: OpenAI's images API, a page for people, and figures for Prometheus.

    Requests of different users share batches, which does not change their images: each is the one
    that `lpd-export run` makes of the same class, seed, index and settings. A first Ctrl-C or
    SIGTERM lets what has begun be finished. With --replicas or --ray the images are made on the
    Ray cluster that RAY_ADDRESS names, or on this machine.

    \b
    Examples:
      lpd-export serve engines/demo
      lpd-export serve engines/lpd-l-256-fp16 engines/demo --host 0.0.0.0 --api-key keys.txt
      RAY_ADDRESS=auto lpd-export serve engines/lpd-l-256-fp16 --replicas 8
      curl localhost:8000/v1/images/generations --json '{"prompt": "heart", "seed": 0}'
    """
    request = ServeRequest(tuple(map(Path, bundles)), **options)
    request.check()
    request.keys()
    try:
        from lpd_export.serving.server import serve as start
    except ModuleNotFoundError as error:
        raise UserError(
            f"serving needs {error.name}, which is not installed: pip install 'lpd-export[serve]'"
        ) from error
    start(request, lambda line: click.echo(f"lpd-export: {line}", err=True))
