"""The VOC reader on unusual real files, one kind in each test: what users reported, and what is right.

Boxes are compared with values worked out by hand; counts are those in the report.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mochi.detection import voc
from mochi.detection.annotations import AnnotationError, Annotations, for_training
from mochi.detection.batches import Images
from mochi.detection.sets import read_splits
from tests.detection.sets import small_set, voc_object

Writer = Callable[..., Path]
CLASSES = ["square", "bar"]


def read(root: Path, broken_objects: str = "drop") -> Annotations:
    return voc.read(root, "train", CLASSES, broken_objects)


def test_fractions_are_read(voc_image: Writer) -> None:
    root = voc_image(voc_object(box=("45.70000076293945", 6.5, 48, 22)))
    np.testing.assert_allclose(read(root).images[0].boxes, [[44.7, 5.5, 48, 22]], rtol=1e-6)


def test_a_box_over_the_whole_image_covers_it_exactly(voc_image: Writer) -> None:
    image = read(voc_image(voc_object(box=(1, 1, 48, 40)))).images[0]
    assert image.boxes.tolist() == [[0, 0, 48, 40]]
    assert (image.width, image.height) == (48, 40)


def test_a_0_based_set_is_0_based_in_all_its_files(voc_image: Writer) -> None:
    """Decided file by file, boxes of the other files were shifted by a pixel."""
    voc_image(voc_object(box=(10, 12, 20, 24)), name="first")
    root = voc_image(voc_object(box=(0, 0, 48, 40)), name="second")
    annotations = read(root)
    assert [image.boxes.tolist() for image in annotations.images] == [
        [[10, 12, 20, 24]],
        [[0, 0, 48, 40]],
    ]
    report = annotations.report()
    assert report["files counted from 0"] == 2
    assert report["numbering"] == "pixels counted from 0: 1 of 2 boxes start at 0"


@pytest.mark.parametrize("box", [(0, 5, 20, 22), (5, 0, 20, 22), (5, 0.5, 20, 22)])
def test_one_side_at_0_makes_a_set_0_based(voc_image: Writer, box: tuple[float, ...]) -> None:
    annotations = read(voc_image(voc_object(box=box)))
    assert annotations.images[0].boxes.tolist() == [list(box)]


def test_both_splits_have_the_same_base(voc_image: Writer) -> None:
    voc_image(voc_object(box=(10, 12, 20, 24)), name="first")
    root = voc_image(voc_object(box=(0, 0, 48, 40)), name="second", image_set="test")
    train, _ = read_splits(small_set(root).data, masks=False)
    assert train.images[0].boxes.tolist() == [[10, 12, 20, 24]]
    assert read(root).images[0].boxes.tolist() == [[9, 11, 20, 24]], "by itself it is 1-based"


def test_missing_tags_mean_zero_and_are_counted(voc_image: Writer) -> None:
    root = voc_image(voc_object(), voc_object(difficult=1, truncated=1, pose=0))
    annotations = read(root)
    assert annotations.images[0].ignored.tolist() == [False, True]
    assert annotations.images[0].trained.tolist() == [True, True]
    report = annotations.report()
    assert report["objects without difficult"] == report["objects without pose"] == 1


@pytest.mark.parametrize(
    ("box", "defect"),
    [
        (None, "no bndbox"),
        ((5, 6, 20), "a bndbox without four numbers"),
        ((5, 6, "nan", 22), "a bndbox without four numbers"),
        ((5, 6, "abc", 22), "a bndbox without four numbers"),
        ((20, 6, 5, 22), "a reversed box"),
        ((5, 22, 20, 6), "a reversed box"),
        ((5, 6, 5, 22), "a box without area"),
        ((9, 9, 9, 9), "a box without area"),
    ],
)
def test_broken_objects_are_dropped_and_counted_or_named(
    voc_image: Writer, box: tuple[object, ...] | None, defect: str
) -> None:
    root = voc_image(voc_object(), voc_object("bar", box))
    annotations = read(root)
    assert annotations.images[0].labels.tolist() == [1]
    assert annotations.report()[f"objects dropped: {defect}"] == 1
    with pytest.raises(AnnotationError, match=rf"one\.xml: object 2 \('bar'\): {defect}"):
        read(root, "fail")


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ((30, 30, 90, 40), [29, 29, 48, 40]),
        ((30, 30, 48, 41), [29, 29, 48, 40]),
        ((-3, 30, 48, 40), [0, 29, 48, 40]),
        ((30, -3, 48, 40), [29, 0, 48, 40]),
    ],
)
def test_boxes_beyond_the_image_are_clipped_and_counted(
    voc_image: Writer, box: tuple[float, ...], inside: list[float]
) -> None:
    whole, outside = (1, 1, 48, 40), (60, 5, 70, 20)
    annotations = read(voc_image(*(voc_object(box=each) for each in (box, whole, outside))))
    assert annotations.images[0].boxes.tolist() == [inside, [0, 0, 48, 40]]
    assert annotations.report()["boxes cut to the image"] == 1


def test_the_report_of_a_valid_set(voc_image: Writer) -> None:
    report = read(voc_image(voc_object(difficult=0, truncated=0), voc_object("bar"))).report()
    assert report == {
        "images": 1,
        "objects": 2,
        "classes": {"square": 1, "bar": 1},
        "numbering": "pixels counted from 1: 0 of 2 boxes start at 0",
        "boxes cut to the image": 0,
        "objects without difficult": 1,
        "objects without pose": 2,
        "objects without truncated": 1,
    }


def test_an_image_without_objects_has_boxes_of_shape_0_4(voc_image: Writer) -> None:
    voc_image(name="empty")
    annotations = read(voc_image(voc_object(), name="full"))
    assert annotations.images[0].boxes.shape == (0, 4)
    assert len(for_training(annotations, "keep").images) == 2
    dropped = for_training(annotations, "drop")
    assert [image.image_id for image in dropped.images] == ["full"]
    assert dropped.report()["images without a trained box"] == 1


def test_a_split_of_empty_images_is_refused_if_they_are_dropped(voc_image: Writer) -> None:
    annotations = read(voc_image())
    with pytest.raises(AnnotationError, match="images without a trained box: 1"):
        for_training(annotations, "drop")


def test_a_missing_size_is_counted_and_read_from_the_image(voc_image: Writer) -> None:
    annotations = read(voc_image(voc_object(), size="<size><width>0</width></size>"))
    assert (annotations.images[0].width, annotations.images[0].height) == (48, 40)
    assert annotations.report()["files whose size is missing"] == 1


def test_a_rotated_file_is_read_upright(voc_image: Writer) -> None:
    """Orientation 6: 48 x 40 pixels are stored, 40 x 48 are shown, by the reader and in training."""
    upright = "<size><width>40</width><height>48</height></size>"
    root = voc_image(voc_object(box=(1, 1, 40, 48)), size=upright)
    path = root / "JPEGImages" / "one.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.save(path, exif=exif)
    annotations = read(root)
    assert (annotations.images[0].width, annotations.images[0].height) == (40, 48)
    item = Images(annotations).item(0, 40, 99, flipped=False)
    assert item.image.shape == (48, 40, 3)
    assert item.boxes.tolist() == [[0, 0, 40, 48]]


def test_parts_of_a_person_are_not_objects(voc_image: Writer) -> None:
    part = (
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
        "<xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    )
    root = voc_image(voc_object().replace("</object>", f"{part}</object>"))
    assert read(root).images[0].boxes.tolist() == [[4, 5, 20, 22]]


def test_an_unknown_class_is_named_with_the_allowed_ones(voc_image: Writer) -> None:
    with pytest.raises(AnnotationError, match=r"one\.xml.*'cat'.*allowed: square, bar"):
        read(voc_image(voc_object("cat")))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Annotations/one.xml", "image set lists 'one'"),
        ("JPEGImages/one.jpg", "no image of that name"),
        ("ImageSets/Main/train.txt", "no such file"),
    ],
)
def test_missing_files_are_named(voc_image: Writer, path: str, message: str) -> None:
    root = voc_image(voc_object())
    (root / path).unlink()
    with pytest.raises(AnnotationError, match=message):
        read(root)


def test_files_of_the_wrong_kind_are_named(voc_image: Writer) -> None:
    root = voc_image(voc_object())
    (root / "JPEGImages" / "one.jpg").write_bytes(b"<html>")
    with pytest.raises(AnnotationError, match=r"one\.jpg: cannot be read as an image"):
        read(root)
    (root / "Annotations" / "one.xml").write_text("<annotation>")
    with pytest.raises(AnnotationError, match=r"one\.xml: is not valid XML"):
        read(root)


@pytest.mark.parametrize(
    "stated", ["photo.png", "C:\\pictures\\photo.png", "/data/photo.png", " ../mixed\\data/photo.png\n"]
)
def test_an_image_of_another_name_is_found_by_its_filename(voc_image: Writer, stated: str) -> None:
    root = voc_image(voc_object())
    (root / "JPEGImages" / "one.jpg").rename(root / "JPEGImages" / "photo.png")
    path = root / "Annotations" / "one.xml"
    path.write_text(path.read_text().replace("<annotation>", f"<annotation><filename>{stated}</filename>"))
    assert read(root).images[0].path == root / "JPEGImages" / "photo.png"


@pytest.mark.parametrize(
    ("stated", "chosen"),
    [
        ("one.png", "one.png"),
        ("C:\\pictures\\one.png", "one.png"),
        ("one.jpg", "one.jpg"),
        ("one.bmp", "one.jpg"),
        ("two.png", "one.jpg"),
        ("", "one.jpg"),
    ],
)
def test_of_several_images_of_a_name_the_filename_chooses(
    voc_image: Writer, stated: str, chosen: str
) -> None:
    """two.png may be the name before renaming, and is now that of another image."""
    root = voc_image(f"<filename>{stated}</filename>", voc_object())
    for other in ("one.png", "two.png"):
        Image.new("RGB", (48, 40)).save(root / "JPEGImages" / other)
    assert read(root).images[0].path.name == chosen


def test_an_image_that_is_a_folder_or_a_broken_link_is_named(voc_image: Writer) -> None:
    root = voc_image(voc_object())
    path = root / "JPEGImages" / "one.jpg"
    path.unlink()
    path.symlink_to("elsewhere.jpg")
    with pytest.raises(AnnotationError, match=r"one\.jpg: a broken link, or not a regular file"):
        read(root)
    path.unlink()
    path.mkdir()
    with pytest.raises(AnnotationError, match=r"one\.jpg: a broken link, or not a regular file"):
        read(root)


def test_an_empty_image_set_is_named(voc_image: Writer) -> None:
    root = voc_image(voc_object())
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n \n")
    with pytest.raises(AnnotationError, match=r"train\.txt: found no image name in it"):
        read(root)


def test_a_class_wise_image_set_has_only_images_of_the_class(voc_image: Writer) -> None:
    voc_image(voc_object(), name="one")
    root = voc_image(voc_object(), name="two")
    (root / "ImageSets" / "Main" / "train.txt").write_text("one -1\ntwo  1\n")
    assert [image.image_id for image in read(root).images] == ["two"]


WRITTEN = """<annotation>
  <folder>VOC</folder>
  <filename>one.jpg</filename>
  <size>
    <width>48</width>
    <height>40</height>
    <depth>3</depth>
  </size>
  <segmented>0</segmented>
  <object>
    <name>square</name>
    <pose>Unspecified</pose>
    <truncated>0</truncated>
    <difficult>0</difficult>
    <bndbox>
      <xmin>1</xmin>
      <ymin>1</ymin>
      <xmax>48</xmax>
      <ymax>40</ymax>
    </bndbox>
  </object>
  <object>
    <name>bar</name>
    <pose>Unspecified</pose>
    <truncated>1</truncated>
    <difficult>1</difficult>
    <bndbox>
      <xmin>5</xmin>
      <ymin>6</ymin>
      <xmax>20</xmax>
      <ymax>22</ymax>
    </bndbox>
  </object>
