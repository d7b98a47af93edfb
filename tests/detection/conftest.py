"""Tiny annotated images, and the real data sets in the folder MOCHI_REAL_DATA."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mochi import encoders
from mochi.encoders.files import save_encoder
from tests.detection.sets import ENCODER, voc_object


@pytest.fixture
def voc_image(tmp_path: Path) -> Callable[..., Path]:
    """Write one image of 48 x 40 with the objects given; returns the VOC folder."""
    root = tmp_path / "VOC"

    def write(*objects: str, name: str = "one", image_set: str = "train", size: str | None = None) -> Path:
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        stated = (
            "<size><width>48</width><height>40</height><depth>3</depth></size>" if size is None else size
        )
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation>{stated}{''.join(objects)}</annotation>"
        )
        seed = int.from_bytes(name.encode()) % 1000
        pixels = np.random.default_rng(seed).integers(0, 255, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
        with (root / "ImageSets" / "Main" / f"{image_set}.txt").open("a") as listing:
            listing.write(f"{name}\n")
        return root

    return write


@pytest.fixture
def voc_set(voc_image: Callable[..., Path]) -> Path:
    """Six training and five test images with squares and bars; in each split one image without objects."""
    for index in range(6):
        objects = [voc_object("square", (3 + index, 4, 20 + index, 22)), voc_object("bar", (5, 25, 40, 36))]
        root = voc_image(*(objects if index else []), name=f"a{index}")
    for index in range(5):
        root = voc_image(
            *([voc_object("square", (8, 4 + index, 30, 25 + index))] if index else []),
            name=f"b{index}", image_set="test",
        )  # fmt: skip
    return root


@pytest.fixture
def encoder_file(tmp_path: Path) -> Path:
    """A random encoder of ENCODER's architecture."""
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoders.build(ENCODER, seed=5))
    return path


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unpack one archive of real data, or skip."""

    def unpack(archive: str) -> Path:
        root = os.environ.get("MOCHI_REAL_DATA")
        if root is None or not (Path(root) / archive).exists():
            pytest.skip(f"real data {archive} not at hand: set MOCHI_REAL_DATA to the folder that holds it")
        folder = tmp_path_factory.mktemp("real")
        with tarfile.open(Path(root) / archive) as file:
            file.extractall(folder, filter="data")
        return folder

    return unpack
