"""The folder of a benchmark: report.html, whole in itself, and report.json.

Knows what the page is made of; its style is that of verifications.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from lpd_export.bench.request import RECORD, REPORT
from lpd_export.bench.results import Benchmark
from lpd_export.bench.tables import milliseconds, number
from lpd_export.bench.terminal import machine_line
from lpd_export.files import strict_json, write_atomically

_OPERATORS = 12
"""Of each graph."""


def write_report(found: Benchmark, folder: Path) -> Path:
    """Writes both files into a folder, which is made if need be; returns the path of the page.

    Raises:
        UserError: if they cannot be written.
    """
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader(f"lpd_export.{room}", "") for room in ("bench", "accuracy")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ms": milliseconds, "number": number}
    page = environment.get_template("report.html.jinja").render(
        found=found,
        first=found.batches[0],
        machine=machine_line(found),
        operators=_OPERATORS,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECORD, strict_json(found.as_json()).encode())
    write_atomically(folder / REPORT, page.encode())
    return folder / REPORT
