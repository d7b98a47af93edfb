"""Numbers are collected in the order of the experiment, each with its seed and fine-tuning."""

from pathlib import Path
from typing import Any

import pytest

from mochi.config import Experiment
from mochi.layout import Paths
from mochi.report.collect import collect
from tests.detection.sets import small_set
from tests.report.made_up import CLASS, make_up
from tests.tiny import MOCHI


@pytest.fixture
def experiment(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """The tiny experiment with one detection set for a single row and one for all rows."""
    monkeypatch.chdir(tmp_path)
    few = small_set(Path("few/VOC")).model_copy(update={"methods": ["random-init"]})
    sets = {"few": few, "many": small_set(Path("many/VOC"))}
    return tiny.model_copy(update={"evaluation": tiny.evaluation.model_copy(update={"detection": sets})})


def numbers(method: str, seed: int, task: str) -> dict[str, Any]:
    if task == "linear":
        return {"top1": 1.0, "top5": 2.0, "best_lr_top1": 3.0, "lr": 0.1, "num_val": 64}
    if task == "knn":
        return {"top1": 4.0, "k": 5}
    singles = {str(k): {"AP": 20.0, "AP50": 40.0 + k + seed, "AP75": 9.0, "coco_AP": 1.0} for k in (0, 1)}
    return {"AP50": 99.0, "AP50_std": 99.0, "fine_tunings": singles}


def test_exactly_the_numbers_of_the_tables_are_collected(experiment: Experiment) -> None:
    make_up(experiment, numbers, with_records=False)
    table = collect(experiment).scores
    own = table[(table["method"] == MOCHI) & (table["seed"] == 1)]
    found = [tuple(row) for row in own.drop(columns=["method", "seed"]).to_numpy().tolist()]
    assert found == [
        ("linear", "top1", "", 1.0), ("linear", "top5", "", 2.0), ("linear", "best_lr_top1", "", 3.0),
        ("knn", "top1", "", 4.0),
        ("detection-many", "AP50", "0", 41.0), ("detection-many", "AP", "0", 20.0),
        ("detection-many", "AP75", "0", 9.0),
        ("detection-many", "AP50", "1", 42.0), ("detection-many", "AP", "1", 20.0),
        ("detection-many", "AP75", "1", 9.0),
    ]  # fmt: skip
    assert list(dict.fromkeys(table["task"])) == ["linear", "knn", "detection-few", "detection-many"]
    assert set(table[table["task"] == "detection-few"]["method"]) == {"random-init"}


def test_curves_are_stacked_and_untrained_rows_have_none(experiment: Experiment) -> None:
    make_up(experiment, numbers, with_records=False)
    table = collect(experiment).curves
    assert table[["method", "seed", "epoch"]].to_numpy().tolist() == [
        [MOCHI, 0, 0], [MOCHI, 0, 1], [MOCHI, 1, 0], [MOCHI, 1, 1]
    ]  # fmt: skip
    for run in ((MOCHI, 0), (MOCHI, 1)):
        (Paths("tiny").pretrain(*run) / "metrics.csv").write_text("epoch\n")
    empty = collect(experiment).curves
    assert empty.empty
    assert list(empty.columns) == ["method", "seed", "epoch"]


def test_class_names_stay_text(experiment: Experiment) -> None:
    make_up(experiment, numbers, with_records=False)
    table = collect(experiment).confusion
    assert set(table["class"]) == {CLASS, "NA"}
    assert table.groupby(["method", "seed", "task"])["images"].sum().unique().tolist() == [8]
    for path in Path().rglob("confusion.csv"):
        path.write_text("class,predicted,images\n01,02,3\n")
    numbered = collect(experiment).confusion
    assert numbered[["class", "predicted"]].drop_duplicates().to_numpy().tolist() == [["01", "02"]]
