"""Plots of a verification, as SVG that a page takes in whole: errors by phase, step and layer.

Knows matplotlib, through figures of its own and never a display, and the colours that the page's
style names. Does not know the page, limits or the verdict: it draws the numbers it is given.

A logarithmic axis has no place for 0, NaN and infinite values: a 0 stands as a hollow point on the
axis's lower end, the others as red crosses on its upper end, and the legend says so. On other axes
the crosses are on the lower end.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from lpd_export.accuracy.results import LayerError, Step

INK, FAINT, RULE = "#1f2328", "#656d76", "#d1d9e0"
FIRST, SECOND, BAD = "#0b62c4", "#a85a00", "#c1272d"
COLOURS = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    RULE: "var(--rule)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
    BAD: "var(--bad)",
}
"""What a plot is drawn in, and what the page's style calls it, which is another by night."""

WIDTH = 9.0  # inches
LAYER_LABELS = 64
"""So many layers are named beside their plot; of more, those that matter and some between."""
_ZERO, _NOT_FINITE = "exactly 0", "NaN or infinite"
_LAYER_HEIGHT = 0.165  # inches that the name of a layer takes
_EMPTY_RANGE = (1e-8, 1.0)  # of a logarithmic axis without any value

_STYLE: Any = {
    "svg.fonttype": "none",  # text that can be searched, in the page's font
    "svg.hashsalt": "lpd-export",  # the same plot is the same file
    "font.size": 9.0,
    "text.parse_math": False,  # a layer's name is not a formula
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
}


def errors_by_step(errors: Mapping[str, Sequence[float]], limits: Mapping[str, float]) -> str:
    """Errors along the decode phases on a logarithmic axis, with their limits as lines.

    Args:
        errors: at most two series by title, each with a value a step, from the first.
        limits: of each series.

    Returns:
        An `<svg>` element.
    """
    with mpl.rc_context(_STYLE):
        figure, (axes,) = _figure(3.5)
        values = [*errors.values(), [limits[title] for title in errors]]
        axes.set_yscale("log")
        axes.set_ylim(*_log_range(np.concatenate([np.asarray(each, float) for each in values])))
        for (title, series), colour, marker in zip(
            errors.items(), (FIRST, SECOND), "os", strict=False
        ):
            _draw_series(axes, series, colour, title, marker=marker)
        _draw_limits(axes, limits)
        _log_ticks(axes.yaxis)
        _count_along(axes, max(map(len, errors.values())))
        axes.set_ylabel("relative error")
        _legend(axes)
        return _svg(figure, "errors-by-step", "Cache and logits error by step")


def metrics_by_step(
    steps: Sequence[Step], kl_limit: float, top_1_limit: float, parted: int | None
) -> str:
    """KL divergence, top-1 agreement, token agreement and the number of cells, along the steps.

    Args:
        steps: the measurements, from the first step.
        kl_limit: drawn as a line, as is top_1_limit; they hold for the mean over all cells.
        top_1_limit: see above.
        parted: the step from which images drawn freely are no longer all the same, if any.

    Returns:
        An `<svg>` element.
    """
    with mpl.rc_context(_STYLE):
        figure, every = _figure(8.2, 3, 2.2, 2.2, 0.9)
        kl, top_1, agreement, cells = every
        labels = ("KL divergence (nats)", "top-1 agreement", "token agreement", "cells")
        for axes, label in zip(every, labels, strict=True):
            axes.set_ylabel(label)

        divergence = [step.kl for step in steps]
        kl.set_yscale("log")
        kl.set_ylim(*_log_range(np.array([*divergence, kl_limit])))
        _draw_series(kl, divergence, FIRST, "KL divergence", marker="o")
        _draw_limits(kl, {"KL divergence": kl_limit})
        _log_ticks(kl.yaxis)
        _legend(kl)

        _draw_shares(top_1, [step.top_1 for step in steps], "top-1 agreement", top_1_limit)
        _draw_limits(top_1, {"top-1 agreement": top_1_limit})
        _legend(top_1)

        _draw_shares(agreement, [step.token_agreement for step in steps], "token agreement")
        if parted is not None:
            left = parted > len(steps) / 2
            agreement.axvline(parted, color=BAD, linewidth=1, linestyle=(0, (4, 3)))
            agreement.annotate(
                f"first difference: step {parted}",
                (parted, 0),
                xycoords=("data", "axes fraction"),
                xytext=(-6 if left else 6, 6),
                textcoords="offset points",
                ha="right" if left else "left",
                va="bottom",
                color=BAD,
            )
        _legend(agreement, always=False)

        cells.bar(
            [step.step for step in steps], [step.cells for step in steps], color=FAINT, width=0.7
        )
        cells.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        _count_along(cells, len(steps))
        figure.align_ylabels()
        return _svg(figure, "metrics-by-step", "KL divergence, top-1 and token agreement by step")


