"""The sorted, mapped store against a plain dictionary, through merging, repeats and damage."""

import hashlib
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from mochi.data.ingest import verdicts
from mochi.data.ingest.decode import Checked


def verdict(number: int) -> tuple[bytes, Checked]:
    sha256 = hashlib.sha256(str(number).encode()).digest()
    encoded = b"" if number % 5 == 1 else None
    return sha256, Checked("" if number % 3 else f"broken {number}", number, 2, "JPEG", "RGB", encoded)


def test_store_gives_back_what_was_added(tmp_path: Path) -> None:
    rows = [verdict(number) for number in range(300)]
    for first in range(0, 300, 100):
        verdicts.add(tmp_path, rows[first : first + 100])
    verdicts.add(tmp_path, rows[50:150])  # repeats
    verdicts.add(tmp_path, [])
    store = verdicts.open_store(tmp_path)
    assert len(list(verdicts.folder(tmp_path).glob("*.arrow"))) == 1
    assert all(store.get(sha256) == expected for sha256, expected in rows)
    assert store.get(hashlib.sha256(b"unseen").digest()) is None
    assert store.get(b"\xff" * 32) is None
    assert pickle.loads(pickle.dumps(store)).get(rows[7][0]) == rows[7][1]  # noqa: S301 - what a worker gets
    assert verdicts.open_store(tmp_path).path == store.path


def test_hashes_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    rows = [(b"\x00" * 8 + bytes([n]) * 24, Checked("", n, 1, "PNG", "L", None)) for n in range(5)]
    verdicts.add(tmp_path, rows)
    store = verdicts.open_store(tmp_path)
    assert [store.get(sha256) for sha256, _ in rows] == [expected for _, expected in rows]
    assert store.get(b"\x00" * 8 + bytes([9]) * 24) is None


def test_a_damaged_file_is_left_out(tmp_path: Path, caplog) -> None:
    verdicts.add(tmp_path, [verdict(1)])
    verdicts.add(tmp_path, [verdict(2)])
    damaged = sorted(verdicts.folder(tmp_path).iterdir())[0]
    cut = damaged.read_bytes()[:100]
    damaged.write_bytes(cut)
    store = verdicts.open_store(tmp_path)
    assert sum(store.get(verdict(number)[0]) is not None for number in (1, 2)) == 1
    assert "checked again" in caplog.text
    assert damaged.with_suffix(".damaged").read_bytes() == cut


def test_a_store_merged_by_another_run_is_no_error(tmp_path: Path) -> None:
    """A preparation's workers open its store late; a check of the same data root has merged it by then."""
    verdicts.add(tmp_path, [verdict(1)])
    early = verdicts.open_store(tmp_path)
    verdicts.add(tmp_path, [verdict(2)])
    late = verdicts.open_store(tmp_path)
    assert early.get(verdict(1)[0]) is None
    assert late.get(verdict(1)[0]) == verdict(1)[1]


def _use(folder: Path, first: int) -> None:
    for number in range(first, first + 40):
        verdicts.open_store(folder)
        verdicts.add(folder, [verdict(number)])


def test_several_runs_share_a_store(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_use, [tmp_path] * 3, (0, 40, 80)))
    store = verdicts.open_store(tmp_path)
    assert all(store.get(sha256) == expected for sha256, expected in map(verdict, range(120)))


def test_an_empty_cache_knows_nothing(tmp_path: Path) -> None:
    assert verdicts.open_store(tmp_path).get(b"\x00" * 32) is None
