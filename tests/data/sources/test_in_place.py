"""Detection sets in place: checked and listed, not copied; tiny trees, and real ones where they are."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mochi.config import Coco, Voc
from mochi.data.prepare import prepare
from mochi.data.shards import DataError, open_dataset


def make_voc(root: Path, picture: Callable[..., Image.Image], sets: dict[str, list[str]]) -> None:
    for folder in ("JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, images in sets.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{image}\n" for image in images))
        for image in images:
            picture(int(image)).save(root / "JPEGImages" / f"{image}.jpg")


def test_voc_lists_its_sets(tmp_path: Path, picture: Callable[..., Image.Image]) -> None:
    make_voc(
        tmp_path / "kit" / "VOC2007",
        picture,
        {"trainval": ["1", "2"], "train": ["1"], "val": ["2"], "test": ["3"]},
    )
    options = Voc(source="voc", name="voc", path=str(tmp_path / "kit"), years=["VOC2007"])
    out = tmp_path / "data" / "voc"
    manifest = prepare(options, out, jobs=1)
    assert {name: entry["count"] for name, entry in manifest["splits"].items()} == {
        "VOC2007-trainval": 2, "VOC2007-test": 1,
    }  # fmt: skip
    assert all(entry["storage"] == "in-place" for entry in manifest["splits"].values())
    assert open_dataset(out).split("VOC2007-test").path(0) == "VOC2007/JPEGImages/3.jpg"
    assert not list(out.glob("*images*"))
    both = options.model_copy(update={"years": ["VOC2007", "VOC2012"]})
    with pytest.raises(DataError, match=r"VOC2012: no ImageSets/Main"):
        prepare(both, out, jobs=1)


def test_a_broken_image_of_voc_stops_the_preparation(
    tmp_path: Path, picture: Callable[..., Image.Image]
) -> None:
    """Hours of training once ended at one truncated file."""
    root = tmp_path / "kit" / "VOC2007"
    make_voc(root, picture, {"trainval": ["1", "2"]})
    image = root / "JPEGImages" / "2.jpg"
    image.write_bytes(image.read_bytes()[:-300])
    (root / "JPEGImages" / "1.jpg").unlink()
    with pytest.raises(
        DataError, match=r"2 of 2 files are unreadable.*1.jpg \(-1 bytes\): cannot be read: No such"
    ):
        prepare(
            Voc(source="voc", name="v", path=str(root.parent), years=["VOC2007"]), tmp_path / "o", jobs=1
        )
    assert "2.jpg" in (tmp_path / "o" / "quarantine.csv").read_text()


def test_coco_follows_its_annotation_files(tmp_path: Path, picture: Callable[..., Image.Image]) -> None:
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    picture(1).save(root / "val2017" / "7.jpg")
    annotations = root / "annotations" / "instances_val2017.json"
    annotations.write_text(json.dumps({"images": [{"file_name": "7.jpg", "id": 7}]}))
    options = Coco(source="coco", name="coco", path=str(root), splits=["val2017"])
    prepare(options, tmp_path / "data" / "coco", jobs=1)
    split = open_dataset(tmp_path / "data" / "coco").split("val2017")
    assert (len(split), split.path(0)) == (1, "val2017/7.jpg")
    annotations.write_text("[]")
    with pytest.raises(DataError, match="is not a COCO annotation file"):
        prepare(options, tmp_path / "data" / "coco", jobs=1)
    annotations.unlink()
    with pytest.raises(DataError, match=r"instances_val2017.json: not found"):
        prepare(options, tmp_path / "data" / "coco", jobs=1)


def test_real_coco_subset(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    root = real_data("coco-tiny.tar") / "coco-tiny"
    options = Coco(source="coco", name="coco", path=str(root), splits=["train2017", "val2017"])
    manifest = prepare(options, tmp_path / "data" / "coco", jobs=1)
    assert [entry["count"] for entry in manifest["splits"].values()] == [160, 158]
    assert manifest["quarantined"] == 0
    assert manifest["duplicates"]["groups"] == 0
