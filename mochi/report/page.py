"""report.html: all results in one self-contained file.

It has no scripts and makes no requests; a content security policy enforces this. The template escapes all
text from files.
"""

import io
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from mochi.config import Experiment, all_runs, baseline_of, first_runs
from mochi.layout import Paths
from mochi.provenance.wanted import analyzed, evaluated, evaluations, searches
from mochi.report.analyses import Chart
from mochi.report.collect import Collected
from mochi.report.figures import confusion_picture, data_uri
from mochi.report.tables import Grid, notes
from mochi.stages import DETECTION, column_of

_MAX_MATRIX = 200
"""Most classes for which a confusion matrix is drawn."""
_MAX_CLASSES = 2000
"""Most rows of a table of classes."""
_MAX_CONFUSED = 10
"""Number of listed pairs of classes."""
_WIDTH, _QUALITY = 900, 80
"""Width in pixels and JPEG quality of the detection pictures."""


def render(
    experiment: Experiment,
    collected: Collected,
    grids: list[Grid],
    charts: Sequence[Chart],
    figures: Path,
    deviations: Path,
) -> str:
    """Render the page.

    Args:
        experiment: the experiment.
        collected: its existing results.
        grids: the tables.
        charts: the content of the figures.
        figures: folder with an svg of each chart.
        deviations: text file with a Markdown list; if missing, none are shown.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        experiment=experiment,
        baseline=baseline_of(experiment),
        missing=collected.missing,
        work=_work(collected),
        machines=_machines(collected),
        settings=_settings(experiment),
        grids=grids,
        notes=notes(experiment, grids),
        anchor=_anchor,
        charts=[
            (chart, data_uri((figures / f"{chart.name}.svg").read_bytes(), "image/svg+xml"))
            for chart in charts
        ],
        classes=[*_classes(experiment, collected)],
        encoders=[*_encoders(experiment, collected)],
        detections=[*_detections(experiment)],
        health=[*_health(experiment, collected)],
        deviations=_deviations(deviations),
        numbers=[*_numbers(experiment, collected)],
    )


def duration(seconds: float) -> str:
    """Duration in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _work(collected: Collected) -> list[tuple[str, int, str, str]]:
    """Stage, number of runs, total time, mean time."""
    records = pd.DataFrame(
        [
            (record.get("stage", "?"), record.get("wall_seconds", 0.0))
            for record in collected.records.values()
        ],
        columns=["stage", "seconds"],
    )
    rows = records.groupby("stage", sort=False)["seconds"]
    return [(str(stage), len(own), duration(own.sum()), duration(own.mean())) for stage, own in rows]


def _machines(collected: Collected) -> list[str]:
    """Every distinct combination of machine, versions and commit."""
    return list(
        dict.fromkeys(_machine(record) for record in collected.records.values() if "hardware" in record)
    )


def _machine(record: Mapping[str, Any]) -> str:
    hardware, versions = record["hardware"], record.get("versions", {})
    device = ", ".join(hardware.get("gpus", [])) or hardware.get("cpu", "unknown processor")
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{device}, {hardware.get('cores', '?')} cores; {packages}; commit {commit(record)}"


def commit(record: Mapping[str, Any]) -> str:
    """Short commit of a record."""
    git = record.get("git")
    if not git:
        return "unknown"
    return f"{git['commit'][:12]}{' with uncommitted changes' if git['dirty'] else ''}"


def _settings(experiment: Experiment) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each row with the settings of its first run."""
    rows = []
    for run in first_runs(experiment):
        settings = run.settings()
        rows.append((run.method, [*_flat(settings.get("recipe", {})), *_flat(settings.get("encoder", {}))]))
    return rows


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _anchor(method: str, task: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", f"{method}--{task}")


def _classes(experiment: Experiment, collected: Collected) -> Iterator[dict[str, Any]]:
    """Per-class accuracy of each frozen evaluation, its confusion matrix and most confused pairs."""
    for task, table in collected.confusion.groupby("task", sort=False):
        names = list(dict.fromkeys([*table["class"], *table["predicted"]]))
        methods = [method for method in experiment.methods if (table["method"] == method).any()]
        matrices = {method: _matrix(table[table["method"] == method], names) for method in methods}
        accuracies = {method: _accuracies(matrix) for method, matrix in matrices.items()}
        sizes = [matrix.sum(1) / _seeds(table, method) for method, matrix in matrices.items()]
        totals = np.max(sizes, axis=0)
        yield {
            "task": task,
            "methods": methods,
            "rows": [
                (index + 1, name, round(totals[index]), [accuracies[method][index] for method in methods])
                for index, name in enumerate(names[:_MAX_CLASSES])
            ],
            "left_out": max(0, len(names) - _MAX_CLASSES),
            "pictures": [
                (method, confusion_picture(matrix, f"{method}, {task}"))
                for method, matrix in matrices.items()
                if len(names) <= _MAX_MATRIX
            ],
            "confused": [(method, _most_confused(matrix, names)) for method, matrix in matrices.items()],
        }


def _seeds(table: pd.DataFrame, method: str) -> int:
    return int(table[table["method"] == method]["seed"].nunique())


def _matrix(table: pd.DataFrame, names: list[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(C, C) images by class and predicted class, summed over seeds."""
    index_of = {name: index for index, name in enumerate(names)}
    matrix = np.zeros((len(names), len(names)))
    for true, predicted, images in zip(table["class"], table["predicted"], table["images"], strict=True):
        matrix[index_of[true], index_of[predicted]] += images
    return matrix


