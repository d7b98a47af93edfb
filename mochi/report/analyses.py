"""The paper's analyses: the numbers of each figure, which are also written as JSON.

A chart has series of points, each the mean over seeds with its standard deviation. `mochi.report.figures`
draws any chart.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from mochi.config import (
    ORACLE,
    Column,
    Experiment,
    Supervised,
    baseline_of,
    columns,
    first_runs,
    mixing_grid,
    probes,
    with_oracle,
)
from mochi.report.collect import Collected
from mochi.report.statistics import paired
from mochi.stages import DETECTION


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    method: str
    """Determines colour and marker."""
    x: list[float]
    mean: list[float]
    std: list[float] | None = None
    """Over seeds; None for a single seed."""
    x_error: list[float] | None = None
    """Half-length of a horizontal error bar: a standard deviation, or half a confidence interval."""
    seeds: int = 1
    label: str = ""
    style: str = "-"
    """Line style as matplotlib names it; empty: markers only."""
    panel: str = ""
    """Series of a panel share axes; panels are drawn side by side."""


@dataclass(frozen=True)
class Chart:
    """The content of one figure."""

    name: str
    """Name of its files, without suffix."""
    title: str
    caption: str
    x: str
    """Label of the x axis, with its unit."""
    y: str
    series: list[Series] = field(default_factory=list)
    log: bool = False
    """Log scale on both axes."""
    categories: list[str] | None = None
    """Labels of the positions 0, 1, ... on the y axis, for charts that list methods there."""
    annotate: bool = False
    """Write each mean next to its point."""
    reference: float | None = None
    """Value marked by a vertical line; all panels then share the x axis."""

    def json(self) -> dict[str, Any]:
        """As JSON; numbers as drawn."""
        return asdict(self)


def chart(name: str, experiment: Experiment, collected: Collected) -> Chart:
    """One of `wanted.figures`; without series if nothing was recorded."""
    if name.startswith("precision-recall-"):
        return precision_recall(experiment, collected, name.removeprefix("precision-recall-"))
    makers: dict[str, Callable[[Experiment, Collected], Chart]] = {
        "accuracy": accuracy,
        "loss": loss,
        "proxy-task": proxy_task,
        "matching": matching,
        "false-negatives": false_negatives,
        "false-parents": false_parents,
        "alignment-uniformity": alignment_uniformity,
        "class-oracle": class_oracle,
        "gain": gain,
    }
    return makers[name](experiment, collected)


def accuracy(experiment: Experiment, collected: Collected) -> Chart:
    """Main score of each frozen evaluation or, if there is none, of each detection set."""
    methods = list(experiment.methods)
    tasks = probes(experiment) or [f"{DETECTION}{name}" for name in experiment.evaluation.detection]
    series = []
    for task in tasks:
        metric, column = main_number(experiment, task)
        shown = collected.scores[
            (collected.scores["task"] == task) & (collected.scores["metric"] == metric)
        ]
        series += [
            Series(
                str(method),
                [float(values.groupby("seed")["value"].mean().mean())],
                [methods.index(str(method))],
                x_error=None if len(values) == 1 else [float(values["value"].std())],
                seeds=len(values),
                style="",
                panel=f"{task} {column.name} ({column.unit})",
            )
            for method, values in shown.groupby("method", sort=False)
        ]
    return Chart(
        "accuracy",
        "Accuracy",
        "Main score of each evaluation: mean over seeds or fine-tunings. Error bars: standard deviation.",
        "",
        "",
        series,
        categories=methods,
        annotate=True,
    )


def main_number(experiment: Experiment, task: str) -> tuple[str, Column]:
    """The score of an evaluation that is plotted: its key in metrics.json and its column."""
    return next(iter(columns(experiment, task).items()))


def loss(experiment: Experiment, collected: Collected) -> Chart:
    """Mean loss of each epoch, and the loss at chance."""
    lines = [*_lines(experiment, collected.curves, "loss")]
    for method, rows in collected.curves.groupby("method", sort=False):
        if "chance" in rows:
            chance = rows.groupby("epoch")["chance"].first()
            lines.append(Series(str(method), *_points(chance), label=f"{method}, chance", style=":"))
    return Chart(
        "loss",
        "Training loss",
        "Mean loss of each epoch. Dotted: the chance level, the loss if all similarities or class scores "
        "are equal; ln(1 + number of negatives) for MoCo and MoCHi, ln(number of classes) for supervised "
        "rows. A contrastive loss rises while keys of images fill the queue, and when mixing begins.",
        "epoch",
        "loss (nats)",
        lines,
    )


def proxy_task(experiment: Experiment, collected: Collected) -> Chart:
    """How often the key is more similar than every negative, with and without the synthetic ones."""
    curves = collected.curves
    if "accuracy_with_synthetics" not in curves:
        curves = curves.iloc[:0].assign(accuracy=[], accuracy_with_synthetics=[])
    curves = curves[curves["accuracy_with_synthetics"].notna()]
    lines = [*_lines(experiment, curves, "accuracy", scale=100)]
    mixing = curves[curves["accuracy_with_synthetics"] != curves["accuracy"]]["method"].unique()
    lines += _lines(
        experiment, curves[curves["method"].isin(mixing)], "accuracy_with_synthetics", scale=100,
        note="with synthetic negatives", style="--",
    )  # fmt: skip
    return Chart(
        "proxy-task",
        "Proxy task",
        "Share of queries that are more similar to their key than to any negative in the queue; dashed: "
        "than to any negative, including synthetic ones. As in the paper's figures 2b and 3.",
        "epoch",
        "accuracy (%)",
        lines,
    )


def matching(experiment: Experiment, collected: Collected) -> Chart:
    """Softmax probability of each of the hardest negatives, at several epochs."""
    lines = []
    styles = ["-", "--", "-.", ":"]
    epochs = sorted(collected.matching["epoch"].unique())
    for method in experiment.methods:
        rows = collected.matching[collected.matching["method"] == method]
        for epoch, own in rows.groupby("epoch"):
            index = epochs.index(epoch)
            lines += [
                Series(
                    f"epoch {epoch}", each.x, each.mean, each.std, seeds=each.seeds,
                    label=f"epoch {epoch}", style=styles[index % len(styles)], panel=method,
                )
                for each in _lines(experiment, own, "probability", by="rank")
            ]  # fmt: skip
    return Chart(
        "matching",
        "Matching probability",
        "Mean softmax probability, over the key and the queue, of each of a query's hardest negatives, "
        "hardest first. Measured on the last batch of an epoch. As in the paper's figure 2a.",
        "rank of the negative",
        "matching probability",
        lines,
        log=True,
    )


def false_negatives(experiment: Experiment, collected: Collected) -> Chart:
    """Share of the hardest negatives that have the query's class."""
    return Chart(
        "false-negatives",
        "False negatives among the hardest",
        "Share of the hardest sixteenth of the queue (at most 1024 negatives) that has the query's label. "
        "Measured on the last batch of each epoch. The class oracle removes these from the loss, but not "
        "from this count. As in the paper's figure 2c.",
        "epoch",
        "same class as the query (%)",
        [*_lines(experiment, collected.curves, "false_negatives", scale=100)],
    )