def errors_by_layer(layers: Sequence[LayerError], grown: Sequence[LayerError]) -> str:
    """The relative error of one graph's layers on a logarithmic axis, in order from the top.

    Args:
        layers: of one graph, in the order of computation; at least one.
        grown: those of them to mark, the most important first; where not all layers can be named,
            they are.

    Returns:
        An `<svg>` element, the taller the more layers, up to LAYER_LABELS.
    """
    with mpl.rc_context(_STYLE):
        rows = min(len(layers), LAYER_LABELS)
        figure, (axes,) = _figure(0.9 + _LAYER_HEIGHT * max(rows, 4))
        errors = np.array([layer.relative_error for layer in layers], float)
        low, high = _log_range(errors)
        figure.set_layout_engine("constrained")  # names may be long
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        size = 4.0 if len(layers) <= LAYER_LABELS else 2.5
        _draw_series(axes, errors.tolist(), FIRST, "relative error", upright=True, size=size)
        places = {id(layer): place for place, layer in enumerate(layers)}
        marked = [places[id(layer)] for layer in grown]
        measured = [place for place in marked if np.isfinite(errors[place]) and errors[place] > 0]
        if measured:
            axes.plot(
                errors[measured],
                measured,
                "o",
                color=SECOND,
                markersize=6,
                label="in the table above",
            )
        _log_ticks(axes.xaxis)
        named = _spread(len(layers), marked)
        axes.set_yticks(named, [layers[place].layer for place in named], fontsize=8)
        for place, label in zip(named, axes.get_yticklabels(), strict=True):
            if place in marked:
                label.set_color(SECOND)
                label.set_fontweight("bold")
        axes.grid(axis="x")
        axes.grid(axis="y", linewidth=0.4)
        axes.tick_params(axis="y", length=2)
        tall = len(layers) > 30  # the numbers at the lower end are far from the first layers
        axes.tick_params(axis="x", labeltop=tall)
        axes.set_xlabel("relative error")
        _legend(axes, above=2.4 if tall else 0.6)
        graph = layers[0].graph
        return _svg(figure, f"errors-by-layer-{graph}", f"Relative error by layer of {graph}")


# ------------------------------------------------------------------------------------ parts


def _figure(height: float, *ratios: float) -> tuple[Figure, list[Axes]]:
    """A figure with a plot for each ratio, see-through so that the page's own colour is behind it.

    The margins suit labels of numbers: finding out what labels need takes as long as drawing.
    """
    figure = Figure(figsize=(WIDTH, height))
    figure.patch.set_alpha(0)
    grid = {"height_ratios": ratios or [1], "hspace": 0.3}
    every = figure.subplots(len(ratios) or 1, sharex=True, squeeze=False, gridspec_kw=grid)[:, 0]
    figure.subplots_adjust(0.8 / WIDTH, 0.5 / height, 1 - 0.1 / WIDTH, 1 - 0.35 / height)
    for axes in every:
        axes.patch.set_alpha(0)
        axes.grid(axis="y")
    return figure, list(every)


