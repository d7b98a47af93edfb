"""Valid files, changed at random: a node dropped, duplicated, moved, or replaced by another type; bytes
cut, changed or re-encoded.

For each kind of file: the valid bytes, and a reader of the changed ones.
"""

import copy
import json
import random
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

import numpy as np
from PIL import Image

from mochi.config.datasets import Folder
from mochi.data.format import open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.data.ingest.sources import folder, imagenet
from mochi.detection import coco, voc
from mochi.detection.annotations import AnnotationError, Annotations, for_training
from mochi.detection.coco import decode_masks, encode_masks
from tests.detection.sets import voc_object

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**63, 10**400, 0.5, -0.0, 1e300, float("nan"), float("inf"), "", " ", "0",
    "1", "-1", "12.5", "1e999", "nan", "abc", "\0", "\ud800", "é", "e\u0301", "../x", "/", "a" * 300, [],
    [[]], {}, [None], [1, 2, 3, 4], ["1", "2", "3", "4"], [[1, 2, 3]], {"id": 1},
    {"size": [40, 48], "counts": "x"}, {"size": [40, 48], "counts": [1920]}, [[[[[]]]]],
)  # fmt: skip
ENCODINGS = (
    "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gbk", "latin-1", "cp1252", "shift-jis",
)  # fmt: skip


def mutate(value: Any, rng: random.Random) -> Any:
    """A value of JSON types with one node changed."""
    value = copy.deepcopy(value)
    parent, key = rng.choice(list(_nodes(value)))
    match rng.randrange(6):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        case 2:
            donor, donor_key = rng.choice(list(_nodes(value)))
            parent[key] = copy.deepcopy(donor[donor_key])
        case 3:
            parent[key] = [parent[key]] if rng.random() < 0.5 else {"x": parent[key]}
        case 4:
            parent[key] = str(parent[key])
        case _:
            parent[key] = copy.deepcopy(rng.choice(ODD))
    return value


