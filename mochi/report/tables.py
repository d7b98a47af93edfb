"""Tables: means, standard deviations, differences to the baseline and to the published values.

The long form is summary.csv, a row for each number. `layouts` arranges it like the paper's tables if the
experiment reproduces one; Markdown, LaTeX and HTML show the same cells.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mochi.config import Column, Experiment, baseline_of
from mochi.config import columns as columns_of
from mochi.report.statistics import Difference, components, paired
from mochi.stages import DETECTION

_KEYS = ["method", "task", "metric"]


def read_published(path: Path, experiment: str) -> pd.DataFrame:
    """The papers' numbers for this experiment, and the paper's table that each is in, if any."""
    table = pd.read_csv(path, dtype={"table": "Int64"})
    table = table[table["experiment"] == experiment]
    if "table" not in table:
        table = table.assign(table=pd.array([pd.NA] * len(table), dtype="Int64"))
    return table.rename(columns={"value": "published", "std": "published_std"})[
        [*_KEYS, "published", "published_std", "source", "table"]
    ]


def summarize(scores: pd.DataFrame, published: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """Long form, a row for each method, task and metric that was computed or published.

    Columns:
        mean, std, n, over: over seeds, or over the fine-tunings of a single encoder; `over` says which. The
            sample standard deviation is empty for a single value. With several encoders, the mean of
            each encoder's fine-tunings counts as one value.
        std_encoder, std_fine_tuning: see `statistics.components`; for detection sets.
        difference, low, high, pairs, significant: to the baseline row, see `statistics.paired`.
        published, published_std, to_published, source, table: the paper's number, and ours minus it.
    """
    own = [
        {"method": method, "task": task, "metric": metric, **mean_and_std(rows)}
        for (method, task, metric), rows in scores.groupby(_KEYS, sort=False)
    ]
    columns = [*_KEYS, "mean", "std", "n", "over", "std_encoder", "std_fine_tuning"]
    summary = pd.DataFrame(own, columns=columns).merge(_differences(scores, baseline), on=_KEYS, how="left")
    summary = summary.merge(published, on=_KEYS, how="outer" if len(published) else "left", sort=False)
    summary["to_published"] = summary["mean"] - summary["published"]
    summary["n"] = summary["n"].astype("Int64")
    summary["pairs"] = summary["pairs"].astype("Int64")
    numbers = ["mean", "std", "std_encoder", "std_fine_tuning", "difference", "low", "high", "to_published"]
    summary[numbers] = summary[numbers].astype(float).round(4)
    return _in_order(summary, scores, published)


def _in_order(summary: pd.DataFrame, scores: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Computed numbers first, as they were computed; then those that are published only."""
    keys = pd.concat([scores[_KEYS], published[_KEYS]]).drop_duplicates()
    return keys.merge(summary, on=_KEYS, how="left", sort=False)


def mean_and_std(rows: pd.DataFrame) -> dict[str, Any]:
    """Mean and standard deviation of one cell, and what they are over. `rows` of scores.csv."""
    encoders = rows.groupby("seed", sort=False)["value"]
    if not _is_fine_tuned(rows):
        values, over, parts = rows["value"], "seeds", {}
    else:
        several = encoders.ngroups > 1
        values, over = (encoders.mean(), "encoders") if several else (rows["value"], "fine-tunings")
        deviations = components({seed: scores.tolist() for seed, scores in encoders})
        parts = {"std_encoder": deviations.encoder, "std_fine_tuning": deviations.fine_tuning}
    return {"mean": encoders.mean().mean(), "std": values.std(), "n": len(values), "over": over, **parts}


def _is_fine_tuned(rows: pd.DataFrame) -> bool:
    return bool((rows["fine_tuning"] != "").any())


