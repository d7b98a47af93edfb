"""Written data compared with what this and another process read, and messages for missing, truncated and
foreign folders.
"""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mochi.config.datasets import Folder
from mochi.data import format as storage
from mochi.data.format import open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.errors import DataError


@pytest.fixture
def prepared(tree: Path, tmp_path: Path) -> Path:
    out = tmp_path / "data" / "photos"
    prepare(Folder(source="folder", name="photos", path=str(tree)), out, jobs=1)
    return out


def test_rows_are_read_as_they_were_written(prepared: Path, tree: Path) -> None:
    dataset = open_dataset(prepared)
    assert dataset.classes == ["ant", "bee", "cat"]
    split = dataset.split("train")
    assert len(split) == 18
    assert split.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert split.labels.dtype == np.int64
    for row in range(len(split)):
        path = tree / split.path(row)
        assert path.parent.name == dataset.classes[split.labels[row]]
        assert split.encoded(row).to_pybytes() == path.read_bytes()
        assert split.image(row).shape == (split.heights[row], split.widths[row], 3)


def test_a_split_is_pickled_as_a_path(prepared: Path) -> None:
    split = open_dataset(prepared).split("train")
    first = split.image(0)
    data = pickle.dumps(split)
    assert len(data) < 3000
    assert (pickle.loads(data).image(0) == first).all()  # noqa: S301 - what a worker gets


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), r"not found; prepare the data first"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"is not valid JSON"),
        (
            lambda folder: (folder / "manifest.json").write_text('{"version": 99}'),
            r"found version 99; expected 2",
        ),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), r"found version None"),
        (
            lambda folder: (folder / "train-images-0000.arrow").unlink(),
            r"found no file; expected \d+ bytes",
        ),
        (
            lambda folder: (folder / "train-images-0000.arrow").write_bytes(b"cut"),
            r"found 3 bytes; expected \d+ bytes; prepare the data again",
        ),
    ],
)
def test_damaged_folders_say_what_to_do(prepared: Path, damage, message: str) -> None:
    damage(prepared)
    with pytest.raises(DataError, match=message):
        open_dataset(prepared).split("train")


def test_an_unknown_split_lists_the_known_ones(prepared: Path) -> None:
    with pytest.raises(DataError, match=r"found no split 'test'; expected one of: train, val"):
        open_dataset(prepared).split("test")


def test_a_million_rows_need_almost_no_private_memory(tmp_path: Path) -> None:
    """Private memory (resident minus file pages) of a process that reads an index of a million rows."""
    count = 1_000_000
    with (tmp_path / "train-index.arrow").open("wb") as file:
        storage.write_index(
            file,
            np.arange(count) % 1000,
            [f"c/{n}.jpg" for n in range(count)],
            bytes(32 * count),
            np.ones((count, 2), np.int32),
        )
    with (tmp_path / "train-images-0000.arrow").open("wb") as file:
        schema = storage.IMAGE_SCHEMA
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.record_batch([pa.array([b"x"] * count, pa.binary())], schema=schema))
    script = """
import sys, json, random
from pathlib import Path
from mochi.data.format import StoredSplit
def private():
    lines = dict(line.split(':') for line in Path('/proc/self/smaps_rollup').read_text().splitlines()[1:])
    return int(lines['Anonymous'].split()[0])
entry = {'count': 1000000, 'storage': 'encoded', 'shards': [{'file': 'train-images-0000.arrow'}]}
split = StoredSplit(Path(sys.argv[1]), 'train', entry)
rows = random.Random(0).sample(range(1000000), 50000)
before = private()
for row in rows:
    split.labels[row], split.path(row), split.encoded(row), split.heights[row]
print(private() - before)
"""
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("no /proc/self/smaps_rollup: private memory cannot be measured here")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 1000  # kB; one Python object per row would take 30,000 or more


def test_manifest_is_plain_json(prepared: Path) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["splits"]["train"]["classes"] == {"ant": 6, "bee": 6, "cat": 6}
    assert manifest["licence"]
    assert all(len(shard["sha256"]) == 64 for shard in manifest["splits"]["val"]["shards"])
