"""Two prepared data sets of different storage."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mochi.data.ingest.prepare import prepare
from tests.gpu.runs import experiment


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes of JPEGs of different sizes, which are stored encoded."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 36), ("val", 4)):
        for label in ("ant", "bee"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
                coarse.resize((20 + number % 5, 24), Image.Resampling.BICUBIC).save(
                    folder / f"{number}.jpg"
                )
    return root


@pytest.fixture(scope="module")
def data(photos: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Storage -> a prepared data set: pixels, which are kept on the GPU, and JPEGs."""
    folder = tmp_path_factory.mktemp("data") / "jpegs"
    prepare(experiment("jpegs", photos=photos).dataset, folder, jobs=1)
    return {"pixels": tiny_data, "jpegs": folder}