def _draw_series(
    axes: Axes,
    values: Sequence[float],
    colour: str,
    title: str,
    *,
    marker: str = "o",
    size: float = 4.0,
    upright: bool = False,
) -> None:
    """A series on an axis of values whose limits are set; see the module on 0, NaN and infinity.

    upright: the series goes down the y axis, and its values along the x axis.
    """
    array = np.asarray(values, float)
    places = np.arange(len(array)) + (not upright)  # steps count from 1
    finite = np.isfinite(array)
    logarithmic = (axes.get_xscale() if upright else axes.get_yscale()) == "log"
    zero = array == 0 if logarithmic else np.zeros(len(array), bool)
    low, high = axes.get_xlim() if upright else axes.get_ylim()

    def draw(at: NDArray[np.intp], along: NDArray[np.float64], **style: Any) -> None:
        axes.plot(*((along, at) if upright else (at, along)), **style)

    line = np.where(finite & ~zero, array, np.nan)  # broken where there is no value
    draw(places, line, color=colour, linewidth=1.3, marker=marker, markersize=size, label=title)
    edge = {"linestyle": "none", "clip_on": False, "zorder": 5, "markersize": size + 2.5}
    hollow = {"label": _ZERO, "color": colour, "marker": marker, "markerfacecolor": "none"}
    cross = {"label": _NOT_FINITE, "color": BAD, "marker": "X"}
    for among, end, style in (
        (zero, low, hollow),
        (~finite, high if logarithmic else low, cross),
    ):
        if among.any():
            draw(places[among], np.full(among.sum(), end), **edge, **style)


def _draw_shares(axes: Axes, values: Sequence[float], title: str, limit: float = 0.99) -> None:
    """Shares along the steps, with room for a limit."""
    low = min([*(value for value in values if math.isfinite(value)), limit, 0.99])
    room = max((1 - low) * 0.12, 1e-3)
    axes.set_ylim(low - room, 1 + room / 2)
    _draw_series(axes, values, SECOND, title, marker="s")


def _draw_limits(axes: Axes, limits: Mapping[str, float]) -> None:
    """A dashed line for each limit, one for those that are the same."""
    titles: dict[float, list[str]] = {}
    for title, limit in limits.items():
        if limit > 0 or axes.get_yscale() == "linear":
            titles.setdefault(limit, []).append(title)
    for (limit, _), style in zip(titles.items(), ((0, (5, 3)), (0, (1.5, 2))), strict=False):
        of = "" if len(titles) < 2 else f" of {titles[limit][0]}"
        axes.axhline(
            limit, color=BAD, linewidth=1.1, linestyle=style, label=f"limit{of} {limit:.12g}"
        )


def _log_range(values: NDArray[np.float64]) -> tuple[float, float]:
    """Powers of ten around the values that a logarithmic axis can show."""
    shown = values[np.isfinite(values) & (values > 0)]
    if not len(shown):
        return _EMPTY_RANGE
    low = math.floor(math.log10(shown.min()) - 0.1)
    high = math.ceil(math.log10(shown.max()) + 0.1)
    # A float's smallest and largest powers, beyond which an axis cannot go.
    return 10.0 ** max(low, -307), 10.0 ** min(high, 307)


def _log_ticks(axis: Any) -> None:
    axis.set_major_locator(LogLocator(10, numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _count_along(axes: Axes, steps: int) -> None:
    axes.set_xlim(0.3, steps + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(13, integer=True, min_n_ticks=1))
    axes.set_xlabel("step")


def _legend(axes: Axes, always: bool = True, above: float = 0.6) -> None:
    """Above the plot, where it hides no point; only for more than one thing unless `always`.

    above: how far, in heights of the font.
    """
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))  # each label once
    for label in (_ZERO, _NOT_FINITE):
        if label in entries:
            entries[label] = entries.pop(label)  # last
    if always or len(entries) > 1:
        axes.legend(
            entries.values(),
            entries,
            ncols=5,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=above,
        )


def _spread(count: int, first: Iterable[int]) -> list[int]:
    """At most about LAYER_LABELS places below `count`, none too near another, `first` if any."""
    least = count / LAYER_LABELS
    chosen: list[int] = []
    for place in (*first, *range(count)):
        if all(abs(place - other) >= max(least, 1) for other in chosen):
            chosen.append(place)
    return sorted(chosen)


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element with the page's colours, and ids of its own."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    # Several plots are on one page: what they refer to must not be another's.
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
