"""Tiny versions of ImageNet's layouts: the official archives (nested archives, flat validation images,
tables of the devkit) and the extracted tree give the same rows; missing files are named.
"""

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mochi.config.datasets import ImageNet
from mochi.data.format import StoredDataset, open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.data.ingest.sources import imagenet
from mochi.errors import DataError

WNIDS = ["n03000001", "n01000002", "n02000003"]  # in the order of ILSVRC numbers, not sorted


@pytest.fixture
def jpegs(picture: Callable[..., Image.Image]) -> dict[str, bytes]:
    """wnid/name -> bytes: 3 training images of each class, then the flat validation images."""
    images = {}
    for label, wnid in enumerate(WNIDS):
        for number in range(3):
            images[f"{wnid}/{wnid}_{number}.JPEG"] = picture(10 * label + number, 40, 50 + number)
    for number in range(1, 5):
        images[f"ILSVRC2012_val_{number:08d}.JPEG"] = picture(100 + number, 41, 50 + number)
    encoded = {}
    for name, image in images.items():
        buffer = io.BytesIO()
        image.save(buffer, "JPEG")
        encoded[name] = buffer.getvalue()
    return encoded


VAL = [2, 1, 3, 2]  # ILSVRC numbers of the validation images


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def devkit() -> bytes:
    kind = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    rows = [(n, wnid, "word, other", "gloss", 0) for n, wnid in enumerate(WNIDS, 1)]
    rows.append((4, "n09999999", "an inner node", "gloss", 3))
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=kind)})
    numbers = "\n".join(map(str, VAL)).encode()
    inner = "ILSVRC2012_devkit_t12/data/"
    return tar_of(
        {inner + "meta.mat": buffer.getvalue(), inner + "ILSVRC2012_validation_ground_truth.txt": numbers},
        "w:gz",
    )


def write_archives(root: Path, jpegs: dict[str, bytes]) -> None:
    root.mkdir()
    classes = {}
    for wnid in sorted(WNIDS):
        inner = {name.split("/")[1]: data for name, data in jpegs.items() if name.startswith(wnid)}
        classes[f"{wnid}.tar"] = tar_of(inner)
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(classes))
    flat = {name: data for name, data in jpegs.items() if "/" not in name}
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of(flat))
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())


def write_tree(root: Path, jpegs: dict[str, bytes], flat_val: str | None = None) -> None:
    for name, data in jpegs.items():
        number = int(name[-13:-5]) - 1 if "/" not in name else None
        if number is None:
            path = root / "train" / name
        elif flat_val is None:
            path = root / "val" / WNIDS[VAL[number] - 1] / name
        else:
            path = root / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    if flat_val == "kaggle":
        lines = [f"ILSVRC2012_val_{n:08d},{WNIDS[c - 1]} 1 2 3 4 " for n, c in enumerate(VAL, 1)]
        (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]))
    if flat_val == "devkit":
        (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())


def rows(dataset: StoredDataset, split: str) -> list[tuple[str, bytes]]:
    stored = dataset.split(split)
    return sorted(
        (dataset.classes[stored.labels[row]], stored.encoded(row).to_pybytes())
        for row in range(len(stored))
    )


def options(root: Path, subset: str = "all") -> ImageNet:
    return ImageNet(source="imagenet", name="in", path=str(root), subset=subset)


@pytest.mark.parametrize("layout", ["archives", "tree", "kaggle", "devkit"])
def test_every_layout_gives_the_same_rows(
    layout: str, jpegs: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagenet, "_CLASSES", 3)
    root = tmp_path / "imagenet"
    if layout == "archives":
        write_archives(root, jpegs)
    else:
        write_tree(root, jpegs, None if layout == "tree" else layout)
    prepare(options(root), tmp_path / "data" / "in", jobs=1)
    dataset = open_dataset(tmp_path / "data" / "in")
    assert dataset.classes == sorted(WNIDS)
    assert rows(dataset, "train") == sorted(
        (name.split("/")[0], jpegs[name]) for name in jpegs if "/" in name
    )
    flat = sorted(name for name in jpegs if "/" not in name)
    assert rows(dataset, "val") == sorted(
        (WNIDS[number - 1], jpegs[name]) for name, number in zip(flat, VAL, strict=True)
    )


def test_imagenet100_uses_its_classes_and_names_missing_ones(
    jpegs: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "imagenet"
    write_tree(root, jpegs)
    with pytest.raises(
        DataError, match=r"100 of the 100 classes of imagenet100 have no image in train: n0"
    ):
        prepare(options(root, "imagenet100"), tmp_path / "data" / "in", jobs=1)
    monkeypatch.setattr(imagenet, "imagenet100", lambda: sorted(WNIDS[:2]))
    manifest = prepare(options(root, "imagenet100"), tmp_path / "data" / "in", jobs=1)
    assert manifest["classes"] == sorted(WNIDS[:2])
    assert manifest["splits"]["train"]["count"] == 6
    assert manifest["splits"]["val"]["count"] == 3
    monkeypatch.setattr(imagenet, "imagenet100", lambda: [*WNIDS, "n07777777"])
    with pytest.raises(
        DataError, match=r"1 of the 4 classes .*: n07777777; the extraction is not complete"
    ):
        prepare(options(root, "imagenet100"), tmp_path / "data" / "in", jobs=1)


def test_an_incomplete_val_is_refused(jpegs: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    write_tree(root, jpegs)
    shutil.rmtree(root / "val" / WNIDS[2])
    with pytest.raises(DataError, match=rf"1 of the 3 classes .* in val: {WNIDS[2]}; the extraction"):
        prepare(options(root), tmp_path / "data" / "in", jobs=1)


def test_a_hidden_folder_in_a_flat_val_is_not_a_class(
    jpegs: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagenet, "_CLASSES", 3)
    root = tmp_path / "imagenet"
    write_tree(root, jpegs, "kaggle")
    (root / "val" / ".ipynb_checkpoints").mkdir()
    manifest = prepare(options(root), tmp_path / "data" / "in", jobs=1)
    assert manifest["splits"]["val"]["count"] == len(VAL)
    assert manifest["ignored"] == {"hidden or system file": 1}


def test_the_imagenet100_list_is_complete() -> None:
    names = imagenet.imagenet100()
    assert len(set(names)) == 100
    assert names == sorted(names)
    assert {"n02869837", "n01749939"} <= set(names)


def test_incomplete_extractions_are_reported(jpegs: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    with pytest.raises(DataError, match="no such folder"):
        prepare(options(root), tmp_path / "x", jobs=1)
    root.mkdir()
    with pytest.raises(DataError, match=r"found neither train/ nor ILSVRC2012_img_train.tar"):
        prepare(options(root), tmp_path / "x", jobs=1)
    write_tree(root, jpegs, "unlabelled")
    with pytest.raises(DataError, match=r"no class folders and no label file; put ILSVRC2012_devkit"):
        prepare(options(root), tmp_path / "x", jobs=1)
    write_tree(root, {}, "devkit")
    with pytest.raises(DataError, match=r"found 3 classes, expected 1000"):
        prepare(options(root), tmp_path / "x", jobs=1)
    (root / "val" / "holiday.JPEG").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holiday.JPEG is not a validation image of ILSVRC 2012"):
        prepare(options(root), tmp_path / "x", jobs=1)