def _nodes(value: Any) -> Any:
    """(parent, key) of every node."""
    keys = range(len(value)) if isinstance(value, list) else value
    for key in list(keys):
        yield value, key
        if isinstance(value[key], list | dict):
            yield from _nodes(value[key])


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    value = mutate(json.loads(data), rng)
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def mutate_xml(data: bytes, rng: random.Random) -> bytes:
    root = ET.fromstring(data)  # noqa: S314
    parents = [(parent, child) for parent in root.iter() for child in parent]
    parent, child = rng.choice(parents)
    match rng.randrange(6):
        case 0:
            parent.remove(child)
        case 1:
            parent.append(copy.deepcopy(child))
        case 2:
            child.tag = rng.choice(parents)[1].tag
        case 3:
            rng.choice(parents)[0].append(copy.deepcopy(child))
        case 4:
            child.clear()
        case _:
            odd = str(rng.choice(ODD))
            child.text = "".join(c for c in odd if c.isprintable() and not "\ud800" <= c <= "\udfff")
    encoding = rng.choice(["utf-8", "utf-16", "us-ascii"])
    changed = ET.tostring(root, encoding, xml_declaration=rng.random() < 0.5)
    assert isinstance(changed, bytes)
    return changed


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut, changed, duplicated or re-encoded."""
    first, last = sorted(rng.choices(range(len(data) + 1), k=2))
    match rng.randrange(6):
        case 0:
            return data[:last]
        case 1:
            return data[:first] + data[last:]
        case 2:
            return data[:last] + data[first:]
        case 3:
            return data[:first] + rng.randbytes(rng.randrange(1, 9)) + data[first:]
        case 4:
            changed = bytearray(data or b"x")
            for _ in range(rng.randrange(1, 20)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            return bytes(changed)
        case _:
            text = data.decode("utf-8", "replace") + rng.choice(["", "é", "中文", "\r\n", "\0"])
            return text.encode(rng.choice(ENCODINGS), "replace")


class Kind(NamedTuple):
    """A kind of file."""

    path: Path
    """The file that is changed."""
    mutations: tuple[Callable[[bytes, random.Random], bytes], ...]
    read: Callable[[], object]
    """Everything that the project does with the file before it computes."""


def _voc_set(root: Path, name: str) -> Path:
    for below in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / below).mkdir(parents=True)
    for image in ("one", "two words", "三"):
        Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(root / "JPEGImages" / f"{image}.jpg")
        objects = voc_object(difficult=0) + voc_object("bar", (1, 1, 48, 40), truncated=1)
        size = "<size><width>48</width><height>40</height><depth>3</depth></size>"
        text = f"<annotation><filename>{image}.jpg</filename>{size}{objects}</annotation>"
        (root / "Annotations" / f"{image}.xml").write_text(text, encoding="utf-8")
    (root / "ImageSets/Main" / f"{name}.txt").write_text("one 1\ntwo words\n三  -1\n三\n", encoding="utf-8")
    return root


def _used(annotations: Annotations) -> None:
    """What training does with annotations before its first step."""
    annotations.report()
    for image in annotations.images:
        assert (image.boxes[:, 2:] > image.boxes[:, :2]).all()
        assert (image.boxes <= [image.width, image.height] * 2).all()
        if image.masks is not None and image.height * image.width < 1e7:
            assert decode_masks(image.masks, image.height, image.width).shape[0] == len(image.boxes)
    with suppress(AnnotationError):  # it does not name the file: `sets` does
        for_training(annotations, "keep")


def _coco(root: Path) -> Kind:
    [packed] = encode_masks(np.eye(40, 48, dtype=np.uint8)[None])
    polygon, counts = [[2.0, 3.0, 18.0, 4.0, 9.0, 17.0]], [100, 40, 1780]
    shapes = [
        polygon,
        {"size": [40, 48], "counts": counts},
        {"size": [40, 48], "counts": packed["counts"].decode()},
    ]
    content = {
        "images": [
            {"id": n, "file_name": f"{n}.jpg", "height": 40, "width": 48} for n in (1, 2)
        ],
        "annotations": [
            {"id": n, "image_id": 1 + n % 2, "category_id": 1 + n % 2, "bbox": [2, 3, 16, 14],
             "iscrowd": n % 2, "area": 224.0, "segmentation": shapes[n]}
            for n in range(3)
        ],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "café"}],
    }  # fmt: skip
    path = root / "annotations/instances_val.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))

    def read() -> None:
        chance = zlib.crc32(path.read_bytes())  # the same for the same file
        _used(coco.read(root, "val", ["drop", "fail"][chance % 2], masks=chance % 3 > 0))

    return Kind(path, (mutate_json, mutate_json, mutate_json, mutate_bytes), read)


def _voc_xml(root: Path) -> Kind:
    path = _voc_set(root, "train") / "Annotations/one.xml"

    def read() -> None:
        voc.class_names(root, "train")
        chance = zlib.crc32(path.read_bytes())
        _used(voc.read(root, "train", ["square", "bar"], ["drop", "fail"][chance % 2]))

    return Kind(path, (mutate_xml, mutate_xml, mutate_bytes), read)


def _voc_list(root: Path) -> Kind:
    _voc_set(root, "train")

    def read() -> None:
        voc.read(root, "train", ["square", "bar"], "drop")

    return Kind(root / "ImageSets/Main/train.txt", (mutate_bytes,), read)


def _listed(root: Path) -> Kind:
    home = _voc_set(root, "train")
    config = Folder(
        source="folder",
        name="x",
        path=str(home / "JPEGImages"),
        only_listed=["../ImageSets/Main/train.txt"],
    )
    return Kind(home / "ImageSets/Main/train.txt", (mutate_bytes,), lambda: folder.collect(config, root))


def _kaggle(root: Path) -> Kind:
    root.mkdir(exist_ok=True)
    path = root / "LOC_val_solution.csv"
    rows = "".join(f"ILSVRC2012_val_{n:08d},n01440764 1 2 30 40\n" for n in (1, 2, 3))
    path.write_text(f"ImageId,PredictionString\n{rows}")
    return Kind(
        path, (mutate_bytes,), lambda: imagenet._val_labels(root)
    )  # the thousand classes come later


def _stored(root: Path) -> Kind:
    """A prepared data set with a changed manifest."""
    for split, size in (("train", 30), ("val", 31)):
        for name in ("a", "b"):
            (root / "images" / split / name).mkdir(parents=True)
            for n in range(2):
                image = Image.fromarray(np.full((size, size + n, 3), 40 * n, np.uint8))
                image.save(root / "images" / split / name / f"{n}.png")
    out = root / "data" / "x"
    prepare(Folder(source="folder", name="x", path=str(root / "images")), out, jobs=1)

    def read() -> None:
        dataset = open_dataset(out)
        dataset.damaged()
        for name in dataset.manifest["splits"]:
            split = dataset.split(name)
            for row in range(len(split)):
                split.image(row), split.path(row), split.labels[row], split.heights[row]

    return Kind(out / "manifest.json", (mutate_json, mutate_json, mutate_bytes), read)


KINDS: dict[str, Callable[[Path], Kind]] = {
    "coco": _coco,
    "voc-xml": _voc_xml,
    "voc-list": _voc_list,
    "only-listed": _listed,
    "imagenet-csv": _kaggle,
    "manifest": _stored,
}
