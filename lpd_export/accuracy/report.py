"""What `lpd-export verify` shows: a table on the terminal, and a folder with a report to keep.

Knows how measurements are worded and laid out: rows, columns, digits, what is named first. Steps
count from 1; the number in `phase_00` is that of the file. The drawing is in `plots`, the page in
`report.html.jinja`. Does not know how anything was measured.
"""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lpd_export.accuracy import plots
from lpd_export.accuracy.request import IMAGES, RECORD, REFERENCE, REPORT
from lpd_export.accuracy.results import (
    ImagePair,
    LayerError,
    Measurement,
    Verification,
    step_of,
)
from lpd_export.accuracy.thresholds import JUDGED, METRICS, met
from lpd_export.files import check_writable, strict_json, write_atomically
from lpd_export.images import Pixels, save_png

AMPLIFICATION = 8
"""Of the differences of images, which are else too dark to see."""

_IN_WORDS, _IN_LINE = ("at most\n", "at least\n"), ("at most ", "at least ")
_SIGNS = ("≤ ", "≥ ")  # on the page; not every terminal has them
_FAILURES_LISTED = 5  # on the terminal
_FAILURES_OPEN, _FAILURES_SHOWN = 12, 200  # on the page: at once, and when they are asked for
_ROWS_UNFOLDED, _ROWS_FOLDED = 24, 8
_LAYERS_LISTED = 10
_NOTICEABLE = 0.01  # of a graph's largest error: where less than that grows, it is noise
_ENLARGED_TO = 128  # pixels: about what small images are enlarged to on the page
_LARGEST_SIDE = 320  # pixels: how wide an image is on the page at most


# ------------------------------------------------------------------------------ the terminal


def print_table(verification: Verification, console: Console) -> None:
    """Shows what is quantized, every phase's worst values, the verdict, and where the error grows.

    Values beyond their limit are red and followed by it. Where many phases pass, neighbouring
    ones that do share a row, with the worst values of them. Without a terminal it is plain text.
    It is made for 80 columns.
    """
    limits = verification.limits.by_metric
    metrics = _decode_metrics(verification)
    if verification.quantized:
        console.print(Text(f"{verification.quantized}\n"), soft_wrap=True)
    if metrics:
        headings = (
            textwrap.fill(METRICS[metric].title, 7, break_long_words=False) for metric in metrics
        )
        table = _table("step", "phase", *headings, left=2)
        for phases in _folded(verification):
            first, last = phases[0], phases[-1]
            names = (str(step_of(first)), first)
            if len(phases) > 1:
                names = (f"{names[0]}\nto {step_of(last)}", f"{first}\nto {last}")
            worst = _worst_by_metric(verification, phases)
            table.add_row(*names, *(_text(worst.get(metric)) for metric in metrics))
        table.add_section()
        bounds = (_bound(metric, limits[metric], _IN_WORDS) for metric in metrics)
        table.add_row("limit", "", *bounds, style="dim")
        console.print(table)
        console.print()
    others = _other_worst(verification)
    if others:
        table = _table("", "", "value", "limit", left=2)
        for entry in others:
            bound = _bound(entry.metric, entry.limit, _IN_LINE)
            title = METRICS[entry.metric].title
            table.add_row(entry.phase, title, _text(entry, " "), Text(bound, "dim"))
        console.print(table)
        console.print()
    if verification.reported:
        table = _table("", "reported, without a limit", "value", left=2)
        for figure in verification.reported:
            table.add_row(figure.phase, METRICS[figure.metric].title, _significant(figure.value))
        console.print(table)
        console.print()
    for line in _verdict(verification):
        console.print(line, soft_wrap=True)
    if verification.layers:
        _print_layers(verification, console)
    if verification.bisections:
        console.print()
        for found in _bisection_lines(verification):
            console.print(Text(found), soft_wrap=True)


def _print_layers(verification: Verification, console: Console) -> None:
    grown = grown_layers(verification.layers)
    if not grown:
        console.print("\nno layer's error is larger than that of the layers that feed it")
        return
    where = f" (decode: {_place(verification.layers_phase)})" if verification.layers_phase else ""
    console.print(Text(f"\nwhere the error grows most{where}:"))
    table = _table("graph", "layer", "relative error", "growth", left=2)
    for layer in grown:
        error = _significant(layer.relative_error, 2)
        table.add_row(layer.graph, Text(layer.layer), error, _growth(layer))
    console.print(table)


