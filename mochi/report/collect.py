"""Collect the results of an experiment from its folders into a few files for git."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mochi import text
from mochi.config import Experiment, all_runs, columns
from mochi.errors import DataError, UserError
from mochi.provenance.wanted import (
    RECORD,
    Result,
    analyzed,
    evaluated,
    evaluations,
    pretrained,
    searches,
)
from mochi.stages import column_of
from mochi.text import Fields


class MissingResultError(UserError):
    """A requested result does not exist."""


@dataclass(frozen=True)
class Collected:
    """All results of an experiment, and the missing ones."""

    scores: pd.DataFrame
    """One row for each number: method, seed, task, metric, fine_tuning, value (percent).

    A detection set has one row for each fine-tuning (MoCHi section 4.2); elsewhere `fine_tuning` is empty.
    """
    curves: pd.DataFrame
    """metrics.csv of every pretraining, stacked."""
    matching: pd.DataFrame
    """matching.csv of every pretraining, stacked."""
    confusion: pd.DataFrame
    """confusion.csv of every evaluation, stacked: method, seed, task, class, predicted, images."""
    precision: pd.DataFrame
    """precision_recall.csv of every detection set, stacked."""
    analyses: dict[tuple[str, int], dict[str, Any]]
    """Run -> analysis.json."""
    records: dict[str, dict[str, Any]]
    """Folder -> provenance of every encoder, evaluation and analysis: what `mochi explain` reads."""
    missing: list[str]
    """Results that are missing or cannot be read, with what to do."""


def collect(experiment: Experiment) -> Collected:
    """Collect the existing results; list the missing ones."""
    reader = _Reader()
    frames: dict[str, list[pd.DataFrame]] = {
        name: [] for name in ("metrics", "matching", "confusion", "precision")
    }
    scores: list[tuple[Any, ...]] = []
    analyses = {}
    for method, seed in all_runs(experiment):
        result = pretrained(experiment, method, seed)
        for name in ("metrics", "matching"):
            frames[name] += reader.table(result.folder / f"{name}.csv", method=method, seed=seed)
        reader.record(result)
    for method, seed, task in evaluations(experiment):
        result, column = evaluated(experiment, method, seed, task), column_of(task)
        numbers = reader.scores(result.folder / "metrics.json", columns(experiment, task))
        scores += [(method, seed, column, *number) for number in numbers]
        for name, file in (("confusion", "confusion.csv"), ("precision", "precision_recall.csv")):
            if file in result.outputs:
                frames[name] += reader.table(result.folder / file, method=method, seed=seed, task=column)
        reader.record(result)
    for method, seed, task in searches(experiment):
        reader.record(evaluated(experiment, method, seed, task))
    for method, seed in all_runs(experiment):
        result = analyzed(experiment, method, seed)
        if (analysis := reader.json(result.folder / "analysis.json")) is not None:
            analyses[method, seed] = analysis
        reader.record(result)
    keys = ["method", "seed"]
    return Collected(
        scores=pd.DataFrame(scores, columns=[*keys, "task", "metric", "fine_tuning", "value"]),
        curves=_stacked(frames["metrics"], [*keys, "epoch"]),
        matching=_stacked(frames["matching"], [*keys, "epoch", "rank", "probability"]),
        confusion=_stacked(frames["confusion"], [*keys, "task", "class", "predicted", "images"]),
        precision=_stacked(frames["precision"], [*keys, "task", "class", "recall", "precision"]),
        analyses=analyses,
        records=reader.records,
        missing=reader.missing,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        MissingResultError: it does not exist, or is not a JSON object.
    """
    if not path.exists():
        raise _not_found(path)
    try:
        return dict(Fields.of(text.read_json(path, "a result"), str(path)).values)
    except DataError as error:
        raise MissingResultError(f"{error}; compute it again") from None


def read_table(path: Path, texts: Iterable[str]) -> pd.DataFrame:
    """A table of numbers; the columns `texts` are text. Only curves may have empty cells.

    Raises:
        MissingResultError: it does not exist, is not CSV, or has text in another column.
    """
    has_gaps = path.name == "metrics.csv"
    try:
        # Elsewhere "NA" is the name of a class, and "01" too.
        table = pd.read_csv(path, dtype=dict.fromkeys(texts, str), na_filter=has_gaps)
    except FileNotFoundError:
        raise _not_found(path) from None
    except pd.errors.EmptyDataError:  # a set without this table
        return pd.DataFrame()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not has_gaps and len(table):
        for name, column in table.drop(columns=[*texts], errors="ignore").items():
            if not pd.api.types.is_numeric_dtype(column):
                raise _unreadable(path, f"column {name}: found {text.shown(column.iloc[0])}, not a number")
    return table


def _scores(path: Path, metrics: dict[str, Any], names: Iterable[str]) -> list[tuple[str, str, float]]:
    """(metric, fine-tuning, value) of each number of a metrics.json in the tables."""
    singles = metrics.get("fine_tunings", {"": metrics})
    Fields.of(singles, f"{path}: fine_tunings")
    numbers = {
        repeat: Fields.of(single, f"{path}: {repeat}".rstrip(": ")) for repeat, single in singles.items()
    }
    return [
        (metric, repeat, numbers[repeat].number(metric))
        for repeat, single in singles.items()
        for metric in names
        if single.get(metric) is not None  # None: not measured
    ]


class _Reader:
    """Reads files; records missing ones."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.records: dict[str, dict[str, Any]] = {}

    def json(self, path: Path) -> dict[str, Any] | None:
        try:
            return read_json(path)
        except MissingResultError as error:
            self.missing.append(str(error))
            return None

    def record(self, result: Result) -> None:
        if (record := self.json(result.folder / RECORD)) is not None:
            self.records[result.folder.as_posix()] = record

    def scores(self, path: Path, names: Iterable[str]) -> list[tuple[str, str, float]]:
        metrics = self.json(path)
        try:
            return [] if metrics is None else _scores(path, metrics, names)
        except DataError as error:
            self.missing.append(f"{error}; compute it again")
            return []

    def table(self, path: Path, **keys: Any) -> list[pd.DataFrame]:
        """The CSV with the keys as its first columns; no frame if it has no rows. Names stay text."""
        try:
            frame = read_table(path, ("class", "predicted"))
        except MissingResultError as error:
            self.missing.append(str(error))
            return []
        for position, (name, value) in enumerate(keys.items()):
            frame.insert(position, name, value)
        return [frame] if len(frame) else []


def _stacked(frames: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def _not_found(path: Path) -> MissingResultError:
    return MissingResultError(f"{path}: not found; run `snakemake {path} --configfile FILE` first")


def _unreadable(path: Path, error: object) -> MissingResultError:
    return MissingResultError(f"{path}: cannot be read: {error}; compute it again")
