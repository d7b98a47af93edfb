"""The committed results of the embedded experiment: pretraining helps, and it learns until the end."""

import json
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from mochi.config import Experiment, all_runs, load_experiment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results/embedded"
PRETRAINED = ("moco-v2", "mochi-64-64-16")


@pytest.fixture(scope="module")
def embedded() -> Experiment:
    return load_experiment(ROOT / "config/config.yaml")


@pytest.mark.parametrize("method", PRETRAINED)
def test_pretrained_rows_are_above_the_random_baseline(method: str) -> None:
    summary = json.loads((RESULTS / "summary.json").read_text())
    own, baseline = summary[method], summary["random-init"]
    assert own["linear"]["top1"] >= baseline["linear"]["top1"] + 10
    frozen = "detection-photo-scenes-frozen"
    assert own[frozen]["AP50"] >= baseline[frozen]["AP50"] + 5


def test_methods_are_compared_on_the_same_seeds(embedded: Experiment) -> None:
    scores = pd.read_csv(RESULTS / "scores.csv")
    seeds = {method: set(scores[scores["method"] == method]["seed"]) for method in PRETRAINED}
    assert seeds["moco-v2"] == seeds["mochi-64-64-16"]
    assert len(seeds["moco-v2"]) >= 3
    assert set(zip(scores["method"], scores["seed"], strict=True)) == set(all_runs(embedded))


@pytest.mark.parametrize("method", PRETRAINED)
def test_proxy_accuracy_rises_after_the_queue_has_filled(method: str) -> None:
    curves = pd.read_csv(RESULTS / "curves.csv")
    for _, run in curves[curves["method"] == method].groupby("seed"):
        full = run[run["queue_fill"] >= 1]["accuracy"]
        thirds = [part.mean() for part in (full[1:7], full[7:13], full[13:])]
        assert all(later > earlier for earlier, later in pairwise(thirds))
        assert thirds[-1] > 1.5 * thirds[0]
