"""`lpd-export serve`: bundles as an HTTP API and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lpd_export.cli.options import device_option
from lpd_export.errors import UserError
from lpd_export.serving.request import ServeRequest


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 is every network.")
@click.option("--port", type=int, default=8000, show_default=True, help="0 is any free one.")
@click.option(
    "--max-queue",
    type=int,
    default=256,
    show_default=True,
    help="Images of a bundle that may wait; more are refused with 429.",
)
@click.option(
    "--batch", type=int, help="Images made together at most.  [default: the bundle's limit, or 4]"
)
@click.option(
    "--max-wait",
    type=float,
    metavar="MS",
    default=5.0,
    show_default=True,
    help="Milliseconds that an image waits for others to share its batch.",
)
@click.option(
    "--api-key",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keys of which a client must give one, one a line.",
)
@device_option
@click.option("--threads", type=int, help="Of a CPU, for each bundle.")
def serve(bundles: tuple[str, ...], **options: Any) -> None:
    """Serves bundles: OpenAI's images API, a page for people, and figures for Prometheus.

    Requests of different users share batches, which does not change their images: each is the one
    that `lpd-export run` makes of the same class, seed, index and settings. A first Ctrl-C or
    SIGTERM lets what has begun be finished.

    \b
    Examples:
      lpd-export serve engines/demo
      lpd-export serve engines/lpd-l-256-fp16 engines/demo --host 0.0.0.0 --api-key keys.txt
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