</annotation>"""


def test_a_written_set_is_read_as_it_was(voc_image: Writer, tmp_path: Path) -> None:
    root = voc_image(voc_object(box=(1, 1, 48, 40)), voc_object("bar", (5, 6, 20, 22), difficult=1))
    first = read(root)
    voc.write(root, "again", first, [[False, True]])
    again = voc.read(root, "again", CLASSES, "fail")
    np.testing.assert_array_equal(again.images[0].boxes, first.images[0].boxes)
    assert again.images[0].ignored.tolist() == [False, True]
    assert (root / "Annotations" / "one.xml").read_text() == WRITTEN
    assert (root / "ImageSets" / "Main" / "again.txt").read_text() == "one\n"


def test_written_boxes_are_rounded_outwards(voc_image: Writer) -> None:
    root = voc_image(voc_object(box=(5.3, 6.8, 20.2, 22)))
    voc.write(root, "again", read(root), [[False]])
    assert voc.read(root, "again", CLASSES, "fail").images[0].boxes.tolist() == [[4, 5, 21, 22]]


def test_genuine_voc2007(real_data: Callable[[str], Path]) -> None:
    root = real_data("voc2007-sample4.tar") / "VOC2007"
    annotations = voc.read(root, "test", ["car", "chair", "horse", "person"], "fail")
    report = annotations.report()
    assert (report["images"], report["objects"]) == (4, 11)
    assert sum(int(image.ignored.sum()) for image in annotations.images) == 2


def test_blood_cells_have_two_boxes_without_area(real_data: Callable[[str], Path]) -> None:
    root = real_data("voc-bccd.tar") / "BCCD"
    reports = [
        voc.read(root, split, ["RBC", "WBC", "Platelets"], "drop").report()
        for split in ("train", "val", "test")
    ]
    assert sum(report["objects"] for report in reports) == 4888 - 2
    assert sum(report.get("objects dropped: a box without area", 0) for report in reports) == 2
    assert {name: sum(report["classes"][name] for report in reports) for name in ("WBC", "Platelets")} == {
        "WBC": 372,
        "Platelets": 361,
    }
