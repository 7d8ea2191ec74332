"""What `lpd-export verify` shows: a table on the terminal, and a folder with a report to keep.

Knows how measurements are worded and laid out: rows, columns, digits, what is named first. The
drawing is in `plots`, the page in `report.html.jinja`. Does not know how anything was measured,
nor what the limits are or should be.
"""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lpd_export.accuracy import plots
from lpd_export.accuracy.results import ImagePair, LayerError, Measurement, Verification
from lpd_export.accuracy.thresholds import HIGHER_IS_BETTER, PRECISIONS, THRESHOLDS, Limits
from lpd_export.files import check_writable, strict_json, write_atomically
from lpd_export.images import Pixels, save_png

REPORT, RECORD, IMAGES = "report.html", "report.json", "images"
"""What a report's folder holds."""

TITLES = {threshold.metric: threshold.title for threshold in THRESHOLDS}

AMPLIFICATION = 8
"""Of the differences of images, which are else too dark to see."""

_THRESHOLDS = {threshold.metric: threshold for threshold in THRESHOLDS}
_DIGITS = {"logits_cosine": 7}
_ON_THE_PAGE_ALONE = frozenset({"absolute_error"})  # the terminal has no room for what is told only
_IN_WORDS, _IN_LINE = ("at most\n", "at least\n"), ("at most ", "at least ")
_SIGNS = ("≤ ", "≥ ")  # on the page; not every terminal has them
_FAILURES_TOLD = 5  # on the terminal
_FAILURES_OPEN, _FAILURES_SHOWN = 12, 200  # on the page: at once, and when they are asked for
_ROWS_UNFOLDED, _ROWS_FOLDED = 24, 8
_LAYERS_TOLD = 10
_NOTICEABLE = 0.01  # of a graph's largest error: where less than that grows, it is noise
_ENLARGED_TO = 128  # pixels: about what small images are enlarged to on the page
_LARGEST_SIDE = 320  # pixels: how wide an image is on the page at most


# ------------------------------------------------------------------------------ the terminal


def print_table(verification: Verification, console: Console) -> None:
    """Shows every phase's worst values, the verdict, and where the error grows if it is known.

    Values beyond their limit are red and followed by it. Where many phases pass, neighbouring
    ones that do share a row, with the worst values of them. Without a terminal it is plain text.
    It is made for 80 columns.
    """
    decode_metrics = [m for m in _decode_metrics(verification) if m not in _ON_THE_PAGE_ALONE]
    if decode_metrics:
        headings = (
            textwrap.fill(TITLES[metric], 7, break_long_words=False) for metric in decode_metrics
        )
        table = _table("phase", *headings)
        for phases in _folded(verification):
            title = phases[0] if len(phases) == 1 else f"{phases[0]}\nto {phases[-1]}"
            worst = _worst_by_metric(verification, phases)
            table.add_row(title, *(_text(worst.get(metric)) for metric in decode_metrics))
        table.add_section()
        limits = _measured_limits(verification)
        bounds = (_bound(metric, limits[metric], _IN_WORDS) for metric in decode_metrics)
        table.add_row("limit", *bounds, style="dim")
        console.print(table)
        console.print()
    others = [
        (phase, entry)
        for phase, entry in _other_worst(verification)
        if entry.metric not in _ON_THE_PAGE_ALONE
    ]
    if others:
        table = _table("", "", "value", "limit", left=2)
        for phase, entry in others:
            bound = _bound(entry.metric, entry.limit, _IN_LINE)
            table.add_row(phase, TITLES[entry.metric], _text(entry, " "), Text(bound, "dim"))
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
    where = f" (decode: {verification.layers_phase})" if verification.layers_phase else ""
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
    phases = _decode_phases(verification)
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
    precision, changed = _basis(verification, _measured_limits(verification))
    if verification.passed:
        of = "" if changed else f" of {precision}"
        holds = f": every threshold{of} holds for {_images(verification)}"
        yield Text.assemble(("passed", "bold green"), holds)
    else:
        first, *more = verification.failures
        yield Text.assemble(("FAILED", "bold red"), f": {_failure(first)}")
        if more:
            yield Text(f"and {len(more)} more:")
        told = more[: _FAILURES_TOLD - 1]
        yield from (Text(f"  {_failure(entry)}") for entry in told)
        if len(more) > len(told):
            yield Text(f"  ... {len(more) - len(told)} are not listed here")
    if changed:
        yield Text(f"judged by other limits than those of {precision}:")
        yield from (Text(f"  {change}") for change in _changes(changed))
    yield from (Text(f"remark: {remark}") for remark in verification.remarks)


