"""The data benchmark at minimal size: every part runs, and a data set repeated a thousand times reads
like the original. Its numbers are not tested.
"""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.data import loaders, memory, preparation, views
from benchmarks.data.pictures import make_pictures, prepared, repeated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 256 JPEGs and 512 small PNGs."""
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, 256)
    return folder


def names(lines: list[str]) -> list[str]:
    """The alternatives of a table below its title and header, without the last line."""
    return [line.split("  ")[0] for line in lines[2:-1]]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a few images; the sizes of the views stay."""
    monkeypatch.setattr(views, "_BATCH_AT_32_PX", 16)
    monkeypatch.setattr(views, "_BATCH_AT_224_PX", 4)
    monkeypatch.setattr(loaders, "_SIZES", {"small": (32, 16), "photos": (224, 4)})


def test_views(folder: Path) -> None:
    small = views.small(1)
    assert names(small) == ["ours", "torchvision v2, 8-bit tensors", "torchvision v2, Pillow images"]
    assert "views/s" in small[1]
    large = views.large(folder, 1)
    assert names(large)[1:] == [
        "Pillow and torchvision, one decode per image",
        "Pillow and torchvision, one decode per view",
    ]


def few(folder: Path, name: str, count: int, out: Path) -> Path:
    """A folder with `count` pictures of `folder / name`."""
    images = out / name / "train" / "any"
    images.mkdir(parents=True)
    for path in sorted((folder / name).rglob("*.*g"))[:count]:
        (images / path.name).hardlink_to(path)
    return out


@pytest.mark.parametrize(("name", "batch"), [("small", 16), ("photos", 4)])
def test_loaders(folder: Path, tmp_path: Path, name: str, batch: int) -> None:
    lines = loaders.epochs(name, few(folder, name, batch, tmp_path / "few"), 1, cores=1)
    assert names(lines)[:2] == ["ours", "a DataLoader with torchvision"]


def test_preparation(folder: Path, tmp_path: Path) -> None:
    lines = preparation.run(few(folder, "photos", 16, tmp_path / "few"), 1, jobs=1)
    assert lines[0] == "Preparation of 128 JPEGs of 500 x 375, 1 processes"
    assert names(lines) == ["ours", "a bare decode loop"]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc")
def test_memory(folder: Path, tmp_path: Path) -> None:
    lines = memory.run(prepared(folder, "photos"), tmp_path, num_epochs=2, num_rows=2_600)
    assert [line.split(":")[0] for line in lines[1:]][:2] == [
        "loader and 2 workers, resident",
        "a worker, private, the largest of 1",
    ]
    assert "2,560 rows" in lines[2]


def test_a_repeated_data_set_reads_like_the_original(folder: Path, tmp_path: Path) -> None:
    split = prepared(folder, "photos")
    many = repeated(split, 10, tmp_path / "many")
    assert len(many) == 2560
    assert many.encoded(256 * 7 + 5).equals(split.encoded(5))
    assert (many.heights == np.tile(split.heights, 10)).all()
    assert many.path(256 * 7 + 5) == f"7/{split.path(5)}"
