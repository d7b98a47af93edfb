"""Write results of an experiment with chosen numbers into the current folder, as the stages would."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from mochi import layout
from mochi.config import Contrastive, Experiment, PretrainRun, pretrain_run
from mochi.provenance import wanted
from mochi.provenance.record import Stopwatch, write_record
from mochi.provenance.wanted import Result
from mochi.stages import DETECTION, STAGES

Metrics = Callable[[str, int, str], dict[str, Any]]
"""(method, seed, task) -> metrics.json."""


def top1_of(values: dict[tuple[str, int], float]) -> Metrics:
    """The same top-1 for every evaluation of a run."""
    return lambda method, seed, task: {"top1": values[method, seed], "k": 5}


def make_up(experiment: Experiment, metrics: Metrics, *, with_records: bool = True) -> None:
    """Write everything that the report reads.

    A trained row has two epochs with the loss 4 - epoch + seed; a contrastive one also an accuracy of 0.2,
    with synthetics 0.1, and nine matching probabilities 0.1 / rank.

    Args:
        experiment: whose results.
        metrics: the content of each metrics.json.
        with_records: write complete provenance, which takes a while; False: empty files.
    """
    assert not Path("mochi").exists(), "must not run in the project folder"
    layout.PUBLISHED.parent.mkdir(parents=True, exist_ok=True)
    layout.PUBLISHED.write_text("experiment,method,task,metric,value,std,source,table\n")
    layout.DEVIATIONS.write_text("- A pair is of two `different`\n  negatives ([why](x.md)).\n- Another.\n")
    if with_records:
        for result in wanted.results(experiment):
            if result.stage in ("prepare", "scenes"):
                _finish(result, {name: f"{result.label} {name}" for name in result.outputs})
    for run in wanted.all_runs(experiment):
        files = _pretraining(pretrain_run(experiment, *run))
        _finish(wanted.pretrained(experiment, *run), files, with_records=with_records)
    for one in wanted.evaluations(experiment):
        result = wanted.evaluated(experiment, *one)
        for path in result.inputs.values():  # annotations of sets that are not generated
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        files = dict.fromkeys(STAGES[result.stage].outputs, "") | {
            "metrics.json": json.dumps(metrics(*one))
        }
        if result.stage == "evaluate":
            files["confusion.csv"] = f"class,predicted,images\n{CLASS},{CLASS},3\n{CLASS},NA,1\nNA,NA,4\n"
        else:
            files["precision_recall.csv"] = (
                "class,recall,precision\na,0.0,1.0\na,1.0,0.5\nb,0.0,0.5\nb,1.0,0.0\n"
            )
        _finish(result, files, with_records=with_records)
    for method, seed in wanted.all_runs(experiment):
        result = wanted.analyzed(experiment, method, seed)
        files = {
            "analysis.json": json.dumps(analysis(seed, "head" in result.settings)),
            "map.jpg": "",
            "neighbours.jpg": "",
        }
        _finish(result, files, with_records=with_records)


CLASS = "<script>alert('class')</script>"
"""A class name that must not be run as a script."""


def analysis(seed: int, embedded: bool) -> dict[str, Any]:
    """analysis.json: alignment 0.5 + seed and uniformity -1 - seed; half of that for embedded features."""
    pooled = {"dim": 64, "alignment": 0.5 + seed, "uniformity": -1.0 - seed}
    half = {"dim": 16, "alignment": (0.5 + seed) / 2, "uniformity": (-1.0 - seed) / 2}
    spaces = {"pooled": pooled} | ({"embedded": half} if embedded else {})
    near = [{"image": "b.png", "class": None, "similarity": 0.5}]
    query = {"image": "a.png", "class": CLASS, **dict.fromkeys(spaces, near)}
    about = {"split": "val", "num_images": 8, "num_labelled": 8, "map_method": "t-SNE, perplexity 2"}
    return about | {"spaces": spaces, "queries": [query]}


def fine_tunings(*values: float) -> dict[str, Any]:
    """metrics.json of a detection set: AP50 of each fine-tuning, AP 20."""
    singles = {str(seed): {"AP50": value, "AP": 20.0, "coco_AP": 1.0} for seed, value in enumerate(values)}
    return {"AP50": sum(values) / len(values), "fine_tunings": singles}


def is_detection(task: str) -> bool:
    return task.startswith(DETECTION)


def _pretraining(run: PretrainRun) -> dict[str, str]:
    contrastive = isinstance(run.recipe, Contrastive)
    mixing = isinstance(run.recipe, Contrastive) and run.recipe.negatives.make().num_synthetics
    epochs = []
    for epoch in (0, 1) if run.is_trained else ():
        row: dict[str, Any] = {"epoch": epoch, "loss": 4.0 - epoch + run.seed, "chance": 4.6}
        if contrastive:
            row |= {"queue_fill": 1.0, "accuracy": 0.2, "accuracy_with_synthetics": 0.1}
            row |= {"false_negatives": 0.06}
        if mixing:
            row |= {"false_parents_any": 0.11, "false_parents_all": 0.01}
        epochs.append(row)
    matching = [
        {"epoch": epoch, "rank": rank, "probability": 0.1 / rank}
        for epoch in ((0, 1) if contrastive else ())
        for rank in range(1, 10)
    ]
    return {
        "encoder.safetensors": f"{run.method} {run.seed}",
        "head.safetensors": "",
        "metrics.csv": _csv(epochs, ["epoch"]),
        "matching.csv": _csv(matching, ["epoch", "rank", "probability"]),
    }


def _csv(rows: list[dict[str, Any]], columns: list[str]) -> str:
    return pd.DataFrame(rows, columns=None if rows else columns).to_csv(index=False)


def _finish(result: Result, files: dict[str, str], *, with_records: bool = True) -> None:
    result.folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (result.folder / name).write_text(text)
    if with_records:
        write_record(result.folder, result, Stopwatch())
    else:
        result.record.write_text("{}")


def published_in(folder: Path) -> Path:
    """A table of published numbers: one of the tiny experiment and one of another."""
    file = folder / "published.csv"
    file.write_text(
        "experiment,method,task,metric,value,std,source,table\n"
        "tiny,mochi-16-24-8,linear,top1,79.0,0.4,table 1,\n"
        "other,random-init,linear,top1,1.0,,table 9,9\n"
    )
    return file


def redirected(result: Result, folder: Path) -> Result:
    """The same report with another folder for its files."""
    return replace(result, folder=folder)
