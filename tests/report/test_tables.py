"""Means, spreads and published values against numbers worked out by hand."""

from pathlib import Path

import pandas as pd
import pytest

from mochi.config import Experiment
from mochi.report import tables
from mochi.report.collect import MissingResultError

MOCHI = "mochi-16-24-8"


def test_summary(tiny: Experiment, results: Path) -> None:
    tables.run(tiny, results / "results", results / "published.csv", results / "tables")
    table = pd.read_csv(results / "tables/summary.csv").set_index(["method", "task", "metric"])
    row = table.loc[(MOCHI, "linear", "top1")]
    assert (row["mean"], row["n"], row["published"], row["published_std"]) == (51.5, 2, 79.0, 0.4)
    assert row["std"] == pytest.approx(4.5**0.5, abs=1e-4)  # sample standard deviation of 50 and 53
    assert row["source"] == "table 1"
    single = table.loc[("random-init", "linear", "top1")]
    assert single["n"] == 1
    assert pd.isna(single["std"])
    assert pd.isna(single["published"]), "another experiment's number is no number of this one"
    text = (results / "tables/summary.md").read_text()
    assert "| method | linear top-1 | knn top-1 | seeds |" in text
    assert f"| {MOCHI} | 51.5 ± 2.1 (79.0) | 51.5 ± 2.1 | 2 |" in text
    assert "| random-init | 10.0 | 10.0 | 1 |" in text


def test_a_missing_result_is_named(tiny: Experiment, results: Path) -> None:
    missing = results / "results/tiny" / MOCHI / "seed1/knn/metrics.json"
    missing.unlink()
    with pytest.raises(
        MissingResultError, match=r"seed1/knn/metrics\.json: no such result; run `snakemake"
    ):
        tables.run(tiny, results / "results", results / "published.csv", results / "tables")


def test_the_same_results_give_the_same_bytes(tiny: Experiment, results: Path) -> None:
    for name in ("once", "again"):
        tables.run(tiny, results / "results", results / "published.csv", results / name)
    for file in ("summary.csv", "summary.md"):
        assert (results / "once" / file).read_bytes() == (results / "again" / file).read_bytes()


def test_every_published_number_belongs_to_a_row_of_a_shipped_experiment() -> None:
    from mochi.config import load_experiment

    root = Path(__file__).parents[2]
    published = pd.read_csv(root / "workflow/published.csv")
    assert published["source"].notna().all()
    for name, rows in published.groupby("experiment"):
        methods = load_experiment(root / "config" / f"{name}.yaml").methods
        assert set(rows["method"]) <= set(methods)