def false_parents(experiment: Experiment, collected: Collected) -> Chart:
    """Share of synthetic negatives that are mixed from false negatives."""
    one = _lines(experiment, collected.curves, "false_parents_any", scale=100, note="at least one parent")
    every = _lines(
        experiment, collected.curves, "false_parents_all", scale=100, note="all parents", style="--"
    )
    return Chart(
        "false-parents",
        "False negatives among the parents",
        "Share of synthetic negatives that have a parent with the query's label: at least one parent "
        "(solid), or all parents (dashed). Measured on the last batch of each epoch. As in the paper's "
        "figure 3c.",
        "epoch",
        "same class as the query (%)",
        [*one, *every],
    )


def alignment_uniformity(experiment: Experiment, collected: Collected) -> Chart:
    """Alignment against uniformity of the validation features, pooled and embedded."""
    series = []
    for method in experiment.methods:
        runs = [analysis for (row, _), analysis in collected.analyses.items() if row == method]
        for space in ("pooled", "embedded"):
            points = [run["spaces"][space] for run in runs if space in run["spaces"]]
            frame = pd.DataFrame(points, columns=["alignment", "uniformity"]).astype(float).dropna()
            if len(frame):
                std = frame.std() if len(frame) > 1 else None
                series.append(
                    Series(
                        method,
                        [frame["uniformity"].mean()],
                        [frame["alignment"].mean()],
                        None if std is None else [std["alignment"]],
                        None if std is None else [std["uniformity"]],
                        len(frame),
                        style="",
                        panel=f"{space} features",
                    )
                )
    return Chart(
        "alignment-uniformity",
        "Alignment and uniformity",
        "Wang & Isola 2020, on validation images. Alignment: mean squared distance between two images of a "
        "class. Uniformity: log of the mean Gaussian potential of two images. Lower is better for both. "
        "Pooled: the features that the evaluations use; embedded: after the projection head. As in the "
        "paper's figure 3.",
        "uniformity",
        "alignment",
        series,
    )


