"""The COCO reader compared with hand-made files, masks with pycocotools, and counts of the real subset."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as reference

from mochi.detection import coco
from mochi.detection.annotations import AnnotationError, Annotations, for_training

# pycocotools 2.0 is older than numpy 2's copy keyword.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TRIANGLE = [[2.0, 3.0, 18.0, 4.0, 9.0, 17.0]]
TWO_PARTS = [[1.0, 1.0, 6.0, 1.0, 6.0, 6.0, 1.0, 6.0], [10.0, 10.0, 18.0, 10.0, 18.0, 15.0]]


def write(
    root: Path, annotations: list[dict[str, Any]], images: list[dict[str, Any]] | None = None
) -> Path:
    data = {
        "images": images or [{"id": 7, "file_name": "seven.jpg", "height": 20, "width": 30}],
        "annotations": [
            {
                "id": 10 + number,
                "image_id": 7,
                "category_id": 3,
                "bbox": [2, 3, 16, 14],
                "iscrowd": 0,
                **item,
            }
            for number, item in enumerate(annotations)
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
    }
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / "instances_val.json").write_text(json.dumps(data))
    return root


def read(root: Path, broken_objects: str = "drop", masks: bool = True) -> Annotations:
    return coco.read(root, "val", broken_objects, masks)


def test_labels_follow_the_order_of_category_ids_without_gaps(tmp_path: Path) -> None:
    root = write(tmp_path, [{"category_id": 90}, {"category_id": 3}])
    annotations = read(root, masks=False)
    assert annotations.classes == ("car", "toothbrush")
    assert annotations.images[0].labels.tolist() == [2, 1]
    assert annotations.images[0].boxes.tolist() == [[2, 3, 18, 17]] * 2
    assert annotations.images[0].path == tmp_path / "val" / "seven.jpg"


def test_categories_with_numbers_come_first_then_those_with_names(tmp_path: Path) -> None:
    root = write(tmp_path, [{"category_id": "b"}])
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    names = {"b": "bus", 10: "ten", "a": "apple", 9: "nine"}
    content["categories"] = [{"id": identity, "name": name} for identity, name in names.items()]
    path.write_text(json.dumps(content))
    annotations = read(root, masks=False)
    assert annotations.classes == ("nine", "ten", "apple", "bus")
    assert annotations.images[0].labels.tolist() == [4]
    assert annotations.numbering == "category ids 9 to 'b'"


@pytest.mark.parametrize("stated", ["part/photo.png", "part\\photo.png", "part/photo\u0301.png"])
def test_files_are_found_by_either_slash_and_unicode_form(tmp_path: Path, stated: str) -> None:
    name = "phot\u00f3.png" if "\u0301" in stated else "photo.png"
    (tmp_path / "val" / "part").mkdir(parents=True)
    (tmp_path / "val" / "part" / name).touch()
    root = write(tmp_path, [], [{"id": 1, "file_name": stated, "height": 1, "width": 1}])
    [image] = read(root).images
    assert image.path == tmp_path / "val" / "part" / name
    assert (image.height, image.width) == (1, 1)


def test_an_image_that_cannot_be_read_is_the_only_mistake(tmp_path: Path) -> None:
    root = write(tmp_path, [{}, {}], [{"id": 7, "file_name": "seven.jpg", "height": "x", "width": 30}])
    with pytest.raises(AnnotationError, match=r"^[^\n]*images\[0\]: height: found 'x'[^\n]*$"):
        read(root)


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ([{"bbox": [0, 0, 1, 1]}, {"segmentation": TRIANGLE}], True),
        ([{"segmentation": []}, {"segmentation": None}, {}, None, "segmentation"], False),
        ([], False),
        (None, False),
        ({"segmentation": TRIANGLE}, False),
    ],
)
def test_whether_a_split_has_masks(tmp_path: Path, annotations: object, expected: bool) -> None:
    path = write(tmp_path, []) / "annotations" / "instances_val.json"
    path.write_text(json.dumps({"annotations": annotations}))
    assert coco.has_masks(tmp_path, "val") is expected
    path.write_text("[]")
    assert coco.has_masks(tmp_path, "val") is False


@pytest.mark.parametrize("shape", [TRIANGLE, TWO_PARTS])
def test_polygons_equal_pycocotools(tmp_path: Path, shape: list[list[float]]) -> None:
    image = read(write(tmp_path, [{"segmentation": shape}])).images[0]
    assert image.masks is not None
    expected = reference.decode(reference.merge(reference.frPyObjects(shape, 20, 30)))
    np.testing.assert_array_equal(coco.decode_masks(image.masks, 20, 30)[0], expected)


def test_both_kinds_of_run_length_encoding(tmp_path: Path) -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[4:9, 5:12] = 1
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    uncompressed = {"size": [20, 30], "counts": np.diff([0, *edges, flat.size]).tolist()}
    packed = reference.encode(np.asfortranarray(mask))
    compressed = {"size": [20, 30], "counts": packed["counts"].decode()}
    image = read(write(tmp_path, [{"segmentation": uncompressed}, {"segmentation": compressed}])).images[0]
    assert image.masks is not None
    np.testing.assert_array_equal(coco.decode_masks(image.masks, 20, 30), [mask, mask])
    np.testing.assert_array_equal(
        coco.decode_masks(coco.encode_masks(np.stack([mask, mask])), 20, 30), [mask, mask]
    )


def test_crowds_are_evaluated_but_not_trained_on(tmp_path: Path) -> None:
    images = [
        {"id": name, "file_name": f"{name}.jpg", "height": 20, "width": 30}
        for name in ("crowd", "another crowd", "none", "both")
    ]
    crowd = {"iscrowd": 1, "segmentation": {"size": [20, 30], "counts": [100, 40, 460]}}
    objects: list[dict[str, Any]] = [
        {**crowd, "image_id": "crowd"},
        {**crowd, "image_id": "another crowd"},
        {**crowd, "image_id": "both"},
        {"segmentation": TRIANGLE, "image_id": "both"},
    ]
    annotations = read(write(tmp_path, objects, images))
    report = annotations.report()
    counts = report["crowds"], report["images with crowds alone"], report["images without boxes"]
    assert counts == (3, 2, 1)
    assert [image.ignored.tolist() for image in annotations.images] == [[True], [True], [], [True, False]]
    trained = for_training(annotations, "drop")
    assert [image.image_id for image in trained.images] == ["both"]
    assert trained.images[0].masks is not None
    assert len(trained.images[0].masks) == len(trained.images[0].boxes) == 1
    assert [len(image.boxes) for image in for_training(annotations, "keep").images] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("item", "defect"),
    [
        ({"bbox": [2, 3, 0, 14]}, "a box without area"),
        ({"bbox": [2, 3, 5, 0]}, "a box without area"),
        ({"bbox": [2, 3, 5, -1]}, "a box without area"),
        ({"bbox": []}, "no bbox"),
        ({"bbox": [2, 3, 5]}, "a bbox that is not four numbers"),
        ({"bbox": [2, 3, 5, 5, 1]}, "a bbox that is not four numbers"),
        ({"bbox": [2, 3, 5, 5, None]}, "a bbox that is not four numbers"),
        ({"bbox": [30, 3, 5, 5]}, "a box outside the image"),
        ({"bbox": [-5, 3, 5, 5]}, "a box outside the image"),
        ({"bbox": [2, 20, 5, 5]}, "a box outside the image"),
        ({"bbox": [2, -5, 5, 5]}, "a box outside the image"),
        ({"bbox": [-1e10, 3, 2e10, 5]}, "a box outside the image"),
        ({"bbox": [2, -1e10, 5, 2e10]}, "a box outside the image"),
        ({"segmentation": []}, "no segmentation"),
        ({}, "no segmentation"),
    ],
)
def test_broken_objects(tmp_path: Path, item: dict[str, Any], defect: str) -> None:
    root = write(tmp_path, [{"segmentation": TRIANGLE}, item if "segmentation" in item or not item
                            else {"segmentation": TRIANGLE, **item}])  # fmt: skip
    annotations = read(root)
    assert len(annotations.images[0].boxes) == 1
    assert annotations.report()[f"objects dropped: {defect}"] == 1
    with pytest.raises(AnnotationError, match=f"annotation 11 of image 7: {defect}"):
        read(root, "fail")


@pytest.mark.parametrize(
    ("bbox", "inside"),
    [
        ([2, 3, 0.5, 0.25], [2, 3, 2.5, 3.25]),
        ([28, 3, 5, 5], [28, 3, 30, 8]),
        ([2, 18, 5, 5], [2, 18, 7, 20]),
        ([-4, 3, 5, 5], [0, 3, 1, 8]),
        ([2, -4, 5, 5], [2, 0, 7, 1]),
        ([29.5, 19.5, 9, 9], [29.5, 19.5, 30, 20]),
        ([0, 0, 1e9, 1e9], [0, 0, 30, 20]),
    ],
)
def test_boxes_are_clipped_to_the_image(tmp_path: Path, bbox: list[float], inside: list[float]) -> None:
    image = read(write(tmp_path, [{"bbox": bbox}]), "fail", masks=False).images[0]
    assert image.boxes.tolist() == [inside]


def test_boxes_beyond_the_image_are_counted_as_in_voc(tmp_path: Path) -> None:
    boxes = [[0, 0, 30, 20], [28, 3, 5, 5], [-4, -4, 5, 5], [29.9, 3, 0.1, 5], [2, 30, 5, 5]]
    report = read(write(tmp_path, [{"bbox": box} for box in boxes]), masks=False).report()
    assert report["boxes cut to the image"] == 2
    assert report["objects dropped: a box outside the image"] == 1


def test_areas_are_those_of_the_file_or_else_of_the_box(tmp_path: Path) -> None:
    objects: list[dict[str, Any]] = [{"area": 12.5}, {"bbox": [2, 3, 6, 4]}, {"area": 0}]
    image = read(write(tmp_path, objects), masks=False).images[0]
    assert image.areas is not None
    assert image.areas.tolist() == [12.5, 24, 0]


@pytest.mark.parametrize(("count", "end"), [(10, "98"), (11, "98, ...")])
def test_ten_of_many_categories_are_named(tmp_path: Path, count: int, end: str) -> None:
    path = write(tmp_path, [{"category_id": 5}]) / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["categories"] += [{"id": 89 + n, "name": f"class {n}"} for n in range(2, count)]
    path.write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=f"5 is not a category: 3, 90, 91, .*, {end}$"):
        read(tmp_path, masks=False)


def test_boxes_need_no_segmentation(tmp_path: Path) -> None:
    assert len(read(write(tmp_path, [{}]), masks=False).images[0].boxes) == 1


@pytest.mark.parametrize(
    ("item", "message"), [({"image_id": 8}, "image_id 8"), ({"category_id": 4}, "category_id 4")]
)
def test_references_to_unknown_ids_are_named(tmp_path: Path, item: dict[str, Any], message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read(write(tmp_path, [item]), masks=False)


def test_files_that_are_not_coco_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="no such file"):
        read(tmp_path)
    write(tmp_path, [])
    (tmp_path / "annotations" / "instances_val.json").write_text('{"images": []}')
    with pytest.raises(AnnotationError, match="found no annotations, categories"):
        read(tmp_path)


def test_the_real_subset(real_data: Callable[[str], Path]) -> None:
    root = real_data("coco-tiny.tar") / "coco-tiny"
    for split, images, objects, crowds in (("train2017", 160, 1444, 14), ("val2017", 158, 1424, 16)):
        report = coco.read(root, split, "fail", masks=True).report()
        assert (report["images"], report["objects"], report["crowds"]) == (images, objects, crowds)
        assert len(report["classes"]) == 80
        assert min(report["classes"].values()) > 0


def test_a_written_set_is_read_as_it_was(tmp_path: Path) -> None:
    runs = {"size": [20, 30], "counts": [100, 40, 460]}
    objects = [
        {"segmentation": TRIANGLE, "area": 12.5},
        {"segmentation": runs, "iscrowd": 1, "category_id": 90, "bbox": [1, 2, 3.5, 4]},
    ]
    first = read(write(tmp_path, objects))
    coco.write(tmp_path, "val", first, [[TRIANGLE, runs]])
    content = json.loads((tmp_path / "annotations" / "instances_val.json").read_text())
    assert content["images"] == [{"id": 1, "file_name": "seven.jpg", "height": 20, "width": 30}]
    assert content["categories"] == [{"id": 1, "name": "car"}, {"id": 2, "name": "toothbrush"}]
    assert [item["id"] for item in content["annotations"]] == [1, 2]
    [again] = read(tmp_path, "fail").images
    assert again.masks == first.images[0].masks
    for name in ("boxes", "labels", "ignored", "areas"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first.images[0], name))


def test_an_empty_list_of_masks_has_shape_0_h_w() -> None:
    assert coco.decode_masks([], 20, 30).shape == (0, 20, 30)
    assert coco.encode_masks(np.zeros((0, 20, 30), np.uint8)) == []