def _bisection_lines(verification: Verification) -> Iterator[str]:
    """Which layers INT8 must spare, a line a graph."""
    for found in verification.bisections:
        if found.kept is None:
            yield f"{found.graph}: the thresholds fail even with every layer in higher precision"
        elif found.kept:
            layers = ", ".join(found.kept)
            yield f"{found.graph}: int8 must spare {len(found.kept)} of {found.layers}: {layers}"
        else:
            yield f"{found.graph}: int8 need spare none of {found.layers} layers"


def _failure(entry: Measurement) -> str:
    if math.isinf(entry.limit):
        asked = "a number required"  # NaN fails even where there is no limit
    elif entry.metric in HIGHER_IS_BETTER:
        asked = f"at least {_limit(entry.limit)} required"
    else:
        asked = f"at most {_limit(entry.limit)} allowed"
    return f"{entry.phase}, {entry.tensor}: {entry.metric} {_shown(entry)}, {asked}"


# --------------------------------------------------------------------------------- the report


def write_report(
    verification: Verification, folder: Path, limits: Limits, commands: Mapping[str, str]
) -> Path:
    """Writes report.html, report.json and images/ into a folder, which is made if need be.

    report.html is whole in itself: plots and images are in it, and it fetches nothing. report.json
    is strict JSON, null standing for what is not a finite number. images/ has three PNG a pair:
    expected, actual and difference (see `difference`). report.html is written last.

    Args:
        verification: what was found.
        folder: where to write; of files that are there, those of these names are replaced.
        limits: that it was judged by.
        commands: command lines of plain Polygraphy by what each of them does.

    Returns:
        The path of report.html.

    Raises:
        UserError: if the folder or a file cannot be written.
        ValueError: if the images of a pair differ in shape.
    """
    differences = [difference(pair.expected, pair.actual) for pair in verification.pairs]
    page = _page(verification, limits, commands, differences)
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


def grown_layers(layers: Sequence[LayerError], count: int = _LAYERS_TOLD) -> list[LayerError]:
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


class _Cell(NamedTuple):
    """A value in a table of the page."""

    value: str
    breach: str
    """The limit that it breaks, empty if it keeps it."""
    tensor: str


