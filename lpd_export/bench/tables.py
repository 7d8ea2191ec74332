"""Tables on the terminal, with bars. Knows rich; not what is shown."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

BAR = 20  # columns of the longest


def short_table(*headings: str, left: int) -> Table:
    """A table whose first columns are words, the others numbers, and one without a title a bar."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for place, heading in enumerate(headings):
        words = place < left or not heading
        table.add_column(Text(heading), justify="left" if words else "right", no_wrap=True)
    return table


def number(value: float) -> str:
    """Three digits: 0.00123, 12.3, 1,234; of what is next to nothing one and its power of ten."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.3g}" if value >= 1e-4 else f"{value:.0e}"


def milliseconds(seconds: float) -> str:
    return number(1e3 * seconds)


def bar(least: float, seconds: float, longest: float) -> Text:
    """A bar for a time on a scale to `longest`, the part of it that is the least in full colour."""
    whole = round(BAR * seconds / longest)
    full = min(whole, round(BAR * least / longest))
    return Text.assemble(("█" * full, "blue"), ("░" * (whole - full), "blue"))