def _differences(scores: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """Each row minus the baseline, paired over seeds or over the fine-tunings of a single encoder."""
    differences = []
    for (task, metric), rows in scores.groupby(["task", "metric"], sort=False):
        values = dict(list(rows.groupby("method", sort=False)))
        if baseline is None or baseline not in values:
            continue
        for method, own in values.items():
            if method != baseline and (difference := _difference(own, values[baseline])) is not None:
                differences.append(
                    {
                        "method": method, "task": task, "metric": metric,
                        "difference": difference.mean, "low": difference.low, "high": difference.high,
                        "pairs": difference.num, "significant": difference.significant,
                    }
                )  # fmt: skip
    return pd.DataFrame(
        differences, columns=[*_KEYS, "difference", "low", "high", "pairs", "significant"]
    ).astype({"low": float, "high": float, "significant": object})


def _difference(own: pd.DataFrame, baseline: pd.DataFrame) -> Difference | None:
    both = [rows.groupby("seed")["value"].mean().to_dict() for rows in (own, baseline)]
    if _is_fine_tuned(own) and len(both[0].keys() & both[1].keys()) == 1:
        both = [rows.set_index(["seed", "fine_tuning"])["value"].to_dict() for rows in (own, baseline)]
    return paired(*both)


def nested(table: pd.DataFrame) -> dict[str, Any]:
    """{method: {task: {metric: mean}}}, for tools that compare JSON, such as `dvc metrics diff`."""
    content: dict[str, Any] = {}
    for row in table[table["mean"].notna()].itertuples(index=False):
        content.setdefault(row.method, {}).setdefault(row.task, {})[row.metric] = float(row.mean)  # type: ignore[arg-type]
    return content


# ---------------------------------------------------------------- layout


@dataclass(frozen=True)
class Cell:
    """The content of one cell."""

    method: str
    task: str
    metric: str
    mean: float | None
    std: float | None
    published: float | None
    to_published: float | None
    difference: Difference | None
    over: str | None
    """The unit of the mean and the difference: seeds, encoders, fine-tunings."""
    higher_is_better: bool

    @property
    def value(self) -> str:
        """Mean and standard deviation; empty if it was not computed."""
        if self.mean is None:
            return ""
        return f"{self.mean:.1f}" + ("" if self.std is None else f" ± {self.std:.1f}")

    @property
    def to_baseline(self) -> str:
        """The difference with its interval."""
        if self.difference is None:
            return ""
        text = signed(self.difference.mean)
        if self.difference.low is None or self.difference.high is None:
            return f"{text} (one seed)"
        return f"{text} [{signed(self.difference.low)}, {signed(self.difference.high)}]"

    @property
    def better(self) -> bool:
        """Whether it is significantly better than the baseline."""
        apart = self.difference is not None and self.difference.significant
        return bool(apart and self.difference and (self.difference.mean > 0) == self.higher_is_better)


@dataclass(frozen=True)
class Grid:
    """A table for display: a row for each method, empty cells for numbers not computed."""

    title: str
    columns: list[str]
    """Their headers."""
    rows: list[tuple[str, list[Cell | None], str]]
    """Method, its cells, and the number of runs, such as "3 seeds"."""

    @property
    def has_differences(self) -> bool:
        """Whether any cell is compared with the baseline."""
        return any(cell is not None and cell.difference for _, cells, _ in self.rows for cell in cells)


def layouts(experiment: Experiment, summary: pd.DataFrame) -> list[Grid]:
    """The paper's tables that the experiment computes, then classification, then each detection set."""
    grids, taken = [], set()
    for number in sorted(summary["table"].dropna().unique()):
        wanted = summary[summary["table"] == number]
        columns = list(dict.fromkeys(zip(wanted["task"], wanted["metric"], strict=True)))
        taken |= set(columns)
        grids.append(_grid(experiment, summary, columns, f"MoCHi table {number}"))
    left = [
        column
        for column in dict.fromkeys(zip(summary["task"], summary["metric"], strict=True))
        if column not in taken
    ]
    sets = list(dict.fromkeys(task for task, _ in left if task.startswith(DETECTION)))
    if classification := [column for column in left if column[0] not in sets]:
        grids.append(_grid(experiment, summary, classification, "Classification on frozen features"))
    grids += [
        _grid(experiment, summary, [column for column in left if column[0] == name], name) for name in sets
    ]
    return grids


def _grid(
    experiment: Experiment, summary: pd.DataFrame, columns: list[tuple[str, str]], title: str
) -> Grid:
    several = len({task for task, _ in columns}) > 1
    shown = [columns_of(experiment, task).get(metric, Column(metric)) for task, metric in columns]
    headers = [
        f"{task} {column.name}" if several else column.name
        for (task, _), column in zip(columns, shown, strict=True)
    ]
    by_cell = {(row["method"], row["task"], row["metric"]): row for row in summary.to_dict("records")}
    rows = []
    for method in experiment.methods:
        records = [by_cell.get((method, *column)) for column in columns]
        if any(records):
            computed = [row for row in records if row and pd.notna(row["mean"])]
            cells = [
                None if row is None else _cell(row, column)
                for row, column in zip(records, shown, strict=True)
            ]
            rows.append((method, cells, _over(computed)))
    return Grid(title, headers, rows)


def _over(computed: list[dict[Any, Any]]) -> str:
    """The number of runs of the cells of a row, such as "3 seeds" or "1 to 3 seeds"."""
    if not computed:
        return ""
    counts = sorted({int(row["n"]) for row in computed})
    several = " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]]))
    units = ", ".join(dict.fromkeys(row["over"] for row in computed))
    return f"{several} {units.removesuffix('s') if counts == [1] else units}"


def _cell(row: dict[Any, Any], column: Column) -> Cell:
    numbers = {name: None if pd.isna(row[name]) else float(row[name]) for name in _NUMBERS}
    difference = numbers["difference"]
    return Cell(
        method=row["method"],
        task=row["task"],
        metric=row["metric"],
        mean=numbers["mean"],
        std=numbers["std"],
        published=numbers["published"],
        to_published=numbers["to_published"],
        difference=None
        if difference is None
        else Difference(difference, numbers["low"], numbers["high"], int(row["pairs"])),
        over=None if pd.isna(row["over"]) else row["over"],
        higher_is_better=column.higher_is_better,
    )


_NUMBERS = ("mean", "std", "published", "to_published", "difference", "low", "high")


def signed(value: float) -> str:
    """One decimal and the sign, also of what rounds to zero: an interval from +0.0 excludes zero."""
    return f"{value:+.1f}" if value else "0.0"


def notes(experiment: Experiment, grids: Iterable[Grid]) -> list[str]:
    """Notes for reading the tables."""
    lines = [
        "Percent; mean ± sample standard deviation over seeds, or over the fine-tunings of one encoder.",
        "An empty cell was not computed.",
    ]
    cells = [cell for grid in grids for _, row, _ in grid.rows for cell in row if cell is not None]
    if any(cell.published is not None for cell in cells):
        lines.append("In brackets: the published value of the same setting, and ours minus it.")
    if any(cell.difference for cell in cells):
        lines.append(
            f"Differences are to {baseline_of(experiment)}, paired over seeds, with a 95% confidence "
            "interval (Student's t). If it contains zero, the difference is not significant. Bold: "
            f"significantly better than {baseline_of(experiment)}."
        )
        if any(cell.difference and cell.difference.low is None for cell in cells):
            lines.append("A difference from one seed has no interval: it says nothing about other seeds.")
        if any(cell.difference and cell.over == "fine-tunings" for cell in cells):
            lines.append(
                "An interval over the fine-tunings of one encoder says nothing about other encoders."
            )
    if any(cell.metric == "best_lr_top1" for cell in cells):
        lines.append(
            "top-1 is measured after the last epoch at the protocol's learning rate; best lr is the "
            "learning rate with the highest accuracy on a held-out part of train."
        )
    return lines


# ---------------------------------------------------------------- Markdown and LaTeX


def markdown(experiment: Experiment, grids: list[Grid]) -> str:
    """Scores, then differences, of each table."""
    lines = [f"# {experiment.title}", ""]
    for grid in grids:
        if len(grids) > 1 or grid.title.startswith("MoCHi"):
            lines += [f"## {grid.title}", ""]
        lines += [*_markdown_grid(grid, _markdown_value, "over"), ""]
        if grid.has_differences:
            lines += [f"Difference to {baseline_of(experiment)}:", ""]
            lines += [*_markdown_grid(grid, _markdown_difference, None), ""]
    return "\n".join(lines + notes(experiment, grids)) + "\n"


def _markdown_grid(grid: Grid, show: Any, last: str | None) -> Iterator[str]:
    header = ["method", *grid.columns, *([last] if last else [])]
    yield _row(header)
    yield _row(["---"] * len(header))
    for method, cells, over in grid.rows:
        shown = ["" if cell is None else show(cell) for cell in cells]
        if last or any(shown):
            yield _row([method, *shown, *([over] if last else [])])


def _markdown_value(cell: Cell) -> str:
    text = f"**{cell.value}**" if cell.better else cell.value
    return f"{text} {_published(cell)}".strip()


def _published(cell: Cell) -> str:
    if cell.published is None:
        return ""
    ours = "" if cell.to_published is None else f", {signed(cell.to_published)}"
    return f"({cell.published:.1f}{ours})"


def _markdown_difference(cell: Cell) -> str:
    return f"**{cell.to_baseline}**" if cell.better else cell.to_baseline


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def latex(experiment: Experiment, grids: list[Grid]) -> str:
    r"""The same tables in LaTeX with `booktabs`: the difference to the baseline in brackets.

    A published value is on a separate line, in italics.
    """
    lines = [r"% \usepackage{booktabs}"]
    for grid in grids:
        caption = " ".join([f"{experiment.title}: {grid.title}.", *notes(experiment, [grid])])
        lines += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(caption)}}}",
            rf"\begin{{tabular}}{{l{'c' * len(grid.columns)}}}",
            r"\toprule",
            _latex_row(["method", *grid.columns]),
            r"\midrule",
        ]
        for method, cells, _ in grid.rows:
            lines.append(_latex_row([method], [_latex_value(cell) for cell in cells]))
            if any(cell is not None and cell.published is not None for cell in cells):
                lines.append(_latex_row(["  published"], [_latex_published(cell) for cell in cells]))
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def _latex_row(texts: list[str], cells: Iterable[str] = ()) -> str:
    return " & ".join([*map(_escaped, texts), *cells]) + r" \\"


def _latex_value(cell: Cell | None) -> str:
    if cell is None or cell.mean is None:
        return ""
    text = _escaped(cell.value).replace("±", r"$\pm$")
    text = rf"\textbf{{{text}}}" if cell.better else text
    return text + (
        "" if cell.difference is None else f" ({signed(cell.difference.mean)})".replace("-", "$-$")
    )


def _latex_published(cell: Cell | None) -> str:
    return "" if cell is None or cell.published is None else rf"\textit{{{cell.published:.1f}}}"


_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    **{each: f"\\{each}" for each in "&%$#_{}"},
}  # fmt: skip


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)
