"""The results of an experiment, gathered from its folders into few files that git keeps."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from mochi.config import Experiment, all_runs, columns
from mochi.errors import UserError
from mochi.layout import Layout
from mochi.provenance.wanted import RECORD, evaluated, evaluations, pretrained, searches
from mochi.stages import column_of


class MissingResultError(UserError):
    """A result that the report needs is not there."""


def read_json(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        MissingResultError: it is not there, or is not JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingResultError(f"{path}: not found; run `snakemake {path}` first") from None
    except (OSError, ValueError) as error:
        raise MissingResultError(f"{path}: cannot be read: {error}; compute it again") from None
    assert isinstance(content, dict)
    return content


def scores(experiment: Experiment) -> pd.DataFrame:
    """One row for each number: method, seed, task, metric, fine_tuning, value (percent).

    A detection set has one row for each fine-tuning: its standard deviation is over those (MoCHi section
    4.2); elsewhere `fine_tuning` is empty.
    """
    places, rows = Layout(experiment.name), []
    for method, seed, task in evaluations(experiment):
        metrics = read_json(places.evaluation(method, seed, task) / "metrics.json")
        singles = metrics.get("fine_tunings", {"": metrics})
        rows += [
            (method, seed, column_of(task), metric, repeat, single[metric])
            for repeat, single in singles.items()
            for metric in columns(experiment, task)
            if metric in single
        ]
    return pd.DataFrame(rows, columns=["method", "seed", "task", "metric", "fine_tuning", "value"])


def curves(experiment: Experiment, name: str) -> pd.DataFrame:
    """A CSV of every pretraining (metrics.csv, matching.csv), stacked; untrained rows have none."""
    frames = []
    for method, seed in all_runs(experiment):
        path = Layout(experiment.name).pretrain(method, seed) / name
        if not path.exists():
            raise MissingResultError(f"{path}: not found; run `snakemake {path}` first")
        if len(frame := pd.read_csv(path)):
            frame.insert(0, "method", method)
            frame.insert(1, "seed", seed)
            frames.append(frame)
    if not frames:
        return pd.DataFrame(columns=["method", "seed", "epoch"])
    return pd.concat(frames, ignore_index=True)


def records(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Folder -> provenance of every encoder and evaluation: what `mochi explain` reads."""
    return {folder.as_posix(): read_json(folder / RECORD) for folder in _folders(experiment)}


def _folders(experiment: Experiment) -> Iterator[Path]:
    for run in all_runs(experiment):
        yield pretrained(experiment, *run).folder
    for one in [*searches(experiment), *evaluations(experiment)]:
        yield evaluated(experiment, *one).folder