def _accuracies(matrix: np.ndarray[Any, np.dtype[np.float64]]) -> list[float | None]:
    """Accuracy of each class in percent; None without an image."""
    return [
        100 * matrix[index, index] / total if total else None for index, total in enumerate(matrix.sum(1))
    ]


def _most_confused(
    matrix: np.ndarray[Any, np.dtype[np.float64]], names: list[str]
) -> list[tuple[str, str, float]]:
    """(class, predicted class, percentage of the class), the largest first."""
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    np.fill_diagonal(shares, 0)
    order = np.argsort(-shares, axis=None, kind="stable")[:_MAX_CONFUSED]
    pairs = [np.unravel_index(index, shares.shape) for index in order]
    return [(names[a], names[b], float(shares[a, b])) for a, b in pairs if shares[a, b] > 0]


def _encoders(experiment: Experiment, collected: Collected) -> Iterator[dict[str, Any]]:
    """Nearest neighbours and feature map of the first seed of each row."""
    for method in experiment.methods:
        seeds = [seed for row, seed in collected.analyses if row == method]
        for seed in seeds[:1]:
            folder = analyzed(experiment, method, seed).folder
            pictures = {name: _inlined(folder / f"{name}.jpg") for name in ("neighbours", "map")}
            yield {"method": method, "seed": seed, **collected.analyses[method, seed], **pictures}


def _detections(experiment: Experiment) -> Iterator[tuple[str, str, str]]:
    """Set, row and picture of the first encoder of each row, of its first fine-tuning."""
    shown = set()
    for method, seed, task in evaluations(experiment):
        column = column_of(task)
        if column.startswith(DETECTION) and (method, column) not in shown:
            picture = _inlined(evaluated(experiment, method, seed, task).folder / "detections.png")
            if picture:
                shown.add((method, column))
                yield column.removeprefix(DETECTION), f"{method}, seed {seed}", picture


def _inlined(path: Path) -> str:
    """A picture as an embedded JPEG of limited size; empty if it does not exist."""
    try:
        content = path.read_bytes()
        if path.suffix == ".jpg":
            return data_uri(content, "image/jpeg")
        with Image.open(io.BytesIO(content)) as picture:
            small = picture.convert("RGB")
    except OSError:
        return ""
    small.thumbnail((_WIDTH, 4 * _WIDTH))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=_QUALITY)
    return data_uri(buffer.getvalue(), "image/jpeg")


def _health(experiment: Experiment, collected: Collected) -> Iterator[dict[str, Any]]:
    """The last epoch of each training, and its speed."""
    for method, seed in all_runs(experiment):
        rows = collected.curves[(collected.curves["method"] == method) & (collected.curves["seed"] == seed)]
        if not len(rows):
            continue
        last = rows.iloc[-1].to_dict()
        known = {name: None if pd.isna(value) else value for name, value in last.items()}
        yield {
            "method": method,
            "seed": seed,
            "epochs": len(rows),
            "loss": known.get("loss"),
            "chance": known.get("chance"),
            "accuracy": known.get("accuracy"),
            "status": known.get("status"),
            "queue_fill": known.get("queue_fill"),
            "images_per_second": _mean(rows, "images_per_second"),
            "data_wait": _mean(rows, "data_wait"),
        }


def _mean(rows: pd.DataFrame, column: str) -> float | None:
    return float(rows[column].mean()) if column in rows and rows[column].notna().any() else None


def _deviations(path: Path) -> list[str]:
    """The items of the list, each on one line, links as their text."""
    if not path.exists():
        return []
    items = re.findall(r"^- (.*(?:\n  .*)*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    texts = [" ".join(item.split()) for item in items]
    return [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).replace("`", "") for text in texts]


def _numbers(experiment: Experiment, collected: Collected) -> Iterator[dict[str, Any]]:
    """Scores of each cell, and the provenance of its evaluations and encoders."""
    paths = Paths(experiment.name)
    jobs = [*searches(experiment), *evaluations(experiment)]
    for (method, task), scores in collected.scores.groupby(["method", "task"], sort=False):
        folders = [
            folder
            for seed in scores["seed"].unique()
            for folder in (
                *(
                    paths.evaluation(row, own, job)
                    for row, own, job in jobs
                    if (row, own, column_of(job)) == (method, seed, task)
                ),
                paths.pretrain(str(method), seed),
            )
        ]
        yield {
            "anchor": _anchor(str(method), str(task)),
            "method": method,
            "task": task,
            "scores": [
                (metric, ", ".join(f"{value:.2f}" for value in values["value"]))
                for metric, values in scores.groupby("metric", sort=False)
            ],
            "links": [
                _link(folder, collected.records[folder.as_posix()])
                for folder in folders
                if folder.as_posix() in collected.records
            ],
        }


def _link(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": record.get("result", folder.as_posix()),
        "command": shlex.join(record.get("command", [])),
        "settings": record.get("settings_digest", "unknown"),
        "code": record.get("code_digest", "unknown"),
        "accepted": bool(record.get("accepted_code")),
        "commit": commit(record),
        "inputs": [(entry["path"], entry["sha256"]) for entry in record.get("inputs", {}).values()],
        "took": duration(record.get("wall_seconds", 0.0)),
    }