def _table(*headings: str, left: int = 1) -> Table:
    """A table whose first columns are aligned left, and whose other columns hold numbers."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for place, heading in enumerate(headings):
        numbers = place >= left
        table.add_column(
            Text(heading),
            justify="right" if numbers else "left",
            no_wrap=numbers or place == 0,
            overflow="fold",
        )
    return table


def _text(entry: Measurement | None, separator: str = "\n") -> Text:
    """A value; one that failed is red and followed by its limit."""
    if entry is None:
        return Text("-", "dim")
    if entry.passed:
        return Text(_shown(entry))
    return Text(f"{_shown(entry)}{separator}{_breach(entry, separator)}", "bold red")


def _folded(verification: Verification) -> list[list[str]]:
    """The decode phases that share a row: each for itself, or neighbours if many pass."""
    phases = [phase for phase in verification.phases if step_of(phase)]
    failed = {entry.phase for entry in verification.failures}
    if len(phases) - len(failed.intersection(phases)) <= _ROWS_UNFOLDED:
        return [[phase] for phase in phases]
    rows: list[list[str]] = []
    for bad, neighbours in groupby(phases, failed.__contains__):
        run, size = list(neighbours), 1 if bad else _ROWS_FOLDED
        rows += [run[start : start + size] for start in range(0, len(run), size)]
    return rows


def _verdict(verification: Verification) -> Iterator[Text]:
    """The verdict in a line; then further failures, limits of the user's, remarks, a line each."""
    precision, changes = verification.limits.precision, _changes(verification)
    if verification.passed:
        of = "" if changes else f" of {precision}"
        holds = f": every threshold{of} holds for {_images(verification)}"
        yield Text.assemble(("passed", "bold green"), holds)
    else:
        first, *more = verification.failures
        yield Text.assemble(("FAILED", "bold red"), f": {_failure(first)}")
        if more:
            yield Text(f"and {len(more)} more:")
        listed = more[: _FAILURES_LISTED - 1]
        yield from (Text(f"  {_failure(entry)}") for entry in listed)
        if len(more) > len(listed):
            yield Text(f"  ... {len(more) - len(listed)} are not listed here")
    if changes:
        yield Text(f"judged by other limits than those of {precision}:")
        yield from (Text(f"  {change}") for change in changes)
    yield from (Text(f"remark: {remark}") for remark in verification.remarks)


def _bisection_lines(verification: Verification) -> Iterator[str]:
    """Which layers must stay in higher precision, a line a graph."""
    for found in verification.bisections:
        if found.kept is None:
            yield f"{found.graph}: the thresholds fail even with every layer in higher precision"
        elif found.kept:
            layers = ", ".join(found.kept)
            yield (
                f"{found.graph}: {len(found.kept)} of {found.layers} layers must stay in higher "
                f"precision: {layers}"
            )
        else:
            yield f"{found.graph}: all {found.layers} layers can be quantized"


def _failure(entry: Measurement) -> str:
    asked = _bound(entry.metric, entry.limit, _IN_LINE)
    return f"{_place(entry.phase)}, {entry.tensor}: {entry.metric} {_shown(entry)}, {asked}"


# --------------------------------------------------------------------------------- the report


def write_report(verification: Verification, folder: Path, commands: Mapping[str, str]) -> Path:
    """Writes report.html, report.json and images/ into a folder, which is made if need be.

    report.html is whole in itself: plots and images are in it, and it fetches nothing. report.json
    is strict JSON, null standing for what is not a finite number. images/ has three PNG a pair:
    expected, actual and difference (see `difference`). report.html is written last.

    Args:
        verification: what was found.
        folder: where to write; of files that are there, those of these names are replaced.
        commands: command lines of plain Polygraphy, by phase.

    Returns:
        The path of report.html.

    Raises:
        UserError: if the folder or a file cannot be written.
        ValueError: if the images of a pair differ in shape.
    """
    differences = [difference(pair.expected, pair.actual) for pair in verification.pairs]
    page = _page(verification, commands, differences)
    record = strict_json(verification.as_json())
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if verification.pairs:
        (folder / IMAGES).mkdir(exist_ok=True)
    for number, (pair, differing) in enumerate(zip(verification.pairs, differences, strict=True)):
        for name, pixels in (
            ("expected", pair.expected),
            ("actual", pair.actual),
            ("difference", differing),
        ):
            save_png(pixels, folder / IMAGES / f"pair_{number:02d}_{name}.png")
    write_atomically(folder / RECORD, record.encode())
    write_atomically(folder / REPORT, page.encode())
    return folder / REPORT


