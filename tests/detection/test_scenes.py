"""photo-scenes has exact boxes and masks, the same annotations in both formats, and no pixel in scenes
of both splits.
"""

import hashlib
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mochi.config import ConfigError, DetectionData, PhotoScenes
from mochi.data.photographs import PHOTOGRAPHS, cells, load
from mochi.detection import coco, scenes, voc
from mochi.detection.scenes import _PatchSampler, make_scene
from mochi.storage.atomic import StorageError
from tests import full_disk

CLASSES = ["astronaut", "brick", "chelsea", "coffee"]


def data(**changes: object) -> DetectionData:
    values = {
        "format": "voc", "path": "unused", "train": ["VOC/train"], "test": ["VOC/test"],
        "classes": CLASSES, "interpolation": "11-point", "broken_objects": "fail", "empty_images": "keep",
        "scenes": PhotoScenes(image_size=64, num_train=30, num_test=12, seed=0), **changes,
    }  # fmt: skip
    return DetectionData.model_validate(values)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "photo-scenes"
    scenes.run(data(), root)
    return root


@pytest.mark.parametrize(("split", "number"), [("train", 30), ("test", 12)])
def test_voc_and_coco_annotations_are_the_same(generated: Path, split: str, number: int) -> None:
    in_voc = voc.read(generated / "VOC", split, CLASSES, "fail")
    in_coco = coco.read(generated, split, "fail", masks=True)
    assert len(in_voc.images) == len(in_coco.images) == number
    for one, other in zip(in_voc.images, in_coco.images, strict=True):
        assert one.path.suffix == ".jpg"
        assert other.path.suffix == ".png"
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.labels, other.labels)
        assert (one.ignored >= other.ignored).all()  # a crowd is difficult in VOC
        jpeg = BytesIO()
        Image.open(other.path).save(jpeg, "JPEG", quality=95, subsampling=0)
        assert one.path.read_bytes() == jpeg.getvalue()


