"""The report on a folder compared with its content, and recommendations compared with the paper's
settings.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mochi.config import parse_experiment
from mochi.data.describe_folder import describe
from mochi.data.inspect import inspect, render
from mochi.data.recommend import Facts, advise
from mochi.errors import DataError


def test_the_report_lists_the_content(tree: Path, tmp_path: Path) -> None:
    (tree / "train" / "ant" / "zero.jpg").touch()
    (tree / "train" / ".DS_Store").touch()
    (tree / "train" / "dog").mkdir()
    shutil.copy(tree / "train" / "cat" / "1.jpg", tree / "val" / "bee" / "leak.jpg")
    Image.fromarray(np.full((9, 90), 7, np.uint16)).save(tree / "val" / "ant" / "deep.png")
    report = inspect(tree, jobs=1)
    assert report["files"] == 30
    assert report["splits"]["train"] == {
        "images": 18, "unlabelled": 0, "classes": {"ant": 6, "bee": 6, "cat": 6, "dog": 0},
    }  # fmt: skip
    assert report["formats"] == {"JPEG RGB": 28, "PNG I;16": 1}
    assert report["reencoded"] == 1
    assert report["sides"]["short_min"] == 9
    assert report["sides"]["ratio_max"] == 10
    assert report["balance"]["empty"] == ["dog"]
    assert report["ignored"] == {"hidden or system file": 1}
    assert report["unreadable"] == [
        {"path": "train/ant/zero.jpg", "bytes": 0, "reason": "empty file (0 bytes)"}
    ]
    assert {key: value for key, value in report["duplicates"].items() if key != "rows"} == {
        "groups": 1, "across_splits": 1, "with_two_labels": 1,
    }  # fmt: skip
    json.dumps(report, allow_nan=False)
    assert report["dataset"] == {}
    text = render(report)
    for part in (
        "train: 18 images, 18 labelled", "28 JPEG RGB", "1 will be re-encoded as PNG", "median 46",
        "empty classes", "zero.jpg (0 bytes): empty file", "train/cat/1.jpg [cat] = val/bee/leak.jpg [bee]",
        "18 training images are too few", "evaluation.linear.lr_candidates: [0.3, 1.0,",
        "evaluation.linear.standardize: true",
    ):  # fmt: skip
        assert part in text, text


def test_a_terminal_does_not_execute_the_names_of_files_and_classes(tree: Path) -> None:
    (tree / "train" / "an\x1b[2Jt").mkdir()
    (tree / "train" / "ant" / "a\nwarning: b\x9b.jpg").touch()
    report = inspect(tree, jobs=1)
    text = render(report)
    assert text.replace("\n", "").isprintable()
    assert r"train/ant/a\nwarning: b\x9b.jpg (0 bytes): empty file" in text
    assert r"an\x1b[2Jt" in text
    assert report["unreadable"][0]["path"] == "train/ant/a\nwarning: b\x9b.jpg", "JSON has its own escapes"


def test_classes_without_splits_are_read_as_init_reads_them(tree: Path, tmp_path: Path) -> None:
    """They were once reported as images without labels, for which no probe is recommended."""
    shutil.rmtree(tree / "train/dog", ignore_errors=True)
    report = inspect(tree / "train", jobs=1)
    assert {"path": str(tree / "train"), **report["dataset"]} == describe(tree / "train").dataset
    text = render(report)
    assert "train: 15 images, 15 labelled" in text
    assert "val: 3 images, 3 labelled" in text
    assert "dataset: {class_folders: true, val_share: 0.2}, as `mochi init` writes it" in text
    assert "\n  evaluation.knn.k: 5\n" in text


def test_unlabelled_folders_get_no_probe(tree: Path, tmp_path: Path) -> None:
    report = inspect(tree / "train" / "ant", jobs=1)
    assert report["splits"]["train"]["unlabelled"] == 6
    assert report["balance"] == {}
    text = render(report)
    assert "evaluation: {image_size: 32, resize: 37}" in text
    assert "no linear probe and no kNN without labelled images in train" in text


def test_a_folder_of_corrupt_files_is_still_reported(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for number in range(7):
        (tmp_path / "x" / f"{number}.jpg").write_text("no")
    text = render(inspect(tmp_path / "x", jobs=1))
    assert "7 unreadable files; preparation skips up to `max_unreadable`" in text
    assert "... and 2 more" in text
    with pytest.raises(DataError, match="no such folder"):
        inspect(tmp_path / "y", jobs=1)
    with pytest.raises(DataError, match=r"0\.jpg: is a file; expected a folder; give the folder of your"):
        inspect(tmp_path / "x/0.jpg", jobs=1)


@pytest.mark.parametrize(
    "facts",
    [
        Facts(6400, 100, {"a": 300, "b": 250}, has_val=True),
        Facts(6400, 40, {"a": 300, "b": 250}, has_val=False),
        Facts(1_281_167, 375, {}, has_val=False),
        Facts(5, 100, {}, has_val=True),
    ],
)
def test_an_experiment_file_accepts_what_is_recommended(facts: Facts) -> None:
    """`evaluation: None` was once recommended for images without labels, and refused."""
    experiment = yaml.safe_load((Path(__file__).parents[1] / "tiny.yaml").read_text())
    for advice in advise(facts):
        if advice.key.startswith("methods."):
            continue  # the name of a row, not a key
        *sections, key = advice.key.split(".")
        node = experiment
        for section in sections:
            node = node[section]
        node[key] = advice.value
    parse_experiment(experiment, "recommended")


def settings(num_train: int, side: int, classes: int = 10) -> dict[str, object]:
    counts = {str(label): num_train // classes for label in range(classes)}
    return {advice.key: advice.value for advice in advise(Facts(num_train, side, counts, has_val=True))}


@pytest.mark.parametrize(
    ("name", "num_train", "side", "queue", "momentum"),
    [
        ("ImageNet-1K", 1_281_167, 375, 65536, 0.999),  # MoCHi section 4
        ("ImageNet-100", 126_689, 375, 16384, 0.999),  # MoCHi section 4
        ("CIFAR-10", 50_000, 32, 8192, 0.99),  # MoCo's demo: 4096, 0.99
    ],
)
def test_recommendations_for_known_sizes_are_the_published_settings(
    name: str, num_train: int, side: int, queue: int, momentum: float
) -> None:
    advice = settings(num_train, side)
    assert advice["pretrain.queue_size"] == queue
    assert advice["pretrain.key_momentum"] == momentum
    assert advice["pretrain.batch_size"] == 256
    assert advice["pretrain.epochs"] in range(200, 400)
    assert advice["augmentation.image_size"] == (224 if side > 100 else 32)


@pytest.mark.parametrize("num_train", [64, 100, 200, 6400, 13_000])
def test_recommendations_for_small_data_sets(num_train: int) -> None:
    """Users asked what to do with 13,000 images and a queue of 65536."""
    advice = settings(num_train, 100)
    assert num_train // advice["pretrain.batch_size"] >= 8
    assert advice["pretrain.queue_size"] <= num_train / 6
    hardest = int(str(advice["methods.mochi-N-s-s'"]).split("-")[1])
    assert 2 <= hardest <= advice["pretrain.queue_size"]


@pytest.mark.parametrize("num_train", [1, 5, 63])
def test_nothing_is_recommended_for_pretraining_on_a_few_images(num_train: int) -> None:
    """A batch of 8 was once recommended for 5 images; the loader refuses that."""
    advice = settings(num_train, 100)
    assert all(key.startswith("evaluation") for key in advice)


def test_unlabelled_train_and_labelled_val_get_no_probe(tree: Path, tmp_path: Path) -> None:
    shutil.move(tree / "train", tree / "unlabeled")
    (tree / "train").mkdir()
    shutil.move(tree / "unlabeled", tree / "train")
    report = inspect(tree, jobs=1)
    assert report["splits"]["train"]["unlabelled"] == 18
    assert "evaluation.knn.k" not in {advice["key"] for advice in report["advice"]}
    render(report)