def difference(expected: Pixels, actual: Pixels) -> Pixels:
    """Absolute difference of two images [H, W, 3] uint8, AMPLIFICATION times, clipped to 255.

    Black is equal. Raises ValueError if the images differ in shape.
    """
    if expected.shape != actual.shape:
        raise ValueError(f"images of shape {expected.shape} and {actual.shape} have no difference")
    amplified = AMPLIFICATION * np.abs(expected.astype(np.int32) - actual.astype(np.int32))
    return np.minimum(amplified, 255).astype(np.uint8)


def grown_layers(layers: Sequence[LayerError], count: int = _LAYERS_LISTED) -> list[LayerError]:
    """The layers where the error grows most, the most first.

    Of each graph, the first layer whose error is not finite comes before all others, and those
    after it, which it explains, are left out. So are layers with an error below a hundredth of the
    largest finite one of their graph: between errors that come to nothing, growth means nothing.
    """
    broken: dict[str, LayerError] = {}
    largest: dict[str, float] = {}
    for layer in layers:
        if math.isfinite(layer.relative_error):
            largest[layer.graph] = max(largest.get(layer.graph, 0.0), layer.relative_error)
        else:
            broken.setdefault(layer.graph, layer)
    grown = [
        layer
        for layer in layers
        if math.isfinite(layer.relative_error)
        and layer.relative_error >= _NOTICEABLE * largest[layer.graph]
        and layer.growth > 1
    ]
    grown.sort(key=lambda layer: layer.growth, reverse=True)
    return [*broken.values(), *grown][:count]