def class_oracle(experiment: Experiment, collected: Collected) -> Chart:
    """Each row without and with the class oracle, and the supervised row: the gap from false negatives."""
    pairs = with_oracle(experiment)
    methods = [*itertools.chain(*((row, f"{row}{ORACLE}") for row in pairs))]
    methods += [run.method for run in first_runs(experiment) if isinstance(run.recipe, Supervised)]
    task = probes(experiment)[0]
    metric, column = main_number(experiment, task)
    shown = collected.scores[(collected.scores["task"] == task) & (collected.scores["metric"] == metric)]
    series = []
    for y, method in enumerate(methods):
        values = shown[shown["method"] == method]["value"]
        if len(values):
            error = None if len(values) == 1 else [float(values.std())]
            series.append(
                Series(method, [values.mean()], [y], x_error=error, seeds=len(values), style="", panel=task)
            )
    return Chart(
        "class-oracle",
        "Gap to the class oracle",
        "The class oracle uses labels to leave out negatives of the query's class: an upper bound for each "
        "method.",
        f"{column.name} ({column.unit})",
        "",
        series,
        categories=methods,
        annotate=True,
    )


def gain(experiment: Experiment, collected: Collected) -> Chart:
    """Gain over the baseline for each (N, s, s')."""
    baseline, task = baseline_of(experiment) or "", probes(experiment)[0]
    metric, column = main_number(experiment, task)
    shown = collected.scores[(collected.scores["task"] == task) & (collected.scores["metric"] == metric)]
    values = {
        str(method): rows.set_index("seed")["value"].to_dict() for method, rows in shown.groupby("method")
    }
    settings = mixing_grid(experiment)
    tags = [f"{s}, {query}" for s, query in sorted({(s, query) for _, s, query in settings.values()})]
    series = []
    for method, (hardest, s, query) in settings.items():
        difference = paired(values.get(method, {}), values.get(baseline, {}))
        if difference is not None:
            half = None if difference.high is None else [difference.high - difference.mean]
            series.append(
                Series(
                    method, [difference.mean], [tags.index(f"{s}, {query}")], x_error=half,
                    seeds=difference.num, style="", panel=f"N = {hardest}",
                )
            )  # fmt: skip
    return Chart(
        "gain",
        "Gain over the baseline by N, s and s' (figure 4)",
        f"{task} {column.name} minus that of {baseline}, paired over seeds. Error bars: 95% "
        "confidence interval (Student's t); a single seed has none.",
        f"gain over {baseline} ({'points' if column.unit == '%' else column.unit})",
        "s, s'",
        sorted(series, key=lambda each: int(each.panel.removeprefix("N = "))),
        categories=tags,
        annotate=True,
        reference=0.0,
    )


def precision_recall(experiment: Experiment, collected: Collected, name: str) -> Chart:
    """Precision against recall of each row, mean over classes."""
    rows = collected.precision[collected.precision["task"] == f"{DETECTION}{name}"]
    means = rows.groupby(["method", "seed", "recall"], sort=False)["precision"].mean().reset_index()
    return Chart(
        f"precision-recall-{name}",
        f"Precision-recall curve, {name}",
        "Precision at each recall at IoU 0.5, mean over classes. Of each encoder's first fine-tuning, or "
        "of all fine-tunings that are separate jobs.",
        "recall",
        "precision",
        [*_lines(experiment, means, "precision", by="recall")],
    )


def _lines(
    experiment: Experiment,
    table: pd.DataFrame,
    column: str,
    *,
    by: str = "epoch",
    scale: float = 1,
    note: str = "",
    style: str = "-",
) -> Iterator[Series]:
    """A series for each method that has the column."""
    if column not in table:
        return
    for method in experiment.methods:
        rows = table[(table["method"] == method) & table[column].notna()]
        if len(rows):
            grouped = rows.groupby(by)[column]
            seeds = rows["seed"].nunique()
            yield Series(
                method,
                *_points(scale * grouped.mean()),
                std=(scale * grouped.std(ddof=1)).fillna(0).tolist() if seeds > 1 else None,
                seeds=seeds,
                label=f"{method}, {note}" if note else method,
                style=style,
            )


def _points(values: "pd.Series[float]") -> tuple[list[float], list[float]]:
    return [float(str(x)) for x in values.index], [float(value) for value in values]
