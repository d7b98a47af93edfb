"""The photographs in the packages scikit-image and scikit-learn: nothing is downloaded.

Each photograph is divided into a grid of cells. Each cell belongs to train or to val, so the
splits share no pixel.
"""

import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mochi.data.ingest import decode
from mochi.data.views import counter_rng
from mochi.errors import DataError
from mochi.extras import not_installed

GRID = 4
"""Cells along each side; one cell of every row and column is validation."""

LICENCE = (
    "as in the packages: skimage/data/README.txt (public domain, CC0, CC BY), "
    "sklearn/datasets/images/README.txt (CC BY 2.0)"
)


@dataclass(frozen=True)
class Photograph:
    """A file inside an installed package, pinned by content."""

    name: str
    package: str
    path: str
    sha256: str


PHOTOGRAPHS = (
    Photograph(
        "astronaut",
        "skimage",
        "data/astronaut.png",
        "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    ),
    Photograph(
        "brick",
        "skimage",
        "data/brick.png",
        "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
    ),
    Photograph(
        "camera",
        "skimage",
        "data/camera.png",
        "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
    ),
    Photograph(
        "chelsea",
        "skimage",
        "data/chelsea.png",
        "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    ),
    Photograph(
        "coffee",
        "skimage",
        "data/coffee.png",
        "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    ),
    Photograph(
        "coins",
        "skimage",
        "data/coins.png",
        "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
    ),
    Photograph(
        "grass",
        "skimage",
        "data/grass.png",
        "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
    ),
    Photograph(
        "gravel",
        "skimage",
        "data/gravel.png",
        "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
    ),
    Photograph(
        "hubble_deep_field",
        "skimage",
        "data/hubble_deep_field.jpg",
        "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
    ),
    Photograph(
        "ihc",
        "skimage",
        "data/ihc.png",
        "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
    ),
    Photograph(
        "moon",
        "skimage",
        "data/moon.png",
        "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577",
    ),
    Photograph(
        "motorcycle",
        "skimage",
        "data/motorcycle_left.png",
        "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    ),
    Photograph(
        "retina",
        "skimage",
        "data/retina.jpg",
        "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
    ),
    Photograph(
        "rocket",
        "skimage",
        "data/rocket.jpg",
        "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    ),
    Photograph(
        "china",
        "sklearn",
        "datasets/images/china.jpg",
        "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    ),
    Photograph(
        "flower",
        "sklearn",
        "datasets/images/flower.jpg",
        "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    ),
)


@dataclass(frozen=True)
class Cell:
    """A rectangle of a photograph, in pixels."""

    top: int
    left: int
    height: int
    width: int


def load(photograph: Photograph) -> NDArray[np.uint8]:
    """(H, W, 3) RGB; grey photographs get three equal channels.

    Raises:
        DataError: the package lacks the file, or its content differs.
    """
    found = importlib.util.find_spec(photograph.package)
    distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[photograph.package]
    if found is None or found.origin is None:
        raise DataError(not_installed(photograph.package))
    path = Path(found.origin).parent / photograph.path
    version = f"{distribution} {importlib.metadata.version(distribution)}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read from {version}: {error.strerror}") from None
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != photograph.sha256:
        raise DataError(
            f"{path}: found sha256 {sha256[:12]} in {version}; expected {photograph.sha256[:12]}; "
            "install the versions of requirements.lock"
        )
    return np.asarray(decode.to_rgb(decode.open_image(data)))


def cells(height: int, width: int, *, seed: int, photo: int, split: str) -> list[Cell]:
    """The cells of one photograph that belong to `split` (train or val)."""
    column = counter_rng.permutation(GRID, "cells", seed, photo)
    rows = np.linspace(0, height, GRID + 1).astype(int)
    columns = np.linspace(0, width, GRID + 1).astype(int)
    return [
        Cell(int(rows[i]), int(columns[j]), int(rows[i + 1] - rows[i]), int(columns[j + 1] - columns[j]))
        for i in range(GRID)
        for j in range(GRID)
        if (column[i] == j) == (split == "val")
    ]
