"""Detection sets that contradict themselves or their images: found before any training, by the stage,
`mochi check` and `mochi inspect`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mochi.config import DetectionData
from mochi.detection import coco, voc
from mochi.detection.annotations import Annotations
from mochi.detection.sets import Contents, contents_of, inspect, read_splits, render
from mochi.errors import DataError
from mochi.text import shown
from tests.commands import run
from tests.detection.sets import small_set, voc_object
from tests.tiny import FILE

Writer = Callable[..., Path]
SQUARE = [[4.0, 5.0, 20.0, 5.0, 20.0, 22.0, 4.0, 22.0]]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def voc_refused(root: Path) -> str:
    with pytest.raises(DataError) as error:
        read_splits(small_set(root).data, masks=False)
    return str(error.value)


def test_the_valid_set_is_read(voc_set: Path) -> None:
    train, test = read_splits(small_set(voc_set).data, masks=False)
    assert (len(train.images), len(test.images)) == (6, 5)


def test_a_gbk_annotation_is_decoded(voc_set: Path) -> None:
    path = voc_set / "Annotations" / "a1.xml"
    text = path.read_text().replace("<annotation>", "<annotation><owner>照片</owner>")
    path.write_bytes(f'<?xml version="1.0" encoding="GBK"?>{text}'.encode("gbk"))
    read_splits(small_set(voc_set).data, masks=False)
    path.write_bytes(text.encode("gbk"))
    assert "a1.xml: line 1: found the bytes d5 d5 c6 ac, which are not UTF-8" in voc_refused(voc_set)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("how", ["nothing", "elsewhere", "polygon"])
def test_a_split_without_a_box_is_refused(voc_set: Path, split: str, how: str) -> None:
    """Such a set was once trained on, and an AP of 0.0 reported."""
    for path in (voc_set / "Annotations").glob("a*.xml" if split == "train" else "b*.xml"):
        start, _, rest = path.read_text().partition("<object>")
        objects = rest.removesuffix("</annotation>")
        inside = {
            "nothing": "",
            "elsewhere": f"<objects><object>{objects}</objects>" if objects else "",
            "polygon": f"<object>{objects}".replace("bndbox", "polygon") if objects else "",
        }[how]
        path.write_text(f"{start.removesuffix('</annotation>')}{inside}</annotation>")
    message = voc_refused(voc_set)
    expected = {
        "nothing": {"train": "no object to train on in 6 training", "test": "no object in 5 test"}[split],
        "elsewhere": "looked for <object> directly below <annotation>",
        "polygon": "objects dropped: no bndbox: ",
    }[how]
    assert expected in message


@pytest.mark.parametrize(("width", "height"), [(96, 80), (40, 48), (24, 20), (48, 41)])
def test_boxes_for_another_image_size_are_refused(voc_set: Path, width: int, height: int) -> None:
    path = voc_set / "Annotations" / "a1.xml"
    edit(path, "<width>48</width><height>40</height>", f"<width>{width}</width><height>{height}</height>")
    assert f"a1.xml: size: found {width} x {height}" in voc_refused(voc_set)
    assert "its boxes would be misplaced" in voc_refused(voc_set)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_for_the_unrotated_photograph_are_refused(voc_set: Path, orientation: int) -> None:
    path = voc_set / "JPEGImages" / "a1.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as image:
        image.save(path, exif=exif)
    message = voc_refused(voc_set)
    assert "a1.xml: size: found 48 x 40 (the sides swapped, as by an EXIF orientation); a1" in message


@pytest.mark.parametrize("size", ["abc", "-48", "48.5", "1e999"])
def test_an_invalid_size_is_named(voc_set: Path, size: str) -> None:
    edit(voc_set / "Annotations" / "a1.xml", "<width>48<", f"<width>{size}<")
    assert f"a1.xml: size/width: found '{size}'; expected a number of pixels" in voc_refused(voc_set)


@pytest.mark.parametrize("box", [(60, 5, 70, 20), (5, 50, 20, 60), (-20, 5, -3, 20), (1e30, 5, 2e30, 20)])
def test_a_box_outside_its_image_is_dropped_or_named(voc_image: Writer, box: tuple[float, ...]) -> None:
    root = voc_image(voc_object(), voc_object("bar", box))
    annotations = voc.read(root, "train", ["square", "bar"], "drop")
    assert annotations.report()["objects dropped: a box outside the image"] == 1
    assert annotations.images[0].labels.tolist() == [1]
    assert annotations.dropped == (
        f"{root}/Annotations/one.xml: object 2 ('bar'): a box outside the image",
    )
    with pytest.raises(DataError, match=r"one.xml: object 2 \('bar'\): a box outside the image"):
        voc.read(root, "train", ["square", "bar"], "fail")


@pytest.mark.parametrize(
    ("difficult", "ignored"),
    [("0", False), ("1", True), (" 1 ", True), ("", False), ("True", True), ("false", False)],
)
def test_spellings_of_difficult(voc_image: Writer, difficult: str, ignored: bool) -> None:
    root = voc_image(voc_object().replace("<bndbox>", f"<difficult>{difficult}</difficult><bndbox>"))
    assert voc.read(root, "train", ["square"], "fail").images[0].ignored.tolist() == [ignored]


@pytest.mark.parametrize("difficult", ["2", "0.5", "-1"])
def test_difficult_is_0_or_1(voc_image: Writer, difficult: str) -> None:
    root = voc_image(voc_object().replace("<bndbox>", f"<difficult>{difficult}</difficult><bndbox>"))
    with pytest.raises(DataError, match=f"difficult: found '{difficult}'; expected 0 or 1"):
        voc.read(root, "train", ["square"], "fail")


@pytest.mark.parametrize(
    ("tag", "text"),
    [("name", "bar"), ("bndbox", "<xmin>1</xmin>"), ("difficult", "1</difficult><difficult>0")],
)
def test_an_object_that_contradicts_itself_is_named(voc_image: Writer, tag: str, text: str) -> None:
    root = voc_image(voc_object().replace("</object>", f"<{tag}>{text}</{tag}></object>"))
    with pytest.raises(DataError, match=rf"object 1 \('square'\): found <{tag}> twice; expected one"):
        voc.read(root, "train", ["square", "bar"], "drop")


@pytest.mark.parametrize("broken_objects", ["drop", "fail"])
@pytest.mark.parametrize(
    "tag",
    ["Object", "OBJECT", "Size", "Filename", "Width", "Height", "Name", "BndBox", "Difficult", "Xmin"],
)
def test_a_tag_in_other_capitals_is_named(voc_image: Writer, tag: str, broken_objects: str) -> None:
    root = voc_image(
        "<filename>one.jpg</filename>", voc_object(difficult=1), voc_object("bar", difficult=0)
    )
    path = root / "Annotations" / "one.xml"
    start, end = f"<{tag.lower()}>", f"</{tag.lower()}>"
    path.write_text(path.read_text().replace(start, f"<{tag}>", 1).replace(end, f"</{tag}>", 1))
    with pytest.raises(DataError, match=rf"one\.xml: found <{tag}>; expected {start}: correct the tag"):
        voc.read(root, "train", ["square", "bar"], broken_objects)


def test_tags_that_are_not_read_may_have_any_capitals(voc_image: Writer) -> None:
    part = "<part><Name>head</Name></part>"
    root = voc_image(
        "<owner><Name>one</Name></owner><Folder>VOC</Folder>",
        voc_object().replace("</object>", f"<Pose>Left</Pose>{part}</object>"),
    )
    assert len(voc.read(root, "train", ["square"], "fail").images[0].boxes) == 1


def test_an_object_deeper_in_the_file_is_named_in_any_capitals(voc_image: Writer) -> None:
    root = voc_image("<objects><Object/></objects>", voc_object())
    with pytest.raises(DataError, match=r"one\.xml: found 1 <object> deeper in the file"):
        voc.read(root, "train", ["square"], "fail")


def test_a_long_class_name_is_shortened(voc_image: Writer) -> None:
    root = voc_image(voc_object().replace("square", "square\u2028" + "x" * 5000))
    with pytest.raises(DataError, match="unknown class") as refused:
        voc.read(root, "train", ["square"], "fail")
    assert len(str(refused.value)) < 300
    assert "\u2028" not in str(refused.value)


def test_a_box_with_a_side_twice_is_broken(voc_image: Writer) -> None:
    root = voc_image(voc_object().replace("<xmin>", "<xmin>9</xmin><xmin>"), voc_object())
    annotations = voc.read(root, "train", ["square"], "drop")
    assert annotations.report()["objects dropped: a bndbox with a side twice"] == 1


def test_malformed_objects_are_named(voc_image: Writer) -> None:
    root = voc_image(
        voc_object().replace("<bndbox>", "<difficult>maybe</difficult><bndbox>"),
    )
    with pytest.raises(
        DataError, match=r"object 1 \('square'\): difficult: found 'maybe'; expected 0 or 1"
    ):
        voc.read(root, "train", ["square"], "drop")
    path = root / "Annotations" / "one.xml"
    path.write_text("<annotation><object/></annotation>")
    with pytest.raises(DataError, match=r"one.xml: object 1: found no name"):
        voc.read(root, "train", ["square"], "drop")
    path.write_text("<html></html>")
    with pytest.raises(DataError, match=r"found <html> as its root; expected <annotation>"):
        voc.read(root, "train", ["square"], "drop")


def test_several_mistakes_are_reported_at_once(voc_set: Path) -> None:
    for name in ("a1", "a2", "a3", "a4", "a5", "b1", "b2"):
        (voc_set / "Annotations" / f"{name}.xml").unlink()
    lines = voc_refused(voc_set).splitlines()
    assert len(lines) == 6
    assert lines[-1] == "... and 2 more mistakes like these"


def test_lists_in_every_encoding_and_with_blanks(voc_image: Writer) -> None:
    voc_image(voc_object(), name="one")
    voc_image(voc_object("bar"), name="one - Copy")
    root = voc_image(voc_object("bar"), name="中文 1")
    listing = root / "ImageSets" / "Main" / "train.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
        listing.write_bytes("one\r\none - Copy\r\n中文 1\r\none\r\n".encode(encoding))
        annotations = voc.read(root, "train", ["square", "bar"], "fail")
        assert [image.image_id for image in annotations.images] == ["one", "one - Copy", "中文 1"]
        assert [image.labels.tolist() for image in annotations.images] == [[1], [2], [2]]
        assert annotations.report()["names listed twice"] == 1
    listing.write_bytes("one\n中文 1\n".encode("gbk"))
    with pytest.raises(DataError, match=r"train.txt: line 2: found the bytes .*save it as UTF-8"):
        voc.read(root, "train", ["square", "bar"], "fail")


@pytest.mark.parametrize("line", ["one.jpg", "/data/one", "# one", "one,1", "one\x85two", "x" * 5000])
def test_a_line_that_is_no_name_is_shown_in_one_short_line(voc_image: Writer, line: str) -> None:
    root = voc_image(voc_object())
    (root / "ImageSets" / "Main" / "train.txt").write_text(line, encoding="utf-8")
    with pytest.raises(DataError, match="expected the name of an image, without suffix") as error:
        voc.read(root, "train", ["square"], "fail")
    assert f"lists {shown(line)};" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_names_of_another_case_are_named_and_of_another_unicode_form_found(voc_image: Writer) -> None:
    root = voc_image(voc_object("café"), name="cafe\u0301")
    listing = root / "ImageSets" / "Main" / "train.txt"
    listing.write_text("café\n", encoding="utf-8")
    assert voc.read(root, "train", ["cafe\u0301"], "fail").images[0].path.name == "cafe\u0301.jpg"
    with pytest.raises(
        DataError, match=r"'café'\): unknown class; 'Café' differs only in case; allowed: Café"
    ):
        voc.read(root, "train", ["Café"], "fail")
    listing.write_text("CAFÉ\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no 'CAFÉ.xml'; found '.*.xml', which differs in case"):
        voc.read(root, "train", ["café"], "fail")


def test_one_class_in_two_unicode_forms_is_refused(voc_image: Writer) -> None:
    root = voc_image(voc_object("café"))
    with pytest.raises(DataError, match="two are one name in two Unicode forms"):
        voc.read(root, "train", ["café", "cafe\u0301"], "fail")


# COCO


def coco_file(root: Path, split: str = "train", **changes: Any) -> dict[str, Any]:
    """Write two images with an object each, and their pictures; returns the content of the file."""
    content = {
        "images": [
            {"id": n, "file_name": f"{split}{n}.png", "height": 40, "width": 48} for n in (1, 2)
        ],
        "annotations": [
            {"id": n, "image_id": n, "category_id": n, "bbox": [4, 5, 16, 17], "segmentation": SQUARE}
            for n in (1, 2)
        ],
        "categories": [{"id": 1, "name": "square"}, {"id": 2, "name": "bar"}],
    } | changes  # fmt: skip
    write(root, split, content)
    (root / split).mkdir(exist_ok=True)
    for n in (1, 2):
        Image.fromarray(np.full((40, 48, 3), 90 * n, np.uint8)).save(root / split / f"{split}{n}.png")
    return content


def write(root: Path, split: str, content: object) -> None:
    (root / "annotations").mkdir(exist_ok=True, parents=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def coco_read(root: Path, broken_objects: str = "drop", masks: bool = True) -> Annotations:
    return coco.read(root, "train", broken_objects, masks)


def coco_data(root: Path, **changes: object) -> DetectionData:
    return DetectionData.model_validate(
        {"format": "coco", "path": str(root), "train": ["train"], "test": ["test"],
         "broken_objects": "drop", "empty_images": "keep", **changes}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("images", 1, "id"), 1, r"images\[1\]: id 1 stands for both train1.png and train2.png"),
        (("images", 1, "id"), "1", r"images\[1\]: id 1 stands for both"),
        (("images", 1, "file_name"), "train1.png", r"file_name: train1.png is also image 1"),
        (("annotations", 1, "id"), 1, r"annotation 1: found this id twice"),
        (("categories", 1, "id"), 1, r"categories\[1\]: id: found 1 twice, for 'square' and 'bar'"),
        (("categories", 1, "name"), "square", r"categories\[1\]: name: found 'square' twice"),
        (("categories",), [], r"categories: found none; expected the classes"),
        (("images", 0, "width"), None, r"images\[0\]: width: found null; expected a whole number of"),
        (("images", 0, "height"), 0, r"images\[0\]: height: found 0"),
        (("images", 0, "file_name"), 5, r"images\[0\]: file_name: found 5; expected a text"),
        (("images", 0), None, r"images\[0\]: found null; expected an object"),
        (("images",), {}, r"json: images: found an object with 0 keys; expected a list"),
        (("annotations", 0, "image_id"), None, r"annotation 1: image_id: found null"),
        (("annotations", 0, "image_id"), 9, r"annotation 1: image_id 9 is not among the images"),
        (("annotations", 0, "category_id"), 0, r"annotation 1: category_id 0 is not a category: 1, 2"),
        (("annotations", 0, "iscrowd"), "yes", r"annotation 1: iscrowd: found 'yes'; expected 0 or 1"),
        (("annotations", 0, "area"), -1, r"annotation 1: area: found -1; expected a number of at least 0"),
        (("annotations", 0), [], r"annotations\[0\]: found a list of 0; expected an object"),
        (("images", 0, "width"), 10**9, r"images\[0\]: found 1000000000 x 40 pixels; at most"),
    ],
)  # fmt: skip
def test_contradictions_are_named(
    tmp_path: Path, keys: tuple[Any, ...], value: object, message: str
) -> None:
    content = coco_file(tmp_path)
    parent: Any = content
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = value
    write(tmp_path, "train", content)
    with pytest.raises(DataError, match=message):
        coco_read(tmp_path)


def test_numbers_written_as_text_are_read(tmp_path: Path) -> None:
    content = coco_file(tmp_path)
    for image in content["images"]:
        image |= {key: str(image[key]) for key in ("id", "height", "width")}
    for item in content["annotations"]:
        item |= {"bbox": ["4", "5.0", "16", "17"], "category_id": str(item["category_id"]), "iscrowd": "0"}
    content["annotations"][0]["segmentation"] = [[str(value) for value in SQUARE[0]]]
    write(tmp_path, "train", content)
    annotations = coco_read(tmp_path, "fail")
    assert [image.labels.tolist() for image in annotations.images] == [[1], [2]]
    assert annotations.images[0].boxes.tolist() == [[4, 5, 20, 22]]
    assert annotations.images[0].masks == annotations.images[1].masks
    assert not annotations.images[0].ignored.any()


FULL = [{"size": [40, 48], "counts": [100, 40, 1780]}, {"size": [40, 48], "counts": [0, 1920]}]


@pytest.mark.parametrize(
    ("shape", "defect"),
    [
        (None, "no segmentation"),
        ([], "no segmentation"),
        ({}, "no segmentation"),
        ("polygon", "a segmentation that is neither"),
        ([4, 5, 20, 5, 20, 22], "a segmentation that is neither"),
        ({"all_points_x": [1, 9, 9], "all_points_y": [1, 1, 9]}, "a segmentation that is neither"),
        ([[]], "a polygon of fewer than 3 points"),
        ([[4, 5, 6]], "a polygon of fewer than 3 points"),
        ([[3, 4, 20, 22]], "a polygon of fewer than 3 points"),
        ([[4, 5, 20, 5, 20, 22, 4]], "a polygon of fewer than 3 points"),
        ([[4, 5, 20, 5, None, 22]], "a polygon with a point that is not a number"),
        ([[4, 5, 20, 5, "x", 22]], "a segmentation that is neither"),
        ([[104, 5, 120, 5, 120, 22]], "a polygon outside the image"),
        ([[54, 5, 70, 5, 70, 22]], "a polygon outside the image"),
        ([[48, 5, 60, 5, 60, 22]], "a polygon outside the image"),
        ([[-9, 5, 0, 5, 0, 22]], "a polygon outside the image"),
        ([[4, 40, 20, 40, 20, 45]], "a polygon outside the image"),
        ([[4, -9, 20, -9, 20, 0]], "a polygon outside the image"),
        ([[-49, 5, 20, 5, 20, 22]], "a polygon outside the image"),
        ([[4, 5, 20, 5, 20, 97]], "a polygon outside the image"),
        ([[4, 5, 1e12, 5, 20, 22]], "a polygon outside the image"),
        ({"counts": [100, 40, 1780]}, "run lengths of another size"),
        ({"size": [48, 40], "counts": [100, 40, 1780]}, "run lengths of another size"),
        ({"size": [20, 24], "counts": [100, 40, 340]}, "run lengths of another size"),
        ({"size": [40, 48, 1], "counts": [1920]}, "run lengths of another size"),
        ({"size": [40, 48], "counts": [100, 50]}, "run lengths that do not fill the image"),
        ({"size": [40, 48], "counts": [-100, 240, 1780]}, "run lengths that do not fill the image"),
        ({"size": [40, 48], "counts": [960, -5, 960]}, "run lengths that do not fill the image"),
        ({"size": [40, 48], "counts": [100.5, 39.5, 1780]}, "run lengths that do not fill the image"),
        ({"size": [40, 48], "counts": ["a"]}, "run lengths that do not fill the image"),
        ({"size": [40, 48], "counts": None}, "run lengths that do not fill the image"),
        ({"size": [40, 48], "counts": "zzzz"}, "run lengths that do not fill the image"),
        ({"size": [40, 48], "counts": "é"}, "run lengths that do not fill the image"),
        ({"size": [40, 48], "counts": [1920]}, "a mask without a pixel"),
        ({"size": [40, 48], "counts": [0, 0, 1920]}, "a mask without a pixel"),
    ],
)  # fmt: skip
def test_a_segmentation_that_cannot_be_used_is_dropped_or_named(
    tmp_path: Path, shape: object, defect: str
) -> None:
    content = coco_file(tmp_path)
    content["annotations"][0]["segmentation"] = shape
    write(tmp_path, "train", content)
    annotations = coco_read(tmp_path)
    assert [len(image.labels) for image in annotations.images] == [0, 1]
    assert annotations.dropped[0].startswith(
        f"{tmp_path}/annotations/instances_train.json: annotation 1 of ima"
    )
    assert defect in annotations.dropped[0]
    with pytest.raises(DataError, match=rf"annotation 1 of image 1: {defect}"):
        coco_read(tmp_path, "fail")
    assert len(coco_read(tmp_path, "fail", masks=False).images[0].labels) == 1, "boxes do not need it"


@pytest.mark.parametrize(
    "shape",
    [
        SQUARE,
        [*SQUARE, [1, 2, 3, 4]],
        *FULL,
        {"size": [40, 48], "counts": [100, 0, 100, 1720]},
        [[-48, -48, 96, 5, 20, 96]],
        [[47, 39, 60, 39, 60, 50]],
        [[-9, -9, 1, -9, 1, 1]],
    ],
)
def test_a_segmentation_that_can_be_used_is_kept(tmp_path: Path, shape: object) -> None:
    content = coco_file(tmp_path)
    content["annotations"][0]["segmentation"] = shape
    write(tmp_path, "train", content)
    [image, _] = coco_read(tmp_path, "fail").images
    assert image.masks is not None
    assert coco.decode_masks(image.masks, 40, 48).shape == (1, 40, 48)


def test_compressed_run_lengths_are_measured_as_pycocotools_decodes_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random((1, 40, 48)) < rng.choice([0.01, 0.5, 0.99])
        [shape] = coco.encode_masks(mask.astype(np.uint8))
        lengths = coco._lengths(shape["counts"].decode())
        assert lengths is not None
        values = np.repeat(np.arange(len(lengths)) % 2, lengths)
        np.testing.assert_array_equal(values.reshape(48, 40).T, mask[0])


@pytest.mark.parametrize("empty_images", ["keep", "drop"])
def test_missing_masks_are_named_if_masks_are_trained(tmp_path: Path, empty_images: str) -> None:
    for split in ("train", "test"):
        content = coco_file(tmp_path, split)
        for item in content["annotations"]:
            del item["segmentation"]
        write(tmp_path, split, content)
    data = coco_data(tmp_path, empty_images=empty_images)
    read_splits(data, masks=False)
    with pytest.raises(
        DataError, match=r"found no object to train on .*objects dropped: no segmentation: 2"
    ):
        read_splits(data, masks=True)


def test_a_test_split_with_crowds_only_is_refused(tmp_path: Path) -> None:
    coco_file(tmp_path)
    content = coco_file(tmp_path, "test")
    for item in content["annotations"]:
        item["iscrowd"] = 1
    write(tmp_path, "test", content)
    with pytest.raises(
        DataError, match=r"found no object in 2 test images \(test; crowds: 2.*nothing to meas"
    ):
        read_splits(coco_data(tmp_path), masks=False)


def test_classes_that_differ_between_splits_are_named(tmp_path: Path) -> None:
    coco_file(tmp_path)
    coco_file(tmp_path, "test", categories=[{"id": 1, "name": "square"}, {"id": 2, "name": "Bar"}])
    with pytest.raises(DataError, match="only in the first: bar; only in the second: Bar"):
        read_splits(coco_data(tmp_path), masks=False)
    coco_file(tmp_path, "test", categories=[{"id": 2, "name": "square"}, {"id": 1, "name": "bar"}])
    with pytest.raises(DataError, match="number 1 is 'square' in the first and 'bar' in the second"):
        read_splits(coco_data(tmp_path), masks=False)


def test_category_ids_from_0_and_from_1_are_the_same_classes(tmp_path: Path) -> None:
    coco_file(tmp_path)
    content = coco_file(
        tmp_path, "test", categories=[{"id": 0, "name": "square"}, {"id": 1, "name": "bar"}]
    )
    for item in content["annotations"]:
        item["category_id"] -= 1
    write(tmp_path, "test", content)
    train, test = read_splits(coco_data(tmp_path), masks=False)
    assert [image.labels.tolist() for image in train.images] == [[1], [2]]
    assert [image.labels.tolist() for image in test.images] == [[1], [2]]
    assert (train.numbering, test.numbering) == ("category ids 1 to 2", "category ids 0 to 1")


def test_names_of_files_in_another_unicode_form_are_found(tmp_path: Path) -> None:
    content = coco_file(tmp_path)
    (tmp_path / "train" / "train1.png").rename(tmp_path / "train" / "cafe\u0301.png")
    content["images"][0]["file_name"] = "café.png"
    write(tmp_path, "train", content)
    assert coco_read(tmp_path).images[0].path.name == "cafe\u0301.png"


def test_check_and_inspect_report_what_training_refuses(
    tmp_path: Path, voc_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = yaml.safe_load(FILE.read_text())
    chosen = small_set(voc_set).model_dump(mode="json", exclude_none=True)
    experiment["evaluation"]["detection"] = {"own": chosen}
    Path("exp.yaml").write_text(yaml.safe_dump(experiment))
    done = run("check", "exp.yaml")
    assert "warning: evaluation.detection.own: 1 classes have no object in test" in done.stdout
    assert done.returncode == 0
    image = voc_set / "JPEGImages" / "a1.jpg"
    image.write_bytes(image.read_bytes()[: image.stat().st_size * 6 // 10])
    done = run("check", "exp.yaml")
    assert done.returncode == 1
    assert "error: evaluation.detection.own: 1 of 11 images cannot be used" in done.stdout
    assert "bytes): JPEG does not decode" in run("inspect", str(voc_set)).stdout
    edit(voc_set / "Annotations" / "a2.xml", "<name>bar</name>", "<name></name>")
    assert "a2.xml: object 2: found no name" in run("inspect", str(voc_set)).stdout


def test_printing_a_report_does_not_change_it(tmp_path: Path) -> None:
    for split in ("train", "test"):
        coco_file(tmp_path, split)
    data = {"format": "coco", "path": str(tmp_path), "train": ["train"], "test": ["test"]}
    found = inspect(data, jobs=1)
    assert "square 1, bar 1" in render(found)
    assert found.counts["train"]["classes"] == {"square": 1, "bar": 1}


def test_contents_are_printed_split_by_split() -> None:
    counts = {
        "train": {
            "images": 2,
            "objects": 3,
            "classes": {"square": 1, "bar": 2},
            "crowds": 1,
            "numbering": "x",
        },
        "test": {"images": 1, "objects": 0, "classes": {f"c{n}": n for n in range(20)}},
    }
    assert render(Contents(["wrong"], ["odd", "rare"], counts)).splitlines() == [
        "boxes of train: 3 in 2 images",
        "  square 1, bar 2",
        "  crowds: 1",
        "  numbering: x",
        "boxes of test: 0 in 1 images",
        f"  {', '.join(f'c{n} {n}' for n in range(20))}",
        "warning: odd",
        "warning: rare",
        "error: wrong",
    ]
    counts = {"test": {"images": 1, "objects": 0, "classes": {f"c{n}": n for n in range(21)}}}
    assert render(Contents([], [], counts)).endswith("c18 18, c19 19, ...")


@pytest.mark.parametrize(("count", "more"), [(5, ""), (6, ", ...")])
def test_the_first_five_classes_without_an_object_are_listed(tmp_path: Path, count: int, more: str) -> None:
    categories = [
        {"id": 1 + n, "name": name} for n, name in enumerate(["square", "bar", *"abcdef"[:count]])
    ]
    for split in ("train", "test"):
        coco_file(tmp_path, split, categories=categories)
    found = contents_of(coco_data(tmp_path), masks=False, jobs=1)
    assert found.errors == []
    assert list(found.counts) == ["train", "test"]
    assert found.warnings == [
        f"{count} classes have no object in train and cannot be learnt: a, b, c, d, e{more}",
        f"{count} classes have no object in test and have no average precision: a, b, c, d, e{more}",
    ]


def test_classes_with_crowds_alone_are_listed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        content = coco_file(tmp_path, split)
        content["annotations"][1]["iscrowd"] = 1
        write(tmp_path, split, content)
    assert contents_of(coco_data(tmp_path), masks=False, jobs=1).warnings == [
        "1 classes have only difficult objects or crowds in train and cannot be learnt: bar",
        "1 classes have only difficult objects or crowds in test and have no average precision: bar",
    ]
    content["annotations"].append({"id": 3, "image_id": 1, "category_id": 2, "bbox": [4, 5, 16, 17]})
    write(tmp_path, "train", {**content, "images": coco_file(tmp_path)["images"]})
    write(tmp_path, "test", content)
    assert contents_of(coco_data(tmp_path), masks=False, jobs=1).warnings == []


def test_classes_with_difficult_objects_alone_are_listed(voc_image: Writer) -> None:
    objects = voc_object(), voc_object("bar", difficult=1)
    voc_image(*objects, name="a1")
    root = voc_image(*objects, name="b1", image_set="test")
    assert contents_of(small_set(root).data, masks=False, jobs=1).warnings == [
        "1 classes have only difficult objects or crowds in test and have no average precision: bar"
    ], "difficult objects are trained on"


@pytest.mark.parametrize(("count", "more"), [(3, False), (4, True)])
def test_the_first_three_dropped_objects_are_listed(tmp_path: Path, count: int, more: bool) -> None:
    for split in ("train", "test"):
        content = coco_file(tmp_path, split)
    content["annotations"] += [{"id": 10 + n, "image_id": 1, "category_id": 1} for n in range(count)]
    write(tmp_path, "test", content)
    [warning] = contents_of(coco_data(tmp_path), masks=False, jobs=1).warnings
    assert warning.startswith(f"{count} objects of test are dropped: {tmp_path}/annotations/")
    assert [f"annotation {10 + n} of image 1: no bbox" in warning for n in range(4)] == [True] * 3 + [False]
    assert warning.endswith("; ...") == more


def test_images_of_both_splits_are_counted(tmp_path: Path) -> None:
    coco_file(tmp_path)
    [warning] = contents_of(coco_data(tmp_path, test=["train"]), masks=False, jobs=1).warnings
    assert warning == f"2 images are in both train and test, such as {tmp_path}/train/train1.png"


def test_a_tree_is_inspected_with_the_masks_and_classes_it_has(tmp_path: Path, voc_set: Path) -> None:
    data = {"format": "coco", "path": str(tmp_path), "train": ["train"], "test": ["test"]}
    for split in ("train", "test"):
        content = coco_file(tmp_path, split)
        for item in content["annotations"]:
            del item["segmentation"]
        write(tmp_path, split, content)
    found = inspect(data, 1)
    assert (found.errors, found.warnings) == ([], []), "without any mask, none is needed"
    content["annotations"][0]["segmentation"] = SQUARE
    write(tmp_path, "test", content)
    found = inspect(data, 1)
    assert found.errors[0].startswith(f"{tmp_path}: train: found no object to train on")
    data = {"format": "voc", "path": str(voc_set.parent), "train": ["VOC/train"], "test": ["VOC/test"]}
    assert inspect(data, 1).counts["train"]["classes"] == {"bar": 5, "square": 5}
    for path in (voc_set / "Annotations").iterdir():
        path.write_text("<annotation></annotation>")
    assert inspect(data, 1).errors == [f"{voc_set.parent}: found no object in VOC/train, VOC/test"]
