"""Tables: mean and standard deviation over seeds, compared with the published value where there is one."""

from pathlib import Path
from typing import Any

import pandas as pd

from mochi.config import Experiment, columns
from mochi.stages import DETECTION

_KEYS = ["method", "task", "metric"]


def summarize(scores: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Long form: method, task, metric, mean, std, n, published, published_std, source.

    The standard deviation is over seeds (n - 1); empty for a single seed.
    """
    grouped = scores.groupby(_KEYS, sort=False)["value"].agg(["mean", "std", "count"]).reset_index()
    grouped = grouped.rename(columns={"count": "n"}).round({"mean": 4, "std": 4})
    return grouped.merge(published, on=_KEYS, how="left")


def nested(table: pd.DataFrame) -> dict[str, Any]:
    """{method: {task: {metric: mean}}}, for tools that compare JSON, such as `dvc metrics diff`."""
    content: dict[str, Any] = {}
    for row in table.itertuples(index=False):
        content.setdefault(row.method, {}).setdefault(row.task, {})[row.metric] = float(row.mean)  # type: ignore[arg-type]
    return content


def markdown(experiment: Experiment, table: pd.DataFrame) -> str:
    """Tables to look at, a row for each method: classification, then each detection set."""
    sets = [task for task in dict.fromkeys(table["task"]) if task.startswith(DETECTION)]
    classification = [task for task in dict.fromkeys(table["task"]) if task not in sets]
    lines = [f"# {experiment.title}", ""]
    if classification:
        lines += [*_grid(experiment, table, classification, "seeds"), ""]
    for task in sets:
        lines += [f"## {task}", "", *_grid(experiment, table, [task], "fine-tunings"), ""]
    lines += [
        "Percent; mean ± sample standard deviation over seeds, or over fine-tunings. In brackets: the",
        "published value, where there is one for this very setting. `linear top-1` is the last epoch at",
        "the protocol's learning rate; `best lr` is the rate that won on a held-out part of train.",
    ]
    return "\n".join(lines) + "\n"


def _grid(experiment: Experiment, table: pd.DataFrame, tasks: list[str], repeats: str) -> list[str]:
    """One table: a column for each number of `tasks`, and how many runs each rests on."""
    table = table[table["task"].isin(tasks)]
    shown = list(dict.fromkeys(zip(table["task"], table["metric"], strict=True)))
    cells = {(row.method, row.task, row.metric): _cell(row) for row in table.itertuples(index=False)}
    names = [columns(experiment, task)[metric].name for task, metric in shown]
    if len(tasks) > 1:
        names = [f"{task} {name}" for (task, _), name in zip(shown, names, strict=True)]
    header = ["method", *names, repeats]
    lines = [_row(header), _row(["---"] * len(header))]
    for method in [method for method in experiment.methods if method in set(table["method"])]:
        num = table.loc[table["method"] == method, "n"].max()
        lines.append(_row([method, *(cells.get((method, *column), "") for column in shown), str(num)]))
    return lines


def _cell(row: object) -> str:
    mean, std, published = (getattr(row, name) for name in ("mean", "std", "published"))
    text = f"{mean:.1f}" + (f" ± {std:.1f}" if pd.notna(std) else "")
    return text + (f" ({published:.1f})" if pd.notna(published) else "")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def read_published(path: Path, experiment: str) -> pd.DataFrame:
    """The papers' numbers for this experiment."""
    table = pd.read_csv(path)
    table = table[table["experiment"] == experiment]
    return table.rename(columns={"value": "published", "std": "published_std"})[
        [*_KEYS, "published", "published_std", "source"]
    ]
