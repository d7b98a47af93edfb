"""`mochi init`: any folder becomes an experiment that passes `mochi check`, or one line says why not."""

import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mochi.config import load_experiment, probes
from mochi.data.describe_folder import describe
from mochi.new_experiment import _anchors, _best, _Fit, _is_square, _Shape
from tests.commands import refused, run

REAL = os.environ.get("MOCHI_REAL_DATA")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOCHI_CONFIG", raising=False)


def images(folder: Path, count: int, width: int = 40, height: int = 36) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (width, height), (number % 256, count % 256, 0)).save(folder / f"{number}.png")


def new_experiment(folder: Path) -> dict[str, Any]:
    """The experiment of a folder; it must pass `mochi check`."""
    done = run("init", str(folder), "--out", "config/mine.yaml", "--force")
    assert done.returncode == 0, done.stderr
    checked = run("check", "config/mine.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    experiment = load_experiment(Path("config/mine.yaml"))
    assert probes(experiment) == ([] if "supervised" not in experiment.methods else ["linear", "knn"])
    content = yaml.safe_load(Path("config/mine.yaml").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def test_classes_with_a_val_folder(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("val", 4)):
        for label in ("cat", "dog"):
            images(tmp_path / "pets" / split / label, count)
    content = new_experiment(tmp_path / "pets")
    assert "val_share" not in content["dataset"]
    assert content["evaluation"]["knn"]["k"] == 20
    assert content["evaluation"]["linear"]["batch_size"] <= 40
    assert content["augmentation"] == {"version": "v2", "image_size": 32, "min_scale": 0.2, "blur": False}
    text = Path("config/mine.yaml").read_text()
    assert "batch_size: 8 # 5 steps per epoch" in text, "every setting has a comment with the reason"


@pytest.mark.parametrize("splits", [True, False])
def test_classes_without_a_val_folder_give_a_share_of_each(tmp_path: Path, splits: bool) -> None:
    for label in "abcdefgh":
        images(tmp_path / "few" / ("train" if splits else "") / label, 3)
    content = new_experiment(tmp_path / "few")
    assert content["dataset"].get("class_folders", False) is not splits
    assert content["dataset"]["val_share"] == 0.2
    assert content["evaluation"]["knn"]["k"] == 2, "of three images one is for validation"


def test_without_labels_or_with_one_class_there_is_no_classification(tmp_path: Path) -> None:
    images(tmp_path / "photos/2021", 20)
    images(tmp_path / "photos/2022-06", 20)
    content = new_experiment(tmp_path / "photos")
    assert set(content["evaluation"]) == {"image_size", "resize"}
    assert "supervised" not in content["methods"]
    images(tmp_path / "one/train/cat", 30)
    images(tmp_path / "one/val/cat", 2)
    assert "30 images to train on, 1 class, 2 for val" in run("init", "one", "--out", "x.yaml").stdout
    assert set(new_experiment(tmp_path / "one")["evaluation"]) == {"image_size", "resize"}


def test_the_learning_rates_of_inspect_and_init_differ_for_a_stated_reason(tmp_path: Path) -> None:
    images(tmp_path / "photos", 64)
    inspected = run("inspect", "photos").stdout
    assert "pretrain.lr: 0.0009375" in inspected
    assert "below 20,000 steps `mochi init` writes four times this" in inspected
    assert new_experiment(tmp_path / "photos")["pretrain"]["lr"] == 4 * 0.0009375


def test_unusual_folder_names(tmp_path: Path) -> None:
    root = tmp_path / 'a "b"\n<script>alert(1)<\\script> é # no: {comment}'
    for label in ("my cat", "it's", "new\nline", "#hash: x", "ключ"):
        images(root / label, 8)
    content = new_experiment(root)
    assert content["dataset"]["path"] == str(root)
    assert "\n" not in content["title"]


def test_images_on_a_read_only_disk(tmp_path: Path) -> None:
    images(tmp_path / "disk/train/a", 20)
    images(tmp_path / "disk/train/b", 20)
    before = sorted(tmp_path.joinpath("disk").rglob("*"))
    (tmp_path / "disk").chmod(0o555)
    new_experiment(tmp_path / "disk")
    assert sorted(tmp_path.joinpath("disk").rglob("*")) == before


def test_the_number_of_epochs_fits_the_given_hours(tmp_path: Path) -> None:
    images(tmp_path / "photos", 32)
    done = run("init", "photos", "--out", "config/mine.yaml", "--hours", "0.01")
    assert done.returncode == 0, done.stderr
    assert "images/s per run" in done.stdout
    content = yaml.safe_load(Path("config/mine.yaml").read_text())
    assert content["pretrain"]["epochs"] < 200
    assert run("check", "config/mine.yaml").returncode == 0
    for hours in ("0", "-1", "nan"):
        assert "expected a number above 0" in refused("init", "photos", "--out", "x.yaml", "--hours", hours)


def test_folders_that_cannot_be_an_experiment_are_refused(tmp_path: Path) -> None:
    images(tmp_path / "one", 1)
    assert "one: images to train on: 1; expected" in refused("init", "one", "--out", "mine.yaml")
    assert "no such folder" in refused("init", "nowhere", "--out", "mine.yaml")
    Path("photo.jpg").touch()
    assert "photo.jpg: is a file; expected a folder" in refused("init", "photo.jpg", "--out", "mine.yaml")
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.jpg").write_text("no image")
    assert "not an image, and neither are 19 others" in refused("init", "text", "--out", "mine.yaml")
    images(tmp_path / "photos", 20)
    assert "expected a name such as" in refused("init", "photos", "--out", "mine.txt")
    (tmp_path / "mine.yaml").write_text("kept")
    assert "already exists" in refused("init", "photos", "--out", "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == "kept"


def voc(root: Path, train: int, val: int) -> None:
    images(root / "JPEGImages", train + val, 120, 90)
    (root / "Annotations").mkdir()
    (root / "ImageSets/Main").mkdir(parents=True)
    for number in range(train + val):
        (root / "Annotations" / f"{number}.xml").write_text(
            "<annotation><size><width>120</width><height>90</height></size><object><name>thing</name><bndbox>"
            "<xmin>11</xmin><ymin>11</ymin><xmax>40</xmax><ymax>40</ymax></bndbox></object></annotation>"
        )
    for name, rows in (("train", range(train)), ("val", range(train, train + val))):
        (root / f"ImageSets/Main/{name}.txt").write_text("".join(f"{row}\n" for row in rows))


def test_boxes_in_another_layout_are_not_left_out_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "valid"):
        images(tmp_path / "roboflow" / split, 20)
        (tmp_path / f"roboflow/{split}/_annotations.coco.json").write_text("{}")
    done = run("init", "roboflow", "--out", "mine.yaml")
    assert done.returncode == 0
    assert "_annotations.coco.json: boxes are left out" in caplog.text
    images(tmp_path / "cvat/images", 20)
    (tmp_path / "cvat/annotations").mkdir()
    (tmp_path / "cvat/annotations/instances_default.json").write_text("{}")
    assert "no folder default next to annotations/" in refused("init", "cvat", "--out", "cvat.yaml")


def test_val_images_without_classes_are_reported(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        images(tmp_path / "flat/train" / label, 10)
    images(tmp_path / "flat/val", 5)
    done = run("init", "flat", "--out", "mine.yaml")
    assert "5 images of val are in no class folder" in done.stdout, done.stderr


def test_a_voc_tree_with_boxes_of_one_size_given_from_inside_or_above(tmp_path: Path) -> None:
    voc(tmp_path / "set/things", 18, 6)
    for folder in ("set", "set/things"):
        content = new_experiment(Path(folder))
        (detection,) = content["evaluation"]["detection"].values()
        assert detection["data"]["path"] == "set"
        assert detection["data"]["train"] == ["things/train"]
        assert detection["data"]["classes"] == ["thing"]
        assert detection["model"]["anchor_sizes"] == [32], "30 of 90 pixels, resized to a short side of 96"
        assert detection["model"]["anchor_ratios"] == [1.0]
    found = describe(tmp_path / "set")
    assert len(found.files) == 18, "test images are not used in pretraining"
    (tmp_path / "set/things/ImageSets/Main/val.txt").unlink()
    assert "expected one to train on and one to test on" in refused("init", "set", "--out", "x.yaml")


def test_the_cheapest_views_are_chosen_if_the_hours_are_too_short() -> None:
    """Negative numbers of epochs, of hours that do not even suffice for the evaluations, say nothing."""
    large, small = _Shape(96, "resnet10", 32), _Shape(64, "resnet10", 32)
    assert _best([_Fit(large, 2.0, 50.0, -10), _Fit(small, 1.0, 40.0, -20)]).shape == small
    assert _best([_Fit(large, 2.0, 50.0, 3), _Fit(small, 1.0, 40.0, 7)]).shape == small
    assert _best([_Fit(large, 2.0, 50.0, 4), _Fit(small, 3.0, 40.0, 2)]).shape == large
    assert _best([_Fit(large, 2.0, 50.0, 31)]).shape == large


def test_anchors_are_distinct_quantiles_of_the_boxes() -> None:
    assert _anchors(np.full(50, 33.0)) == [33]
    sizes = np.exp(np.random.default_rng(0).uniform(np.log(8), np.log(256), 20_000))
    expected = [8 * 32**quantile for quantile in (0.1, 0.37, 0.63, 0.9)]
    assert _anchors(sizes) == pytest.approx(expected, rel=0.1)
    assert _is_square(np.array([0.9, 1.0, 1.1]))
    assert not _is_square(np.array([0.5, 1.0, 2.0]))


@pytest.mark.skipif(REAL is None, reason="MOCHI_REAL_DATA is not set")
@pytest.mark.parametrize(
    ("archive", "folder", "evaluations"),
    [
        ("flowers-128.tar", "flowers", {"image_size", "resize", "linear", "knn"}),
        ("voc-raccoon.tar", "raccoon", {"image_size", "resize", "detection"}),
        ("coco-tiny.tar", "coco-tiny", {"image_size", "resize", "detection"}),
    ],
)
def test_real_folders(tmp_path: Path, archive: str, folder: str, evaluations: set[str]) -> None:
    with tarfile.open(Path(REAL or "", archive)) as content:
        content.extractall(tmp_path, filter="data")
    assert set(new_experiment(Path(folder))["evaluation"]) == evaluations
