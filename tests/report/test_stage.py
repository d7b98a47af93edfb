"""The report depends on the results only, and is current until one of them changes."""

import html
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from mochi.config import Experiment
from mochi.layout import Paths
from mochi.provenance.wanted import RECORD, Result, reported
from mochi.report import stage
from tests.report.conftest import Report
from tests.report.made_up import redirected
from tests.tiny import MOCHI


def test_all_files_are_written(tiny: Experiment, report: Report) -> None:
    result = reported(tiny)
    assert report.table == Path("results/tiny/summary.md")
    assert files_of_report(result) == {*result.outputs, RECORD}
    assert {"report.html", "summary.tex", "figures/accuracy.png", "figures/loss.svg"} < {*result.outputs}
    assert (result.folder / "figures/accuracy.png").read_bytes().startswith(b"\x89PNG")

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


def test_records_json_has_every_encoder_and_evaluation(report: Report) -> None:
    paths = Paths("tiny")
    runs = [("random-init", 0), (MOCHI, 0), (MOCHI, 1)]
    folders = [paths.pretrain(*run) for run in runs]
    folders += [paths.evaluation(*run, task) for task in ("linear", "knn", "analysis") for run in runs]
    expected = {str(folder): json.loads((folder / RECORD).read_text()) for folder in folders}
    assert json.loads((paths.results / "records.json").read_text()) == expected


def test_a_report_is_current_until_a_result_changes(tiny: Experiment, reported_results: Path) -> None:
    assert reported(tiny).why_stale() is None
    metrics = Paths("tiny").evaluation(MOCHI, 1, "knn") / "metrics.json"
    metrics.write_text('{"top1": 99.0}')
    assert reported(tiny).why_stale() == f"input: {metrics} changed"


def test_the_same_results_give_the_same_bytes(tiny: Experiment, report: Report, results: Path) -> None:
    """In another folder too."""
    again = reported(tiny)
    stage.run(tiny, again)
    for name in again.outputs:
        once = report.folder / again.folder / name
        assert once.read_bytes() == (again.folder / name).read_bytes(), name


@pytest.mark.parametrize(
    ("missing", "counted"),
    [
        ([Paths("tiny").evaluation(MOCHI, 1, "knn") / "metrics.json"], "Missing: 1 file<"),
        (
            [
                Paths("tiny").evaluation(MOCHI, 0, "knn") / "confusion.csv",
                Paths("tiny").evaluation(MOCHI, 1, "linear") / RECORD,
                Paths("tiny").evaluation(MOCHI, 1, "analysis") / "analysis.json",
                Paths("tiny").pretrain(MOCHI, 1) / "metrics.csv",
                Paths("tiny").pretrain("random-init", 0) / "matching.csv",
                Paths("tiny").pretrain(MOCHI, 0) / RECORD,
            ],
            "Missing: 6 files<",
        ),
    ],
    ids=["one", "one of every other kind"],
)
def test_missing_results_are_named_and_left_out(
    missing: list[Path], counted: str, tiny: Experiment, results: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in missing:
        path.unlink()
    result = redirected(reported(tiny), Path("report"))
    stage.run(tiny, result)
    page = Path("report/report.html").read_text()
    assert counted in page
    for path in missing:
        expected = f"{path}: not found; run `snakemake {path} --configfile FILE` first"
        assert f"missing: {expected}" in caplog.text
        assert html.escape(expected, quote=False) in html.unescape(page)
    assert not result.record.exists(), "so that it is written again"


def test_without_results_there_is_a_report(tiny: Experiment, results: Path) -> None:
    shutil.rmtree("results")
    stage.run(tiny, reported(tiny))
    page = Path("results/tiny/report.html").read_text()
    assert "No evaluation has a result." in page
    assert "Nothing has been computed." in page
    assert not list(Path("results/tiny/figures").glob("*.svg"))


@pytest.mark.parametrize(
    ("task", "file", "content", "reason"),
    [
        ("knn", "metrics.json", '{"top1": 5', "is not valid JSON: .*delimiter"),
        ("knn", "metrics.json", "[1]", "found a list of 1; expected an object"),
        ("knn", "metrics.json", '{"top1": NaN}', "top1: found .*nan.*; expected a number"),
        ("knn", "metrics.json", '{"top1": "many"}', "top1: found 'many'; expected a number"),
        ("knn", "metrics.json", '{"fine_tunings": [1]}', "fine_tunings: found a list of 1"),
        ("knn", "metrics.json", "[" * 100_000, "nested too deeply"),
        ("linear", "confusion.csv", "class,predicted,images\nant,bee,x\n", "column images: found 'x'"),
    ],
)
def test_a_damaged_result_is_named(
    tiny: Experiment,
    results: Path,
    caplog: pytest.LogCaptureFixture,
    task: str,
    file: str,
    content: str,
    reason: str,
) -> None:
    path = Paths("tiny").evaluation(MOCHI, 0, task) / file
    path.write_text(content)
    stage.run(tiny, reported(tiny))
    assert re.search(f"missing: {path}: .*{reason}.*; compute it again", caplog.text)
    assert str(path) in Path("results/tiny/report.html").read_text()


def files_of_report(result: Result) -> set[str]:
    """The files of the report in its folder, without those of the runs."""
    files = [*result.folder.glob("*"), *(result.folder / "figures").glob("*")]
    return {path.relative_to(result.folder).as_posix() for path in files if path.is_file()}
