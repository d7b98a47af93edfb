"""Corrupt and swapped images of a detection set are reported together, before the first step."""

import dataclasses
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mochi import encoders
from mochi.config import Experiment
from mochi.data.ingest import decode
from mochi.detection import coco, stage
from mochi.detection.annotations import AnnotationError, Annotations
from mochi.detection.check_images import check_images
from mochi.detection.sets import read_splits
from mochi.encoders.files import save_encoder
from tests.detection.sets import detection, small_set


@pytest.fixture
def root(voc_set: Path, tmp_path: Path) -> Path:
    """A copy of the set, to be corrupted."""
    return Path(shutil.copytree(voc_set, tmp_path / "sets" / "scenes"))


def splits(root: Path) -> tuple[Annotations, Annotations]:
    return read_splits(small_set(root).data, masks=False)


def test_the_stage_refuses_a_truncated_image_before_the_first_step(
    tiny: Experiment, root: Path, tmp_path: Path
) -> None:
    """detectron2#143: a training failed after hours because of one truncated file."""
    path = splits(root)[0].images[-1].path
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    encoder = tmp_path / "encoder.safetensors"
    save_encoder(encoder, encoders.build(tiny.encoder))
    run, result = detection(tiny, small_set(root), encoder, tmp_path / "out")
    message = rf"1 of \d+ images cannot be used:\n  .*{path.name} \(\d+ bytes\): JPEG does not decode"
    with pytest.raises(AnnotationError, match=message):
        stage.run(run, result, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_sizes_that_differ_and_missing_files_are_reported_too(root: Path) -> None:
    first, second = (image.path for image in splits(root)[1].images[:2])
    annotated = splits(root)
    Image.new("RGB", (7, 9)).save(first)
    second.unlink()
    with pytest.raises(AnnotationError) as error:
        check_images(annotated, jobs=1)
    assert f"{first}: the image is 7 x 9 pixels upright, its annotation says" in str(error.value)
    assert f"{second}: found no regular file; it is image {second.stem!r} of its set" in str(error.value)


def test_a_pipe_in_place_of_an_image_is_named_not_waited_for(root: Path) -> None:
    annotated = splits(root)
    path = annotated[0].images[0].path
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(AnnotationError, match=rf"{path.name}: found no regular file"):
        check_images(annotated, jobs=1)


def test_an_image_of_both_splits_must_have_the_size_in_both_annotations(root: Path) -> None:
    image = splits(root)[0].images[0]
    turned = dataclasses.replace(image, height=image.width, width=image.height)
    for images in ((image, turned), (turned, image)):
        with pytest.raises(AnnotationError, match=r"1 of 2 images .*\n.*its annotation says 40 x 48"):
            check_images([Annotations(("square", "bar"), (each,)) for each in images], jobs=1)


@pytest.mark.parametrize("tag", [0, 1, 6, 8, 9, 77])
def test_the_check_and_the_reader_agree_on_orientation(root: Path, tag: int) -> None:
    """An invalid tag, such as 9, once rotated the image of the reader but not the stored one."""
    path = splits(root)[0].images[0].path
    annotation = root / "Annotations" / f"{path.stem}.xml"
    annotation.write_text(annotation.read_text().replace("<width>48<", "<width>0<"))  # width 0: unknown
    exif = Image.Exif()
    exif[0x0112] = tag
    with Image.open(path) as image:
        image.save(path, exif=exif)
    check_images(splits(root), jobs=1)


def test_ranks_share_the_images(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotated = splits(root)
    total = sum(len(split.images) for split in annotated)
    checked: list[int] = []
    real = decode.check
    monkeypatch.setattr(decode, "check", lambda data, _: checked.append(len(data)) or real(data))
    monkeypatch.setattr("mochi.runtime.distributed.world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr("mochi.runtime.distributed.rank", lambda rank=rank: rank)
        check_images(annotated, jobs=1)
    assert len(checked) == total


def test_an_image_of_train_that_is_in_test_under_another_name_is_logged(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, test = splits(root)
    check_images([train, test], jobs=1)
    assert "same content" not in caplog.text
    shutil.copy(train.images[0].path, test.images[0].path)
    check_images([train, test], jobs=1)
    assert (
        f"1 images have the same content as one of another split, such as {train.images[0].path}"
        in caplog.text
    )


def test_boxes_as_shares_of_the_image_are_refused(root: Path) -> None:
    train, test = splits(root)
    images = tuple(dataclasses.replace(each, boxes=each.boxes / 100) for each in test.images)
    with pytest.raises(AnnotationError, match="found no box larger than a pixel"):
        check_images([train, dataclasses.replace(test, images=images)], jobs=1)
    check_images([train, dataclasses.replace(test, images=(images[0], *test.images[1:]))], jobs=1)


def test_coco_boxes_that_are_corners_are_pointed_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """[x0, y0, x1, y1] read as [x, y, width, height] is clipped at the border: the only sign of it."""
    _, test = splits(root)

    def as_coco(*ends: float) -> Annotations:
        box = np.array([(20, 18, *ends)], np.float32).clip(0, (48, 40, 48, 40))
        images = [
            dataclasses.replace(each, boxes=box, areas=box[:, 0]) if len(each.boxes) else each
            for each in test.images
        ]
        return dataclasses.replace(test, images=tuple(images))

    check_images([test, as_coco(44, 38)], jobs=1)
    assert "lower border" not in caplog.text
    check_images([as_coco(20 + 44, 18 + 38)], jobs=1)
    assert "4 of the 4 boxes of its set reach the right or lower border" in caplog.text


def test_a_missing_file_whose_name_differs_in_case_is_named(root: Path) -> None:
    train, test = splits(root)
    path = test.images[0].path
    path.rename(path.with_suffix(".JPG"))
    with pytest.raises(AnnotationError, match=f"found '{path.stem}.JPG', which differs in case"):
        check_images([train, test], jobs=1)


@pytest.mark.parametrize(
    "polygon",
    [[0.2, 0.1, 0.6, 0.1, 0.6, 0.5], [40, 30, 47, 30, 47, 38], [5, 4, 20, 4, 30, 4]],
    ids=["shares", "elsewhere", "a line"],
)
def test_masks_that_are_not_in_their_boxes_are_named(
    root: Path, caplog: pytest.LogCaptureFixture, polygon: list[float]
) -> None:
    """Training once used masks without a pixel, or far from their boxes, without a warning."""
    _, test = splits(root)
    right = [8, 4, 30, 4, 30, 25, 8, 25]

    def with_masks(*polygons: list[float]) -> Annotations:
        images = [each for each in test.images if len(each.boxes)][: len(polygons)]
        masks = [(coco.run_lengths([each], 40, 48),) for each in polygons]
        pairs = zip(images, masks, strict=True)
        return dataclasses.replace(
            test, images=tuple(dataclasses.replace(each, masks=own) for each, own in pairs)
        )

    check_images([with_masks(right, right)], jobs=1)
    assert "in its box" not in caplog.text
    check_images([with_masks(right, polygon)], jobs=1)
    assert "mask 1 of 1: found no pixel of it in its box, as for 1 of the 2 masks" in caplog.text
    with pytest.raises(AnnotationError, match=r"as for 2 of the 2 masks of its set; expected pixels"):
        check_images([with_masks(polygon, polygon)], jobs=1)


@pytest.mark.parametrize(
    ("tag", "size", "stated", "named"),
    [(1, 48, True, False), (3, 48, True, True), (2, 48, True, True), (6, 40, True, True),
     (6, 40, False, True), (6, 48, False, True), (9, 48, True, False)],
)  # fmt: skip
def test_turned_images_whose_size_does_not_show_it_are_pointed_out(
    root: Path, caplog: pytest.LogCaptureFixture, tag: int, size: int, stated: bool, named: bool
) -> None:
    """Upside down, mirrored, square, or without a size in the file: boxes may be of the stored picture."""
    xml = root / "Annotations" / "b1.xml"
    text = xml.read_text().replace("<width>48", f"<width>{size}")
    xml.write_text(text if stated else re.sub("<size>.*</size>", "", text))
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.new("RGB", (size, 40), "red").save(root / "JPEGImages" / "b1.jpg", exif=exif)
    check_images(splits(root), jobs=1)
    assert ("1 images are turned or mirrored by EXIF, which" in caplog.text) == named


def test_image_sets_that_overlap_are_pointed_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, test = splits(root)
    check_images([train, test], jobs=1)
    assert "several image sets" not in caplog.text
    twice = dataclasses.replace(train, images=(*train.images, *train.images[:2]))
    check_images([twice, test], jobs=1)
    assert "2 images are in several image sets of one split" in caplog.text
