"""The report is written whole, from the results alone, and is current until one of them changes."""

import json
from pathlib import Path

import pandas as pd
import pytest

from mochi.config import Experiment
from mochi.layout import Layout
from mochi.provenance.wanted import RECORD, reported
from mochi.report import stage
from mochi.report.collect import MissingResultError
from tests.report.made_up import published_in, redirected
from tests.tiny import MOCHI


def test_what_is_written(tiny: Experiment, results: Path) -> None:
    result = reported(tiny)
    assert stage.run(tiny, result) == Path("results/tiny/summary.md")
    own = {path.name for path in result.folder.iterdir() if path.is_file()}
    assert own == {*result.outputs, RECORD}
    assert {"accuracy.png", "accuracy.svg", "training.png", "negatives.svg"} < own
    assert (result.folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    scores = pd.read_csv(result.folder / "scores.csv", keep_default_na=False)
    rows = [tuple(row) for row in scores.to_numpy().tolist()]
    assert rows == [
        (method, seed, task, "top1", "", value)
        for task in ("linear", "knn")
        for method, seed, value in (("random-init", 0, 10.0), (MOCHI, 0, 50.0), (MOCHI, 1, 53.0))
    ]
    curves = pd.read_csv(result.folder / "curves.csv")
    assert curves[["method", "seed", "epoch", "loss"]].to_numpy().tolist() == [
        [MOCHI, 0, 0, 4.0], [MOCHI, 0, 1, 3.0], [MOCHI, 1, 0, 5.0], [MOCHI, 1, 1, 4.0]
    ]  # fmt: skip
    matching = pd.read_csv(result.folder / "matching.csv")
    assert matching.groupby(["method", "seed", "epoch"])["rank"].max().tolist() == [9] * 4
    means = {"linear": {"top1": 10.0}, "knn": {"top1": 10.0}}
    assert json.loads((result.folder / "summary.json").read_text())["random-init"] == means


def test_records_are_those_of_every_encoder_and_evaluation(tiny: Experiment, results: Path) -> None:
    stage.run(tiny, reported(tiny))
    places = Layout("tiny")
    runs = [("random-init", 0), (MOCHI, 0), (MOCHI, 1)]
    folders = [places.pretrain(*run) for run in runs]
    folders += [places.evaluation(*run, task) for task in ("linear", "knn") for run in runs]
    expected = {str(folder): json.loads((folder / RECORD).read_text()) for folder in folders}
    assert json.loads((places.results / "records.json").read_text()) == expected


def test_a_report_is_current_until_a_result_changes(tiny: Experiment, results: Path) -> None:
    stage.run(tiny, reported(tiny))
    assert reported(tiny).why_stale() is None
    metrics = Layout("tiny").evaluation(MOCHI, 1, "knn") / "metrics.json"
    metrics.write_text('{"top1": 99.0}')
    assert reported(tiny).why_stale() == f"input: {metrics} changed"


def test_the_same_results_give_the_same_bytes(tiny: Experiment, results: Path) -> None:
    once, again = (redirected(reported(tiny), results / name) for name in ("once", "again"))
    published = published_in(results)
    for result in (once, again):
        stage.run(tiny, result, published)
    for name in once.outputs:
        assert (once.folder / name).read_bytes() == (again.folder / name).read_bytes(), name


@pytest.mark.parametrize(
    "missing",
    [
        Layout("tiny").evaluation(MOCHI, 1, "knn") / "metrics.json",
        Layout("tiny").evaluation(MOCHI, 1, "knn") / RECORD,
        Layout("tiny").pretrain(MOCHI, 1) / "metrics.csv",
        Layout("tiny").pretrain("random-init", 0) / "matching.csv",
        Layout("tiny").pretrain("random-init", 0) / RECORD,
    ],
    ids=str,
)
def test_a_missing_result_is_named_and_nothing_is_written(
    missing: Path, tiny: Experiment, results: Path
) -> None:
    missing.unlink()
    with pytest.raises(MissingResultError, match=f"{missing}: not found; run `snakemake {missing}` first"):
        stage.run(tiny, redirected(reported(tiny), Path("report")))
    assert not list(Path("report").rglob("*"))


def test_a_damaged_result_is_named(tiny: Experiment, results: Path) -> None:
    metrics = Layout("tiny").evaluation(MOCHI, 1, "knn") / "metrics.json"
    metrics.write_text('{"top1": 5')
    with pytest.raises(MissingResultError, match=f"{metrics}: cannot be read: .*; compute it again"):
        stage.run(tiny, reported(tiny))
