"""The report of every shipped experiment is complete, with made-up results where none are committed."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from mochi.config import load_experiment, probes
from mochi.provenance.wanted import figures, reported
from mochi.report import stage
from tests.report.made_up import fine_tunings, is_detection, make_up

ROOT = Path(__file__).parents[2]
SHIPPED = {path.stem: path for path in sorted((ROOT / "config").glob("*.yaml"))}
COMMITTED = {
    "config": "embedded",
    "cifar10-small": "cifar10-small",
    "cifar10-grid": "cifar10-grid",
    "cifar10-resnet18": "cifar10-resnet18",
}
"""Experiment file -> folder in results/."""


class Numbers:
    """A different number for every evaluation."""

    def __init__(self) -> None:
        self._number = 40.0

    def __call__(self, method: str, seed: int, task: str) -> dict[str, Any]:
        self._number += 0.25
        if is_detection(task):
            return fine_tunings(self._number, self._number + 1)
        return {"top1": self._number, "top5": 99.0}


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_report_is_complete(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = reported(load_experiment(SHIPPED[name]))
    assert result.folder == Path("results", COMMITTED[name])
    assert [
        each for each in (*result.outputs, "provenance.json") if not (result.folder / each).exists()
    ] == []


@pytest.mark.parametrize("name", sorted(SHIPPED.keys() - COMMITTED))
def test_the_report_is_complete(
    name: str, tmp_path: Path, saved_figures: dict[str, Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment(SHIPPED[name])
    make_up(experiment, Numbers(), with_records=False)
    result = reported(experiment)
    stage.run(experiment, result, ROOT / "workflow/published.csv")
    assert all((result.folder / name).stat().st_size for name in result.outputs)
    assert result.record.exists()
    assert set(saved_figures) == set(figures(experiment)) > {"accuracy", "loss", "proxy-task"}
    assert not [
        name
        for name, figure in saved_figures.items()
        for axes in figure.axes
        if axes.texts and "nothing" in axes.texts[0].get_text()
    ]

    evaluated = probes(experiment)
    panels = {axes.get_xlabel(): axes for axes in saved_figures["accuracy"].axes if axes.axison}
    expected = {f"{task} top-1 (%)": task for task in evaluated} or {
        f"detection-{task} AP50 (%)": f"detection-{task}" for task in experiment.evaluation.detection
    }
    assert list(panels) == list(expected)
    summary = pd.read_csv(result.folder / "summary.csv")
    shown = summary[summary["metric"] == ("top1" if evaluated else "AP50")]
    for label, task in expected.items():
        rows = shown[shown["task"] == task]
        assert list(rows["method"]) == list(experiment.methods)
        assert [text.get_text() for text in panels[label].texts] == [
            f"{mean:.1f}" + (f" ± {std:.1f}" if pd.notna(std) else "")
            for mean, std in zip(rows["mean"], rows["std"], strict=True)
        ]
    text = (result.folder / "summary.md").read_text()
    assert all(f"| {method} |" in text for method in experiment.methods)
