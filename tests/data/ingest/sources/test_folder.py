"""Folders of classes without splits, a share of them for validation, and lists of the images to use."""

from pathlib import Path

import pytest

from mochi.config.datasets import Folder
from mochi.data.ingest.raw import FileSplit
from mochi.data.ingest.sources.folder import list_images
from mochi.errors import DataError


def make(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")


def listed(root: Path, **options: object) -> dict[str, dict[str, str | None]]:
    """Split -> path -> class."""
    raw = list_images(
        Folder.model_validate({"source": "folder", "name": "x", "path": str(root), **options})
    )
    found = {}
    for name, split in raw.splits.items():
        assert isinstance(split, FileSplit)
        labels = [raw.classes[label] if label >= 0 else None for label in split.labels]
        found[name] = dict(zip(split.paths, labels, strict=True))
    return found


def test_folders_are_classes_if_the_experiment_says_so(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "a/deep/2.jpg", "b/1.jpg", "loose.jpg", "unlabeled/3.jpg")
    assert set(listed(tmp_path)["train"].values()) == {None}
    assert listed(tmp_path, class_folders=True) == {
        "train": {
            "a/1.jpg": "a", "a/deep/2.jpg": "a", "b/1.jpg": "b", "loose.jpg": None, "unlabeled/3.jpg": None,
        }
    }  # fmt: skip


def test_the_val_share_of_a_class_does_not_depend_on_other_classes(tmp_path: Path) -> None:
    make(tmp_path, *(f"a/{i}.jpg" for i in range(10)), *(f"b/{i}.jpg" for i in range(3)), "c/0.jpg")
    found = listed(tmp_path, class_folders=True, val_share=0.2)
    counts = {
        split: {name: list(rows.values()).count(name) for name in "abc"} for split, rows in found.items()
    }
    assert counts == {"train": {"a": 8, "b": 2, "c": 1}, "val": {"a": 2, "b": 1, "c": 0}}
    make(tmp_path, "d/0.jpg", "d/1.jpg")
    again = listed(tmp_path, class_folders=True, val_share=0.2)
    assert found["val"].items() <= again["val"].items()
    assert "val" not in listed(tmp_path, val_share=0.2), "nothing to validate on without labels"


def test_val_share_does_not_change_a_val_folder(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "val/a/3.jpg")
    assert listed(tmp_path, val_share=0.5)["val"] == {"val/a/3.jpg": "a"}
    make(tmp_path / "other", "train/a/1.jpg", "train/a/2.jpg")
    assert [len(rows) for rows in listed(tmp_path / "other", val_share=0.5).values()] == [1, 1]


def test_only_listed_images_are_used(tmp_path: Path) -> None:
    make(tmp_path, "images/one.jpg", "images/two words.png", "images/three.jpg", "images/four.jpg")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/train.txt").write_text("one\ntwo words\nfour -1\n")
    (tmp_path / "lists/more.txt").write_text("three.jpg\n")
    root = tmp_path / "images"
    assert set(listed(root, only_listed=["../lists/train.txt"])["train"]) == {"one.jpg", "two words.png"}
    assert len(listed(root, only_listed=["../lists/train.txt", "../lists/more.txt"])["train"]) == 3
    with pytest.raises(DataError, match=r"gone.txt: no such file; expected a list of images"):
        listed(root, only_listed=["gone.txt"])


def test_a_folder_too_many_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Archives of Kaggle unpack to archive/dataset/train."""
    make(tmp_path, "vehicles/train/1.jpg", "vehicles/bus/1.jpg")
    listed(tmp_path)
    assert "if its folders (vehicles) are classes" in caplog.text
    make(tmp_path, "x/dataset/Train/a/1.jpg", "x/dataset/test/a/2.jpg")
    assert set(listed(tmp_path)["train"].values()) == {None}
    assert f"{tmp_path / 'x/dataset'} has one: give that folder" in caplog.text


def test_a_train_folder_without_an_image_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "train/a/notes.txt", "val/a/1.jpg", "val/a/2.jpg")
    with pytest.raises(
        DataError, match=r"found 0 images in train, 2 in val; put .*not an image by its suff"
    ):
        list_images(Folder(source="folder", name="x", path=str(tmp_path)))


def test_names_with_backslashes_from_a_windows_archive_are_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "train\\a\\1.jpg", "train\\b\\1.jpg")
    listed(tmp_path)
    assert "2 names contain a backslash, such as train\\a\\1.jpg: unpack" in caplog.text
