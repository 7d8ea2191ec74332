"""What commands print on standard output when they are asked for JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from lpd_export.files import strict_json


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."
    )(function)


def print_json(result: Any) -> None:
    """Strict JSON: what is not a number is null."""
    click.echo(strict_json(result))
