"""Generated pictures, and access to real ones."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """A smooth colourful picture, different for each seed; noise would hide the effect of resampling."""

    def make(seed: int = 0, height: int = 24, width: int = 32) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return make


@pytest.fixture
def tree(tmp_path: Path, picture: Callable[..., Image.Image]) -> Path:
    """train and val with three classes of JPEGs of different sizes."""
    root = tmp_path / "photos"
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("ant", "bee", "cat")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                seed = 1000 * label + 10 * number + (split == "val")
                image = picture(seed, 40 + 3 * number, 56 - 2 * label)
                image.save(folder / f"{number}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unpack an archive of MOCHI_REAL_DATA once; skip if there is none."""
    unpacked: dict[str, Path] = {}

    def unpack(name: str) -> Path:
        root = os.environ.get("MOCHI_REAL_DATA")
        if root is None:
            pytest.skip(f"MOCHI_REAL_DATA is not set: it names the folder of {name}")
        if name not in unpacked:
            unpacked[name] = tmp_path_factory.mktemp("real")
            with tarfile.open(Path(root) / name) as archive:
                archive.extractall(unpacked[name], filter="data")
        return unpacked[name]

    return unpack
