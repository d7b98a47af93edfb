"""CIFAR, STL-10 and Imagenette from tiny archives in the official layouts, compared with the arrays in
them. The checksums of the tiny archives replace the publishers'.
"""

import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torchvision.datasets as published
from PIL import Image

from mochi.config.datasets import Cifar, Imagenette, Stl10
from mochi.data.format import open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.data.ingest.sources import cifar10, cifar100, imagenette, stl10
from mochi.errors import DataError


def make_archive(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def test_urls_and_checksums_are_torchvisions() -> None:
    assert published.STL10.url in stl10.ARCHIVE.urls
    assert stl10.ARCHIVE.md5 == published.STL10.tgz_md5
    ours = {size: (*archive.urls, archive.md5) for size, archive in imagenette.ARCHIVES.items()}
    assert ours == published.Imagenette._ARCHIVES
    first = {wnid: names[0] for wnid, names in published.Imagenette._WNID_TO_CLASS.items()}
    assert first == imagenette.NAMES


@pytest.mark.parametrize(("source", "module"), [("cifar10", cifar10), ("cifar100", cifar100)])
def test_cifar(source: str, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = module.LAYOUT
    rng = np.random.default_rng(0)
    files, images, labels = {}, {"train": [], "val": []}, {"train": [], "val": []}
    for file in (*layout.train, layout.test):
        split = "val" if file == layout.test else "train"
        fine = rng.integers(0, 3, 4)
        pixels = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
        images[split].append(pixels)
        labels[split].append(fine)
        rows = [
            bytes([9] * (layout.label_bytes - 1) + [label]) + image.transpose(2, 0, 1).tobytes()
            for label, image in zip(fine.tolist(), pixels, strict=True)
        ]
        files[f"{layout.folder}/{file}"] = b"".join(rows)
    files[f"{layout.folder}/{layout.names}"] = b"ant\nbee\ncat\n"
    md5 = make_archive(tmp_path / "c.tar.gz", files)
    monkeypatch.setattr(module, "LAYOUT", replace(layout, archive=replace(layout.archive, md5=md5)))
    options = Cifar(source=source, name=source, archive=str(tmp_path / "c.tar.gz"))
    prepare(options, tmp_path / "data" / source, jobs=1)
    dataset = open_dataset(tmp_path / "data" / source)
    assert dataset.classes == ["ant", "bee", "cat"]
    for split in ("train", "val"):
        stored = dataset.split(split)
        assert (stored.pixels == np.concatenate(images[split])).all()
        assert (stored.labels == np.concatenate(labels[split])).all()
    assert (
        dataset.split("train")
        .path(5 if source == "cifar10" else 3)
        .endswith("#1" if source == "cifar10" else "#3")
    )


def test_unlabelled_rows_of_stl10_have_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (count, 96, 96, 3), dtype=np.uint8) for name, count in
              (("train", 5), ("unlabeled", 7), ("test", 3))}  # fmt: skip
    files = {
        f"stl10_binary/{name}_X.bin": pixels.transpose(0, 3, 2, 1).tobytes()
        for name, pixels in images.items()
    }
    files |= {
        "stl10_binary/train_y.bin": bytes([1, 2, 10, 2, 1]),
        "stl10_binary/test_y.bin": bytes([10, 1, 2]),
    }
    files["stl10_binary/class_names.txt"] = "\n".join("abcdefghij").encode()
    md5 = make_archive(tmp_path / "s.tar.gz", files)
    monkeypatch.setattr(stl10, "ARCHIVE", replace(stl10.ARCHIVE, md5=md5))
    options = Stl10(source="stl10", name="stl10", archive=str(tmp_path / "s.tar.gz"))
    manifest = prepare(options, tmp_path / "data" / "stl10", jobs=1)
    train = open_dataset(tmp_path / "data" / "stl10").split("train")
    assert train.labels.tolist() == [0, 1, 9, 1, 0, *[-1] * 7]
    assert train.labelled.tolist() == [0, 1, 2, 3, 4]
    assert manifest["splits"]["train"]["unlabelled"] == 7
    assert (train.pixels == np.concatenate([images["train"], images["unlabeled"]])).all()
    assert (open_dataset(tmp_path / "data" / "stl10").split("val").pixels == images["test"]).all()


def test_imagenette(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Callable[..., Image.Image]
) -> None:
    files = {}
    for split in ("train", "val"):
        for seed, wnid in enumerate(imagenette.NAMES):
            buffer = io.BytesIO()
            picture(seed, 160, 170 + seed).save(buffer, "JPEG")
            files[f"imagenette2-160/{split}/{wnid}/x_{seed}.JPEG"] = buffer.getvalue()
    options = Imagenette(source="imagenette", name="i", size="160px", archive=str(tmp_path / "i.tgz"))
    known = imagenette.ARCHIVES["160px"]
    md5 = make_archive(tmp_path / "i.tgz", files)
    monkeypatch.setitem(imagenette.ARCHIVES, "160px", replace(known, md5=md5))
    prepare(options, tmp_path / "data" / "i", jobs=1)
    dataset = open_dataset(tmp_path / "data" / "i")
    assert dataset.classes[:2] == ["tench", "English springer"]
    assert dataset.split("train").labels.tolist() == list(range(10))

    del files["imagenette2-160/train/n01440764/x_0.JPEG"], files["imagenette2-160/val/n01440764/x_0.JPEG"]
    md5 = make_archive(tmp_path / "i.tgz", files)
    monkeypatch.setitem(imagenette.ARCHIVES, "160px", replace(known, md5=md5))
    with pytest.raises(DataError, match="n01440764"):
        prepare(options, tmp_path / "other" / "i", jobs=1)


def test_a_file_missing_from_cifar_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = cifar10.LAYOUT
    md5 = make_archive(tmp_path / "c.tar.gz", {f"{layout.folder}/{layout.names}": b"a b"})
    monkeypatch.setattr(cifar10, "LAYOUT", replace(layout, archive=replace(layout.archive, md5=md5)))
    options = Cifar(source="cifar10", name="c", archive=str(tmp_path / "c.tar.gz"))
    with pytest.raises(DataError, match=r"found no cifar-10-batches-bin/data_batch_1.bin in it"):
        prepare(options, tmp_path / "data" / "c", jobs=1)


def test_names_of_archives_are_torchvisions() -> None:
    import torchvision

    assert stl10.ARCHIVE.md5 == torchvision.datasets.STL10.tgz_md5
    assert {size: archive.file for size, archive in imagenette.ARCHIVES.items()} == {
        "full": "imagenette2.tgz", "320px": "imagenette2-320.tgz", "160px": "imagenette2-160.tgz",
    }  # fmt: skip
