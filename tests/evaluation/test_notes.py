"""Warnings are written for scores that carry little information."""

from pathlib import Path

import numpy as np
import pytest

from mochi.config import Experiment
from mochi.config.datasets import Folder
from mochi.data.ingest.prepare import prepare
from mochi.evaluation.notes import notes
from tests.evaluation.runs import evaluate, write_images

CLASSES = ["ant", "bee", "cat", "dog"]


def notes_of(top1: float | None, train: list[int], val: list[int]) -> list[str]:
    metrics = {} if top1 is None else {"top1": top1}
    return notes(metrics, np.array(train), np.array(val), CLASSES)


def test_an_ordinary_score_has_no_note() -> None:
    assert notes_of(50.1, [0, 1, 2, 3], [0, 1, 2, 3]) == []


@pytest.mark.parametrize("top1", [60.0, 59.0])
def test_a_score_at_or_below_chance_has_a_note(top1: float) -> None:
    (note,) = notes_of(top1, [0, 1, 2, 3], [0, 0, 0, 1, 2] * 2 + [3, 0, 0, 0, 3])
    assert note.startswith(
        f"top-1 of {top1:.1f}% is at or below chance: the largest class has 60.0% of val"
    )
    assert notes_of(60.1, [0, 1, 2, 3], [0, 0, 0, 1, 3, 2, 0, 0, 0, 1]) == []
    assert notes_of(None, [0, 1, 2, 3], [0, 1, 2, 3]) == [], "a task without top-1"


def test_a_single_class_in_train_has_a_note() -> None:
    found = notes_of(100.0, [2, 2], [2])
    assert found == [
        "train has a single class, cat: every image is classified as cat, so the score is meaningless"
    ]


def test_a_single_class_in_val_has_a_note_and_no_chance_level() -> None:
    """A score of 100% was at chance, so that the encoder might be untrained."""
    single, _ = notes_of(100.0, [0, 1, 2], [2, 2])
    assert single == "val has a single class, cat: the score is that of cat alone"


def test_classes_without_images_have_notes() -> None:
    missing, unscored = notes_of(60.0, [0, 3], [0, 1, 2, 1, 0])
    assert missing == (
        "2 of 4 classes (bee, cat) without a labelled image in train: 3 of 5 images of val cannot be "
        "classified correctly"
    )
    assert unscored == "1 of 4 classes (dog) without a labelled image in val: not part of the score"


@pytest.mark.parametrize("task", ["linear", "knn"])
def test_notes_are_in_the_metrics_and_in_the_log(
    task: str, tiny: Experiment, encoder_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path / "images", {"train/a": 4, "val/a": 2, "val/b": 2})
    prepare(Folder(source="folder", name="x", path=str(tmp_path / "images")), tmp_path / "data", jobs=1)
    metrics = evaluate(tiny, task, encoder_file, tmp_path / "data", tmp_path / "out")
    assert metrics["top1"] == 50.0
    single, missing = metrics["notes"]
    assert single.startswith("train has a single class, a")
    assert missing.startswith("1 of 2 classes (b) without a labelled image in train: 2 of 4 images")
    for note in metrics["notes"]:
        assert f"random-init seed 0 {task}: {note}" in caplog.text
