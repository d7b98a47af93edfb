"""Means, standard deviations and published values against numbers worked out by hand."""

from pathlib import Path

import pandas as pd
import pytest

from mochi.config import Experiment, load_experiment
from mochi.provenance.wanted import reported
from mochi.report import stage
from tests.report.made_up import published_in
from tests.tiny import MOCHI

ROOT = Path(__file__).parents[2]


def test_summary(tiny: Experiment, results: Path) -> None:
    stage.run(tiny, reported(tiny), published_in(results))
    folder = results / "results/tiny"
    table = pd.read_csv(folder / "summary.csv").set_index(["method", "task", "metric"])
    row = table.loc[(MOCHI, "linear", "top1")]
    assert (row["mean"], row["n"], row["published"], row["published_std"]) == (51.5, 2, 79.0, 0.4)
    assert row["std"] == pytest.approx(4.5**0.5, abs=1e-4)  # sample standard deviation of 50 and 53
    assert row["source"] == "table 1"
    single = table.loc[("random-init", "linear", "top1")]
    assert single["n"] == 1
    assert pd.isna(single["std"])
    assert pd.isna(single["published"]), "another experiment's number is no number of this one"
    text = (folder / "summary.md").read_text()
    assert text.startswith(f"# {tiny.title}\n")
    assert "| method | linear top-1 | knn top-1 | seeds |" in text
    assert f"| {MOCHI} | 51.5 ± 2.1 (79.0) | 51.5 ± 2.1 | 2 |" in text
    assert "| random-init | 10.0 | 10.0 | 1 |" in text


def test_every_published_number_belongs_to_a_row_of_a_shipped_experiment() -> None:
    published = pd.read_csv(ROOT / "workflow/published.csv")
    assert published["source"].notna().all()
    for name, rows in published.groupby("experiment"):
        methods = load_experiment(ROOT / "config" / f"{name}.yaml").methods
        assert set(rows["method"]) <= set(methods)