def test_boxes_enclose_the_masks(generated: Path) -> None:
    kinds = set()
    for image in coco.read(generated, "train", "fail", masks=True).images:
        assert image.masks is not None
        masks = coco.decode_masks(image.masks, image.height, image.width)
        assert masks.sum(axis=0).max(initial=0) <= 1  # objects do not overlap
        for mask, box, area in zip(masks, image.boxes, image.areas, strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert area == mask.sum()
        kinds |= set(image.ignored.tolist())
    assert kinds == {False, True}


def test_pasted_objects_are_the_photograph_inside_the_mask() -> None:
    """Every pixel of an object is from a cell of its class in this split; no cell is in both splits."""
    sampler = _PatchSampler(CLASSES, seed=0, split="val")
    scene = make_scene(sampler, 64, np.random.default_rng(3))
    numbers = {photo.name: number for number, photo in enumerate(PHOTOGRAPHS)}
    for label, mask, faded in zip(scene.labels, scene.masks, scene.difficult, strict=True):
        if faded:
            continue
        number = numbers[CLASSES[label - 1]]
        picture = load(PHOTOGRAPHS[number])
        allowed: set[tuple[int, ...]] = set()
        for cell in cells(*picture.shape[:2], seed=0, photo=number, split="val"):
            part = picture[cell.top : cell.top + cell.height, cell.left : cell.left + cell.width]
            allowed |= {tuple(pixel) for pixel in part.reshape(-1, 3).tolist()}
        assert {tuple(pixel) for pixel in scene.pixels[mask].tolist()} <= allowed


def test_the_parts_of_the_splits_are_disjoint() -> None:
    for number, photo in enumerate(PHOTOGRAPHS):
        height, width = load(photo).shape[:2]
        taken = np.zeros((height, width), int)
        for split in ("train", "val"):
            for cell in cells(height, width, seed=0, photo=number, split=split):
                taken[cell.top : cell.top + cell.height, cell.left : cell.left + cell.width] += 1
        assert (taken == 1).all()


def test_the_same_seed_makes_the_same_files(generated: Path, tmp_path: Path) -> None:
    scenes.run(data(), tmp_path / "photo-scenes")
    for name in (
        "annotations/instances_test.json",
        "test/test_00003.png",
        "VOC/Annotations/train_00007.xml",
        "VOC/JPEGImages/train_00007.jpg",
        "scenes.json",
    ):
        assert (tmp_path / "photo-scenes" / name).read_bytes() == (generated / name).read_bytes(), name
    scenes.run(data(scenes=PhotoScenes(image_size=64, num_train=2, num_test=2, seed=1)), tmp_path / "other")
    assert (tmp_path / "other" / "train" / "train_00000.png").read_bytes() != (
        generated / "train" / "train_00000.png"
    ).read_bytes()


SCENES = {
    ("train", 64, 300): "04910115af828652",
    ("val", 64, 300): "c7bb2e05b951669d",
    ("train", 256, 40): "da5e247e3acc14f3",
}
FILES = {
    "annotations/instances_train.json": "397b4e59ca0ecb83",
    "annotations/instances_test.json": "0770ff4821e5aa94",
    "scenes.json": "9550074bbdeaf331",
    "VOC": "4d738af68980ceeb",
}
"""Recorded, so that no scene changes unnoticed. If a change is intended, replace them and give the reason
in the commit message.
"""


@pytest.mark.parametrize(("split", "size", "number"), SCENES)
def test_the_scenes_equal_the_recorded_ones(split: str, size: int, number: int) -> None:
    """Enough that a share or a limit cannot change without changing one of them; at 256 px, pieces and
    backgrounds are enlarged.
    """
    sampler, digest = _PatchSampler(CLASSES, seed=0, split=split), hashlib.sha256()
    for index in range(number):
        scene = make_scene(sampler, size, np.random.default_rng(index))
        digest.update(scene.pixels.tobytes())
        digest.update(np.array(scene.masks, np.uint8).tobytes())
        values = (scene.labels, scene.segmentations, scene.difficult, scene.crowd, scene.truncated)
        digest.update(json.dumps(values).encode())
    assert digest.hexdigest()[:16] == SCENES[split, size, number]


@pytest.mark.parametrize("name", FILES)
def test_the_files_equal_the_recorded_ones(generated: Path, name: str) -> None:
    """All but the images, which are compared with each other above."""
    files = sorted((generated / name).rglob("*.*")) if name == "VOC" else [generated / name]
    written = [path.read_bytes() for path in files if path.suffix != ".jpg"]
    assert hashlib.sha256(b"".join(written)).hexdigest()[:16] == FILES[name]


def test_old_scenes_are_replaced_completely(tmp_path: Path) -> None:
    root = tmp_path / "photo-scenes"
    few = PhotoScenes(image_size=64, num_train=2, num_test=1, seed=0)
    scenes.run(data(scenes=PhotoScenes(image_size=64, num_train=3, num_test=1, seed=0)), root)
    scenes.run(data(scenes=few), root)
    assert len(list((root / "train").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["photo-scenes"]


def test_the_estimated_disk_space_covers_the_scenes(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = full_disk.required_space(scenes, monkeypatch)
    scenes.run(data(scenes=PhotoScenes(image_size=64, num_train=30, num_test=12, seed=0)), tmp_path / "x")
    written = sum(path.stat().st_size for path in generated.rglob("*") if path.is_file())
    assert written < wanted[tmp_path / "x"] < 2 * written


def test_a_full_disk_keeps_the_previous_scenes(tmp_path: Path) -> None:
    root = tmp_path / "photo-scenes"
    scenes.run(data(scenes=PhotoScenes(image_size=64, num_train=2, num_test=1, seed=0)), root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for size in (0, 2000, 5000):  # of a picture, of the annotations
        with (
            full_disk.files_of_at_most(size),
            pytest.raises(
                StorageError, match=r"photo-scenes: cannot be written: File too large; .* intact"
            ),
        ):
            scenes.run(data(), root)
        assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["photo-scenes"]


def test_scenes_without_scenes_json_are_replaced(tmp_path: Path) -> None:
    """Snakemake deletes the outputs of a rule before it runs again: only scenes.json is gone."""
    root = tmp_path / "photo-scenes"
    few = data(scenes=PhotoScenes(image_size=64, num_train=2, num_test=1, seed=0))
    scenes.run(few, root)
    (root / "scenes.json").unlink()
    scenes.run(few, root)
    assert (root / "scenes.json").exists()


@pytest.mark.parametrize(
    "file",
    [
        "VOC2007/JPEGImages/000005.jpg",
        "VOC/Annotations/000005.xml",
        "train/000000000009.jpg",
        "scenes.json/x",
    ],
)
@pytest.mark.parametrize("made_before", [False, True])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, file: str, *, made_before: bool) -> None:
    """A `scenes` section that is added to a user's own set must not delete the set."""
    root = tmp_path / "VOCdevkit"
    few = data(scenes=PhotoScenes(image_size=64, num_train=2, num_test=1, seed=0))
    if made_before:
        scenes.run(few, root)
        (root / "scenes.json").unlink()
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text("user data")
    with pytest.raises(
        ConfigError, match=rf"VOCdevkit: found \S*{file}, .* `data\.path` a separate folder"
    ):
        scenes.run(few, root)
    assert (root / file).read_text() == "user data"


def test_a_link_or_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "file").write_text("user data")
    for name in ("link", "file"):
        with pytest.raises(ConfigError, match=f"found .*{name}, which is not part of"):
            scenes.run(data(), tmp_path / name)
    (tmp_path / "elsewhere").rmdir()
    assert (tmp_path / "file").read_text() == "user data"


def test_classes_without_a_photograph_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found \['zebra'\].*astronaut"):
        scenes.run(data(classes=["brick", "zebra"]), tmp_path / "x")
    with pytest.raises(ConfigError, match="no `scenes` section"):
        scenes.run(data(scenes=None), tmp_path / "x")
