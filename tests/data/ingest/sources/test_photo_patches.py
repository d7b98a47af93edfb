"""Patches compared with the photographs they are cut from: the right pixels, one cell, no pixel in both
splits.
"""

from pathlib import Path

import numpy as np
import pytest

from mochi.config.datasets import PhotoPatches
from mochi.data import photographs
from mochi.data.format import open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.data.photographs import PHOTOGRAPHS, cells, load
from mochi.errors import DataError

OPTIONS = PhotoPatches(
    source="photo-patches", name="pp", patch_size=24, train_per_photo=20, val_per_photo=6, seed=3
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "pp"
    prepare(OPTIONS, out, jobs=1)
    return out


def corner(path: str) -> tuple[int, int]:
    left, top = path.split("#")[1].split(",")
    return int(top), int(left)


def test_patches_are_cut_from_one_cell_of_their_photograph(prepared: Path) -> None:
    dataset = open_dataset(prepared)
    assert len(dataset.classes) == 16
    for name, count in (("train", 20), ("val", 6)):
        split = dataset.split(name)
        assert np.bincount(split.labels).tolist() == [count] * 16
        for photo in range(16):
            picture = load(PHOTOGRAPHS[photo])
            own = cells(*picture.shape[:2], seed=3, photo=photo, split=name)
            corners = set()
            for row in np.flatnonzero(split.labels == photo):
                top, left = corner(split.path(row))
                corners.add((top, left))
                assert (split.image(row) == picture[top : top + 24, left : left + 24]).all()
                assert any(
                    cell.top <= top
                    and cell.left <= left
                    and top + 24 <= cell.top + cell.height
                    and left + 24 <= cell.left + cell.width
                    for cell in own
                )
            assert len(corners) == count


def test_cells_tile_the_photograph_and_the_splits_are_disjoint() -> None:
    seen = np.zeros((103, 201), int)
    for split, mark in (("train", 1), ("val", 100)):
        for cell in cells(103, 201, seed=0, photo=5, split=split):
            seen[cell.top : cell.top + cell.height, cell.left : cell.left + cell.width] += mark
    assert set(np.unique(seen)) == {1, 100}
    assert 0.2 < (seen == 100).mean() < 0.3


def test_the_same_seed_gives_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again" / "pp", tmp_path / "other" / "pp"
    prepare(OPTIONS, again, jobs=1)
    prepare(OPTIONS.model_copy(update={"seed": 4}), other, jobs=1)
    for path in prepared.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    pixels = "train-images.npy"
    assert (prepared / pixels).read_bytes() != (other / pixels).read_bytes()


def test_no_patch_is_flat(prepared: Path) -> None:
    pixels = open_dataset(prepared).split("train").pixels
    assert pixels is not None
    assert pixels.mean(axis=3).std(axis=(1, 2)).min() >= 2


def test_a_photograph_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = photographs.Photograph("astronaut", "skimage", "data/astronaut.png", "0" * 64)
    with pytest.raises(
        DataError, match=r"astronaut.png: found sha256 .* in scikit-image .*; expected 0000"
    ):
        load(other)
    with pytest.raises(DataError, match=r"gone.png: cannot be read from scikit-image"):
        load(photographs.Photograph("gone", "skimage", "data/gone.png", "0" * 64))


@pytest.mark.parametrize("change", [{"patch_size": 200}, {"val_per_photo": 10**6}])
def test_more_patches_than_positions_are_refused(change: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found \d+ positions .*; expected \d+; lower patch_size or"):
        prepare(OPTIONS.model_copy(update=change), tmp_path / "pp", jobs=1)
