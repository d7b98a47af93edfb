"""Every shipped experiment, its results made up: whatever it evaluates, the report is written whole."""

import json
from pathlib import Path

import pandas as pd
import pytest

from mochi.config import Experiment, Untrained, detection_runs, load_experiment, parse_experiment, resolve
from mochi.report import figures, tables
from mochi.report.collect import runs, tasks
from tests.test_config import TINY, changed

ROOT = Path(__file__).parents[2]
SHIPPED = {path.stem: path for path in sorted((ROOT / "config").glob("*.yaml"))}


@pytest.fixture(autouse=True)
def _letters_stay_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the drawings, so that they can be looked for."""
    monkeypatch.setitem(figures._STYLE, "svg.fonttype", "none")


def make_up(experiment: Experiment, results: Path) -> None:
    """Results of every stage of every run: numbers from 40 on, and curves of two epochs."""
    number = 40.0
    for method, seed, folder in runs(experiment, results):
        for task in tasks(experiment):
            write(folder / task, {"top1": number, "top5": 99.0})
            number += 0.25
        trained = not isinstance(resolve(experiment, method, seed).pretrain, Untrained)
        epochs = pd.DataFrame({"epoch": [0, 1], "loss": [4.0, 3.0]} if trained else {"epoch": []})
        (folder / "pretrain").mkdir(parents=True, exist_ok=True)
        epochs.to_csv(folder / "pretrain/metrics.csv", index=False)
        empty = pd.DataFrame(columns=["epoch", "place", "probability"])
        empty.to_csv(folder / "pretrain/matching.csv", index=False)
    for name in experiment.evaluation.detection:
        for method, seed in detection_runs(experiment, name):
            singles = {str(k): {"AP": 20.0, "AP50": number + k} for k in (0, 1)}
            folder = results / experiment.name / method / f"seed{seed}"
            write(folder / f"detection-{name}", {"fine_tunings": singles})
            number += 0.25


def write(folder: Path, metrics: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.mark.parametrize("name", SHIPPED)
def test_tables_and_figures(name: str, tmp_path: Path) -> None:
    experiment = load_experiment(SHIPPED[name])
    make_up(experiment, tmp_path)
    figures.run(experiment, tmp_path, tmp_path / "figures")
    tables.run(experiment, tmp_path, ROOT / "workflow/published.csv", tmp_path / "tables")
    drawn = {path.name for path in (tmp_path / "figures").iterdir()} - {"made_from.json"}
    assert drawn == {
        f"{each}{end}" for each in ("accuracy", "negatives", "training") for end in (".png", ".svg")
    }
    accuracy = (tmp_path / "figures/accuracy.svg").read_text()
    summary = pd.read_csv(tmp_path / "tables/summary.csv")
    evaluated = tasks(experiment)
    panels = [f"{task} top-1 (%)" for task in evaluated] or [
        f"detection-{task} AP50 (%)" for task in experiment.evaluation.detection
    ]
    assert all(f">{panel}<" in accuracy for panel in panels)
    shown = summary[summary["metric"] == ("top1" if evaluated else "AP50")]
    assert len(shown) == sum(len(experiment.methods) for _ in panels)
    for mean, std in zip(shown["mean"], shown["std"], strict=True):
        assert f">{mean:.1f}" + (f" ± {std:.1f}<" if pd.notna(std) else "<") in accuracy
    text = (tmp_path / "tables/summary.md").read_text()
    assert all(f"| {method} |" in text for method in experiment.methods)


def test_an_experiment_without_evaluation_or_training_is_drawn_in_words(tmp_path: Path) -> None:
    content = changed("evaluation", {"image_size": 16, "resize": 16}) | {
        "methods": {"random-init": TINY["methods"]["random-init"]}
    }
    experiment = parse_experiment(content, "x.yaml")
    make_up(experiment, tmp_path)
    figures.run(experiment, tmp_path, tmp_path / "figures")
    assert "the experiment has no evaluation" in (tmp_path / "figures/accuracy.svg").read_text()


def test_rows_without_a_detection_set_stay_empty(tmp_path: Path) -> None:
    """A set for some rows only: the others keep their place, without a number."""
    experiment = load_experiment(SHIPPED["raccoon"])
    chosen = experiment.evaluation.detection["raccoon"].model_copy(update={"methods": ["moco-v2"]})
    evaluation = experiment.evaluation.model_copy(update={"detection": {"raccoon": chosen}})
    experiment = experiment.model_copy(update={"evaluation": evaluation})
    make_up(experiment, tmp_path)
    figures.run(experiment, tmp_path, tmp_path / "figures")
    accuracy = (tmp_path / "figures/accuracy.svg").read_text()
    assert ">random-init<" in accuracy
    assert accuracy.count(" ± ") == 1
