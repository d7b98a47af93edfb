"""Figures: accuracy, training curves and negatives."""

from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mochi.config import Experiment, columns, probes
from mochi.provenance.wanted import figures

# Okabe and Ito's colours, which colour-blind readers can tell apart; one for each method, in order.
_COLOURS = ["#999999", "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.hashsalt": "mochi",  # the same bytes from the same numbers
}


def draw(
    experiment: Experiment,
    scores: pd.DataFrame,
    epochs: pd.DataFrame,
    matching: pd.DataFrame,
    out: Path,
) -> None:
    """Write the figures of `wanted.figures` into the folder `out`, each as png and svg."""
    methods = list(experiment.methods)
    colours = {method: _COLOURS[index % len(_COLOURS)] for index, method in enumerate(methods)}
    with mpl.rc_context(_STYLE):
        for name in figures(experiment):
            if name == "accuracy":
                figure = _accuracy(experiment, scores, methods, colours)
            elif name == "training":
                figure = _training(epochs, methods, colours)
            else:
                figure = _negatives(epochs, matching, methods, colours)
            _save(figure, out / name)


def _accuracy(
    experiment: Experiment, scores: pd.DataFrame, methods: list[str], colours: dict[str, str]
) -> Figure:
    """The main number of every seed as a point, their mean as a line, for each task on frozen features.

    An experiment of detection sets alone shows their AP50, a point for each fine-tuning.
    """
    tasks = probes(experiment) or list(dict.fromkeys(scores["task"]))
    main = {task: next(iter(columns(experiment, task))) for task in tasks}
    shown = scores[scores["metric"] == scores["task"].map(main)]
    figure = Figure(figsize=(4 * len(tasks), 0.5 * len(methods) + 1.2), layout="constrained")
    for axes, task in zip(_row_of(figure, len(tasks), sharey=True), tasks, strict=True):
        for place, method in enumerate(methods):
            values = shown[(shown["task"] == task) & (shown["method"] == method)]["value"]
            if values.empty:  # a detection set may be computed for some rows only
                continue
            mean = values.mean()
            axes.plot([mean, mean], [place - 0.3, place + 0.3], color=colours[method], linewidth=2)
            axes.scatter(values, [place] * len(values), color=colours[method], alpha=0.6, s=18, zorder=3)
            spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
            axes.annotate(
                f"{mean:.1f}{spread}", (values.max(), place), xytext=(8, -3), textcoords="offset points"
            )
        axes.margins(x=0.35)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        column = columns(experiment, task)[main[task]]
        axes.set_xlabel(f"{task} {column.name} ({column.unit})")
    return figure


def _training(epochs: pd.DataFrame, methods: list[str], colours: dict[str, str]) -> Figure:
    """Loss with its chance level, and the proxy task with and without synthetic negatives (figure 2b)."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss_axes, accuracy_axes = _row_of(figure, 2)
    for method, mean, low, high in _bands(epochs, methods, "loss"):
        _band(loss_axes, method, colours[method], mean, low, high)
    if "queue_fill" in epochs:
        for method in methods:
            rows = epochs[(epochs["method"] == method) & epochs["queue_fill"].notna()]
            if len(rows):
                chance = rows.groupby("epoch")["chance"].first()
                loss_axes.plot(chance.index, chance, color=colours[method], linestyle=":", linewidth=1)
    loss_axes.set_ylabel("loss (nats); dotted: chance")
    contrastive = [method for method, *_ in _bands(epochs, methods, "accuracy_with_synthetics")]
    for method, mean, low, high in _bands(epochs, contrastive, "accuracy"):
        _band(accuracy_axes, method, colours[method], 100 * mean, 100 * low, 100 * high)
    for method, mean, _, _ in _bands(epochs, methods, "accuracy_with_synthetics"):
        accuracy_axes.plot(mean.index, 100 * mean, color=colours[method], linestyle="--", linewidth=1)
    accuracy_axes.set_ylabel("proxy task accuracy (%)\ndashed: synthetic negatives count")
    for axes in (loss_axes, accuracy_axes):
        axes.set_xlabel("epoch")
    if loss_axes.lines:
        several = epochs.groupby("method")["seed"].nunique().max() > 1
        loss_axes.legend(frameon=False, title="band: lowest to highest seed" if several else None)
    return figure


def _negatives(
    epochs: pd.DataFrame, matching: pd.DataFrame, methods: list[str], colours: dict[str, str]
) -> Figure:
    """Matching probabilities of the hardest (figure 2a) and false negatives (figures 2c, 3c)."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    matching_axes, false_axes = _row_of(figure, 2)
    shown = [method for method in methods if (matching["method"] == method).any()]
    last = matching["epoch"].max() if len(matching) else 0
    for method in shown:
        for epoch, rows in matching[matching["method"] == method].groupby("epoch"):
            curve = rows.groupby("rank")["probability"].mean()
            label = method if epoch == last else None
            strength = 0.25 + 0.75 * (float(str(epoch)) + 1) / (last + 1)
            matching_axes.plot(curve.index, curve, color=colours[method], alpha=strength, label=label)
    if shown:
        matching_axes.set_xscale("log")
        matching_axes.set_yscale("log")
        drawn = ", ".join(str(epoch) for epoch in sorted(matching["epoch"].unique()))
        matching_axes.legend(frameon=False, title=f"darker: later epoch ({drawn})")
    matching_axes.set_xlabel("rank of the negative")
    matching_axes.set_ylabel("mean matching probability")
    kinds: list[tuple[str, Literal["-", "--", ":"], str]] = [
        ("false_negatives", "-", "hardest negatives (up to 1024)"),
        ("false_parents_any", "--", "mixes: one parent or both"),
        ("false_parents_all", ":", "mixes: both parents"),
    ]
    for column, style, _ in kinds:
        for place, (method, mean, _, _) in enumerate(_bands(epochs, methods, column)):
            # Wide below narrow: lines of two methods often overlap.
            width = max(2.8 - 0.8 * place, 1.2)
            false_axes.plot(mean.index, 100 * mean, style, color=colours[method], linewidth=width)
    false_axes.set_xlabel("epoch")
    false_axes.set_ylabel("of the query's class (%)")
    if false_axes.lines:
        keys = [Line2D([], [], color="black", linestyle=style, label=text) for _, style, text in kinds]
        false_axes.legend(handles=keys, frameon=False)
    return figure


def _bands(
    epochs: pd.DataFrame, methods: list[str], column: str
) -> list[tuple[str, "pd.Series[float]", "pd.Series[float]", "pd.Series[float]"]]:
    """(method, mean, min, max over seeds) by epoch, for the methods that have the column."""
    if column not in epochs:
        return []
    bands = []
    for method in methods:
        rows = epochs[(epochs["method"] == method) & epochs[column].notna()]
        if len(rows):
            grouped = rows.groupby("epoch")[column]
            bands.append((method, grouped.mean(), grouped.min(), grouped.max()))
    return bands


def _band(
    axes: Axes,
    label: str,
    colour: str,
    mean: "pd.Series[float]",
    low: "pd.Series[float]",
    high: "pd.Series[float]",
) -> None:
    axes.plot(mean.index, mean, color=colour, label=label, linewidth=1.5)
    axes.fill_between(mean.index.to_numpy(), low, high, color=colour, alpha=0.15, linewidth=0)


def _row_of(figure: Figure, num: int, *, sharey: bool = False) -> list[Axes]:
    return list(figure.subplots(1, num, squeeze=False, sharey=sharey)[0])


def _save(figure: Figure, path: Path) -> None:
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        figure.savefig(path.with_suffix(suffix), dpi=150, metadata=metadata)
