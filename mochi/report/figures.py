"""Draw charts: one file each, readable in grey and by colour-blind readers."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from numpy.typing import NDArray

from mochi.report.analyses import Chart, Series

# Okabe and Ito's colours, ordered so that neighbours also differ in lightness; each has its own marker.
_COLOURS = ["#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F"]
_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.hashsalt": "mochi",  # the same bytes from the same numbers
}
_MARKS = 8
"""Markers on a line."""
_PANELS = 4
"""Panels in a row."""
_TICKS = 4
"""Intervals between the labels of a panel's x axis; a single panel is twice as wide."""
_STEPS = [1, 2, 2.5, 5, 10]


def write(chart: Chart, methods: Sequence[str], out: Path) -> None:
    """Write the chart into the folder `out`, as png and svg; see `draw`."""
    with mpl.rc_context(_STYLE):
        figure = draw(chart, methods)
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            figure.savefig((out / chart.name).with_suffix(suffix), dpi=150, metadata=metadata)


def draw(chart: Chart, methods: Sequence[str]) -> Figure:
    """Draw the chart; without series it shows a note.

    Args:
        chart: what to draw.
        methods: rows of the experiment; each has the same colour and marker in every chart.
    """
    panels = list(dict.fromkeys(series.panel for series in chart.series)) or [""]
    columns = min(len(panels), _PANELS)
    rows = -(-len(panels) // columns)
    height = 3.4 if chart.categories is None else 0.45 * len(chart.categories) + 1.2
    width = 6.4 if len(panels) == 1 else 3.0 * columns + 1.2
    figure = Figure(figsize=(width, height * rows + 0.3), layout="constrained")
    sharex, sharey = chart.reference is not None or chart.log, chart.categories is not None or chart.log
    grid = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).flatten()
    order = list(dict.fromkeys([*methods, *(series.method for series in chart.series)]))
    if not any(series.method in methods for series in chart.series):
        order = order[len(methods) :]
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, chart, panel, order)
        _place_ticks(axes, chart, 2 * _TICKS if len(panels) == 1 else _TICKS)
    if chart.series and chart.categories is None:
        _add_legend(figure, chart)
    if not chart.series:
        grid[0].text(0.5, 0.5, "nothing recorded", ha="center", va="center", transform=grid[0].transAxes)
    return figure


def _draw_panel(axes: Axes, chart: Chart, panel: str, methods: list[str]) -> None:
    for series in chart.series:
        if series.panel == panel:
            _draw_series(axes, chart, series, methods.index(series.method))
    if chart.reference is not None:
        axes.axvline(chart.reference, color="0.4", linewidth=1, zorder=0)
    if panel and chart.x:
        axes.set_title(panel, fontsize=9)
    axes.set_xlabel(chart.x or panel)
    axes.set_ylabel(chart.y)
    if chart.log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    if chart.categories is not None:
        axes.set_yticks(range(len(chart.categories)), chart.categories)
        axes.set_ylim(len(chart.categories) - 0.5, -0.5)
        axes.margins(x=0.35)


def _place_ticks(axes: Axes, chart: Chart, num: int) -> None:
    """Labels of the x axis that do not touch each other, and whole epochs."""
    if chart.log:  # 1, 10, 100: narrower than powers of ten
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(LogFormatter())
    else:
        whole = chart.x == "epoch"
        axes.xaxis.set_major_locator(MaxNLocator(num, steps=_STEPS, integer=whole, min_n_ticks=1))


def _add_legend(figure: Figure, chart: Chart) -> None:
    """Legend below the axes, so that it hides no data; each label once for all panels."""
    seeds = max(series.seeds for series in chart.series)
    mark = "band" if any(series.style for series in chart.series) else "bars"
    title = f"{mark}: standard deviation over up to {seeds} seeds" if seeds > 1 else None
    keys = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    widest = max(map(len, keys))
    figure.legend(
        keys.values(), keys.keys(), loc="outside lower center", frameon=False, fontsize=8, title=title,
        title_fontsize=8, ncols=max(1, min(len(keys), round(figure.get_figwidth() * 13 / (widest + 7)))),
    )  # fmt: skip


def _draw_series(axes: Axes, chart: Chart, series: Series, index: int) -> None:
    x, mean = np.asarray(series.x), np.asarray(series.mean)
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    if not series.style:
        axes.errorbar(
            x, mean, yerr=series.std, xerr=series.x_error, color=colour, marker=marker, markersize=6,
            capsize=3, linestyle="none", label=None if chart.categories else series.method,
        )  # fmt: skip
        if chart.annotate:
            x_error = 0.0 if series.x_error is None else series.x_error[0]
            text = f"{x[0]:.1f}" + (f" ± {x_error:.1f}" if series.x_error else "")
            axes.annotate(text, (x[0] + x_error, mean[0]), xytext=(8, -3), textcoords="offset points")
        return
    every = _marks(len(x), index, log=chart.log)
    axes.plot(
        x, mean, series.style, color=colour, marker=None if series.style == ":" else marker,
        linewidth=max(2.8 - 0.5 * index, 1.2),  # wide below narrow: lines may coincide
        markersize=4, markevery=every, label=series.label or series.method,
    )  # fmt: skip
    if series.std is not None:
        std = np.asarray(series.std)
        low = mean - std
        if chart.log:  # no band below the plotted values
            low = np.maximum(low, mean / 10)
        axes.fill_between(x, low, mean + std, color=colour, alpha=0.15, linewidth=0)


def _marks(num: int, index: int, *, log: bool) -> list[int]:
    """Points of a line that have a marker: different ones for each line, so that none hides another."""
    if num <= 2 * _MARKS:
        return list(range(index % 2, num, 2)) or [0]
    if log:
        indices = np.unique(np.geomspace(1, num, _MARKS).astype(int) - 1)
        return [int(number) for number in indices]
    step = num / _MARKS
    return sorted({int((number + index % 4 / 4) * step) for number in range(_MARKS)})


def confusion_picture(counts: NDArray[np.float64], title: str) -> str:
    """Rows: classes; columns: predictions; darker: a larger fraction of the class. A data URI of a PNG."""
    side = min(4.5, 1.6 + 0.16 * len(counts))
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.subplots()
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xlabel("predicted class (number in the table)")
        axes.set_ylabel("class")
        axes.set_title(title, fontsize=9)
        if len(counts) <= 20:
            axes.set_xticks(
                range(len(counts)), [str(number) for number in range(1, len(counts) + 1)], fontsize=6
            )
            axes.set_yticks(
                range(len(counts)), [str(number) for number in range(1, len(counts) + 1)], fontsize=6
            )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return data_uri(buffer.getvalue(), "image/png")


def data_uri(content: bytes, kind: str) -> str:
    """The data URI of a file content."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
