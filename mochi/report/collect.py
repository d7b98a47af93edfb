"""The results of an experiment, read from its tree."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from mochi.config import EVALUATIONS, Experiment, detection_runs, method_seeds
from mochi.errors import UserError

CURVES = ("metrics.csv", "matching.csv")
_DETECTION_METRICS = ("AP50", "AP", "AP75", "mask_AP50", "mask_AP", "mask_AP75")


class MissingResultError(UserError):
    """A result that the table needs is not there."""


def runs(experiment: Experiment, results: Path) -> Iterator[tuple[str, int, Path]]:
    """(method, seed, folder) of every run, in the order of the experiment file."""
    for method in experiment.methods:
        for seed in method_seeds(experiment, method):
            yield method, seed, results / experiment.name / method / f"seed{seed}"


def tasks(experiment: Experiment) -> list[str]:
    """The evaluations that the experiment asks for, in the order of the table."""
    return [task for task in EVALUATIONS if getattr(experiment.evaluation, task) is not None]


def read_json(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        MissingResultError: it is not there.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingResultError(f"{path}: no such result; run `snakemake {path}` first") from None
    assert isinstance(content, dict)
    return content


def scores(experiment: Experiment, results: Path) -> pd.DataFrame:
    """One row for each number of each run: method, seed, task, metric, value (percent).

    A detection set has one row for each fine-tuning: its spread is over those (MoCHi section 4.2).
    """
    rows: list[tuple[str, int, str, str, float]] = []
    for method, seed, folder in runs(experiment, results):
        for task in tasks(experiment):
            metrics = read_json(folder / task / "metrics.json")
            shown = [metric for metric in ("top1", "top5", "best_lr_top1") if metric in metrics]
            rows += [(method, seed, task, metric, metrics[metric]) for metric in shown]
    for name in experiment.evaluation.detection:
        task = f"detection-{name}"
        for method, seed in detection_runs(experiment, name):
            folder = results / experiment.name / method / f"seed{seed}" / task
            for single in read_json(folder / "metrics.json")["fine_tunings"].values():
                rows += [
                    (method, seed, task, metric, single[metric])
                    for metric in _DETECTION_METRICS
                    if metric in single
                ]
    return pd.DataFrame(rows, columns=["method", "seed", "task", "metric", "value"])


def metrics_files(experiment: Experiment, results: Path) -> list[Path]:
    """Every file that `scores` reads."""
    files = [
        folder / task / "metrics.json"
        for _, _, folder in runs(experiment, results)
        for task in tasks(experiment)
    ]
    return files + [
        results / experiment.name / method / f"seed{seed}" / f"detection-{name}" / "metrics.json"
        for name in experiment.evaluation.detection
        for method, seed in detection_runs(experiment, name)
    ]


def curve_files(experiment: Experiment, results: Path) -> list[Path]:
    """Every file that `curves` reads."""
    return [folder / "pretrain" / name for _, _, folder in runs(experiment, results) for name in CURVES]


def curves(experiment: Experiment, results: Path, name: str) -> pd.DataFrame:
    """A csv of every run's pretrain stage, stacked, with method and seed; untrained runs give no rows."""
    frames = []
    for method, seed, folder in runs(experiment, results):
        frame = pd.read_csv(folder / "pretrain" / name)
        if len(frame):
            frames.append(frame.assign(method=method, seed=seed))
    return (
        pd.concat(frames, ignore_index=True)
        if frames
        else pd.DataFrame(columns=["method", "seed", "epoch"])
    )