def _page(
    verification: Verification,
    limits: Limits,
    commands: Mapping[str, str],
    differences: Sequence[Pixels],
) -> str:
    environment = Environment(
        loader=PackageLoader("lpd_export.accuracy", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    limit_by_metric = {metric: limits.limit(metric) for metric in limits.by_metric}
    precision, changed = _basis(verification, limit_by_metric)
    decode_metrics = _decode_metrics(verification)
    parted = _parted(verification.steps.token_agreement)
    grown = grown_layers(verification.layers)
    return environment.get_template("report.html.jinja").render(
        verification=verification,
        against=_against(verification),
        images=_images(verification),
        versions=", ".join(f"{name} {text}" for name, text in verification.versions.items()),
        written=verification.time,
        bisections=list(_bisection_lines(verification)),
        precision=precision,
        changes=_changes(changed),
        failures=[
            (entry, TITLES[entry.metric], _shown(entry), _bound(entry.metric, entry.limit, _SIGNS))
            for entry in verification.failures[:_FAILURES_SHOWN]
        ],
        failures_open=_FAILURES_OPEN,
        metrics=[(metric, TITLES[metric]) for metric in decode_metrics],
        bounds=[_bound(metric, limits.limit(metric), _SIGNS) for metric in decode_metrics],
        phases=[
            (phase, [_cell(worst.get(metric)) for metric in decode_metrics])
            for phase in _decode_phases(verification)
            for worst in [_worst_by_metric(verification, [phase])]
        ],
        others=[
            (phase, TITLES[entry.metric], _cell(entry), _bound(entry.metric, entry.limit, _SIGNS))
            for phase, entry in _other_worst(verification)
        ],
        thresholds=[
            (threshold, _bound(metric, limit, _SIGNS), metric in changed)
            for metric, (threshold, limit) in limits.by_metric.items()
        ],
        plots=_plots(verification, limits, parted),
        parted=parted,
        layer_plots=_layer_plots(verification.layers, grown),
        grown=[(layer, _significant(layer.relative_error, 2), _growth(layer)) for layer in grown],
        pairs=[
            _pair(pair, differing)
            for pair, differing in zip(verification.pairs, differences, strict=True)
        ],
        amplification=AMPLIFICATION,
        commands=_first_failed_first(verification, commands),
    )


def _plots(verification: Verification, limits: Limits, parted: int | None) -> dict[str, str]:
    """The plots that there is something to draw in, by name."""
    drawn = {}
    phases, steps = _decode_phases(verification), verification.steps
    metrics = [m for m in ("cache_error", "logits_error") if m in _decode_metrics(verification)]
    if metrics:
        worst = [_worst_by_metric(verification, [phase]) for phase in phases]
        errors = {
            TITLES[metric]: [
                entries[metric].value if metric in entries else math.nan for entries in worst
            ]
            for metric in metrics
        }
        of = {TITLES[metric]: limits.limit(metric) for metric in metrics}
        drawn["errors"] = plots.errors_by_phase(errors, of)
    if steps.kl:
        limit = limits.limit
        drawn["divergence"] = plots.divergence_by_step(
            steps, limit("sequence_kl"), limit("sequence_top_1")
        )
    if steps.token_agreement:
        drawn["agreement"] = plots.token_agreement_by_step(steps, parted)
    return drawn


def _layer_plots(layers: Sequence[LayerError], grown: Sequence[LayerError]) -> dict[str, str]:
    """A plot a graph, by its name, in the order in which graphs are found."""
    drawn = {}
    for graph in dict.fromkeys(layer.graph for layer in layers):
        ours, marked = ([each for each in some if each.graph == graph] for some in (layers, grown))
        drawn[graph] = plots.errors_by_layer(ours, marked)
    return drawn


def _parted(agreement: Sequence[float]) -> int | None:
    """The first step in which tokens of images drawn freely differ, if any does."""
    return next((step for step, share in enumerate(agreement) if not share >= 1), None)


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


def _first_failed_first(
    verification: Verification, commands: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Titles and lines, those of the phase that failed first before all others."""
    first = verification.failures[0].phase if verification.failures else ""
    return sorted(commands.items(), key=lambda command: command[0] != first)


def _data_uri(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _cell(entry: Measurement | None) -> _Cell | None:
    if entry is None:
        return None
    return _Cell(_shown(entry), "" if entry.passed else _breach(entry), entry.tensor)


# ------------------------------------------------------------------- which rows, which columns


def _decode_phases(verification: Verification) -> list[str]:
    return [phase for phase in verification.phases if phase.startswith("phase_")]


def _decode_metrics(verification: Verification) -> list[str]:
    """Metrics that the decode phases have, in the order of the thresholds."""
    decode = set(_decode_phases(verification))
    found = {entry.metric for entry in verification.measurements if entry.phase in decode}
    return [metric for metric in _THRESHOLDS if metric in found]


def _worst_by_metric(verification: Verification, phases: Iterable[str]) -> dict[str, Measurement]:
    """Of each metric that the phases have, the measurement that is worst."""
    found: dict[str, list[Measurement]] = {}
    for phase in phases:
        for entry in verification.of_phase(phase):
            found.setdefault(entry.metric, []).append(entry)
    return {metric: max(entries, key=_badness) for metric, entries in found.items()}


def _badness(entry: Measurement) -> tuple[bool, float]:
    # NaN is worse than anything.
    sign = -1 if entry.metric in HIGHER_IS_BETTER else 1
    return math.isnan(entry.value), sign * entry.value


def _other_worst(verification: Verification) -> list[tuple[str, Measurement]]:
    """The worst of each metric of each phase that is no decode phase, in their order."""
    decode = set(_decode_phases(verification))
    return [
        (phase, entry)
        for phase in verification.phases
        if phase not in decode
        for entry in _worst_by_metric(verification, [phase]).values()
    ]


# ------------------------------------------------------------------------------- the wording


def _images(verification: Verification) -> str:
    return f"{verification.images} image{'s' * (verification.images != 1)}"


def _against(verification: Verification) -> str:
    if verification.against == "reference":
        return "the PyTorch reference"
    return f"the bundle {verification.against}"


def _measured_limits(verification: Verification) -> dict[str, float]:
    return {entry.metric: entry.limit for entry in verification.measurements}


def _basis(
    verification: Verification, limits: Mapping[str, float]
) -> tuple[str, dict[str, tuple[float, float]]]:
    """The precision whose thresholds were applied, and limits that are not its own.

    That is the bundle's precision, or the one of what it was compared with if that is looser. The
    limits are by metric, with what the precision's would be.
    """

    def others(precision: str) -> dict[str, tuple[float, float]]:
        own = {metric: _THRESHOLDS[metric].limit(precision) for metric in limits}
        return {m: (limit, own[m]) for m, limit in limits.items() if limit != own[m]}

    def asked(precision: str) -> int:
        return sum(math.isfinite(limit) for limit, _ in others(precision).values())

    own_first = sorted(PRECISIONS, key=lambda name: name != verification.precision)
    precision = min(own_first, key=asked)
    return precision, others(precision)


def _changes(changed: Mapping[str, tuple[float, float]]) -> list[str]:
    """The limits that are not the precision's own, in words."""
    return [
        f"{metric} {_limit(limit)} instead of {_limit(own)}"
        for metric, (limit, own) in changed.items()
    ]


def _limit(limit: float) -> str:
    return "none" if math.isinf(limit) else f"{limit:.12g}"


def _bound(metric: str, limit: float, signs: Sequence[str]) -> str:
    """What is asked of a metric, such as ≤ 1e-05; signs: of at most, and of at least."""
    if math.isinf(limit):
        return "none"
    return f"{signs[metric in HIGHER_IS_BETTER]}{_limit(limit)}"


def _breach(entry: Measurement, separator: str = " ") -> str:
    """The limit that a value breaks, such as > 1e-05."""
    if math.isnan(entry.value):
        limit = "any number" if math.isinf(entry.limit) else _limit(entry.limit)
        return f"limit{separator}{limit}"
    return f"{'<' if entry.metric in HIGHER_IS_BETTER else '>'} {_limit(entry.limit)}"


def _growth(layer: LayerError) -> str:
    """By how much the error grows in a layer, where that is known."""
    if math.isnan(layer.growth):
        return "-"
    return "from 0" if math.isinf(layer.growth) else f"x {_significant(layer.growth, 2)}"


def _shown(entry: Measurement) -> str:
    """A value with few digits, but as many as show on which side of its limit it is."""
    threshold = _THRESHOLDS[entry.metric]
    digits = _DIGITS.get(entry.metric, 4 if entry.metric in HIGHER_IS_BETTER else 2)
    met = threshold.met(entry.value, entry.limit)
    texts = (_significant(entry.value, count) for count in range(digits, 18))
    return next(text for text in texts if threshold.met(float(text), entry.limit) == met)


def _significant(value: float, digits: int) -> str:
    """A number with this many significant digits; NaN and inf by these names."""
    return "NaN" if math.isnan(value) else f"{value:.{digits}g}"