def _page(
    verification: Verification, commands: Mapping[str, str], differences: Sequence[Pixels]
) -> str:
    environment = Environment(
        loader=PackageLoader("lpd_export.accuracy", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        place=_place,
        title=lambda metric: METRICS[metric].title,
        shown=_shown,
        breach=_breach,
        significant=_significant,
        growth=_growth,
    )
    phases = [phase for phase in verification.phases if step_of(phase)]
    worst = {phase: _worst_by_metric(verification, [phase]) for phase in phases}
    layers, grown = verification.layers, grown_layers(verification.layers)
    first = verification.failures[0].phase if verification.failures else ""
    return environment.get_template("report.html.jinja").render(
        verification=verification,
        limits=verification.limits,
        bound=lambda metric: _bound(metric, verification.limits.limit(metric), _SIGNS),
        metrics_by_name=METRICS,
        judged=JUDGED,
        against=_against(verification),
        images=_images(verification),
        versions=", ".join(f"{name} {text}" for name, text in verification.versions.items()),
        decisions=verification.decisions,
        bisections=list(_bisection_lines(verification)),
        changes=_changes(verification),
        failures=verification.failures[:_FAILURES_SHOWN],
        failures_open=_FAILURES_OPEN,
        metrics=_decode_metrics(verification),
        phases=[(step_of(phase), phase, worst[phase]) for phase in phases],
        others=_other_worst(verification),
        plots=_plots(verification, worst),
        parted=_parted(verification),
        layer_plots={
            graph: plots.errors_by_layer(
                *([each for each in some if each.graph == graph] for some in (layers, grown))
            )
            for graph in dict.fromkeys(layer.graph for layer in layers)
        },
        grown=grown,
        pairs=list(map(_pair, verification.pairs, differences)),
        amplification=AMPLIFICATION,
        # Those of the phase that failed first before all others.
        commands=sorted(commands.items(), key=lambda command: command[0] != first),
    )


def _plots(
    verification: Verification, worst: Mapping[str, Mapping[str, Measurement]]
) -> dict[str, str]:
    """The plots that there is something to draw in, by name; worst: by phase and metric."""
    drawn, limits = {}, verification.limits.by_metric
    metrics = [m for m in ("cache_error", "logits_error") if m in _decode_metrics(verification)]
    if metrics:
        drawn["errors"] = plots.errors_by_step(
            {
                METRICS[metric].title: [
                    entries[metric].value if metric in entries else math.nan
                    for entries in worst.values()
                ]
                for metric in metrics
            },
            {METRICS[metric].title: limits[metric] for metric in metrics},
        )
    if verification.steps:
        drawn["steps"] = plots.metrics_by_step(
            verification.steps,
            limits["sequence_kl"],
            limits["sequence_top_1"],
            _parted(verification),
        )
    return drawn


def _parted(verification: Verification) -> int | None:
    """The first step in which tokens of images drawn freely differ, if any does."""
    return next((each.step for each in verification.steps if not each.token_agreement >= 1), None)


def _pair(pair: ImagePair, differing: Pixels) -> dict[str, Any]:
    """What the page says of a pair, with its images as data: URIs."""
    width = pair.expected.shape[1]
    factor = max(1, _ENLARGED_TO // width)
    return {
        "label": pair.label,
        "equal_tokens": f"{_significant(100 * pair.equal_tokens, 4)} %",
        "largest_difference": int(
            np.abs(pair.expected.astype(np.int32) - pair.actual.astype(np.int32)).max(initial=0)
        ),
        "side": min(width * factor, _LARGEST_SIDE),
        "enlarged": factor if factor > 1 else 0,
        "images": {
            "expected": _data_uri(pair.expected),
            "actual": _data_uri(pair.actual),
            f"difference, {AMPLIFICATION} times": _data_uri(differing),
        },
    }


def _data_uri(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ------------------------------------------------------------------- which rows, which columns


def _decode_metrics(verification: Verification) -> list[str]:
    """Metrics that the decode phases have, in the order of the thresholds."""
    found = {entry.metric for entry in verification.measurements if step_of(entry.phase)}
    return [metric.name for metric in JUDGED if metric.name in found]


def _worst_by_metric(verification: Verification, phases: Iterable[str]) -> dict[str, Measurement]:
    """Of each metric that the phases have, the measurement that is worst."""
    found: dict[str, list[Measurement]] = {}
    for entry in verification.measurements:
        if entry.phase in phases:
            found.setdefault(entry.metric, []).append(entry)
    return {metric: max(entries, key=_badness) for metric, entries in found.items()}


def _badness(entry: Measurement) -> tuple[bool, float]:
    # NaN is worse than anything.
    sign = -1 if METRICS[entry.metric].higher_is_better else 1
    return math.isnan(entry.value), sign * entry.value


def _other_worst(verification: Verification) -> list[Measurement]:
    """The worst of each metric of each phase that is no decode phase, in their order."""
    return [
        entry
        for phase in verification.phases
        if not step_of(phase)
        for entry in _worst_by_metric(verification, [phase]).values()
    ]


# ------------------------------------------------------------------------------- the wording


def _images(verification: Verification) -> str:
    return f"{verification.images} image{'s' * (verification.images != 1)}"


def _against(verification: Verification) -> str:
    if verification.against == REFERENCE:
        return "the PyTorch reference"
    return f"the bundle {verification.against}"


def _place(phase: str) -> str:
    """A phase, after the step that it is."""
    step = step_of(phase)
    return f"step {step} ({phase})" if step else phase


def _changes(verification: Verification) -> list[str]:
    """The limits that are not the precision's own, in words."""
    limits = verification.limits
    return [
        f"{metric} {limits.limit(metric):.12g} instead of {own:.12g}"
        for metric, own in limits.overridden.items()
    ]


def _limit(entry: Measurement) -> str:
    return f"{entry.limit:.12g}"


def _bound(metric: str, limit: float, signs: Sequence[str]) -> str:
    """What is asked of a metric, such as ≤ 1e-05; signs: of at most, and of at least."""
    return f"{signs[METRICS[metric].higher_is_better]}{limit:.12g}"


def _breach(entry: Measurement, separator: str = " ") -> str:
    """The limit that a value breaks, such as > 1e-05."""
    if math.isnan(entry.value):
        return f"limit{separator}{_limit(entry)}"
    return f"{'<' if METRICS[entry.metric].higher_is_better else '>'} {_limit(entry)}"


def _growth(layer: LayerError) -> str:
    """By how much the error grows in a layer, where that is known."""
    if math.isnan(layer.growth):
        return "-"
    return "from 0" if math.isinf(layer.growth) else f"x {_significant(layer.growth, 2)}"


def _shown(entry: Measurement) -> str:
    """A value with few digits, but as many as show on which side of its limit it is."""
    digits = 4 if METRICS[entry.metric].higher_is_better else 2
    texts = (_significant(entry.value, count) for count in range(digits, 18))
    return next(
        text for text in texts if met(entry.metric, float(text), entry.limit) == entry.passed
    )


def _significant(value: float, digits: int = 4) -> str:
    """A number with this many significant digits; NaN and inf by these names."""
    return "NaN" if math.isnan(value) else f"{value:.{digits}g}"
