"""Versions of a result in DVC's cache: the current one is restored."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mochi.provenance.dvc_cache import restore, versions
from mochi.provenance.record import Stopwatch, write_record
from mochi.provenance.wanted import Result


class Store:
    """A cache as DVC writes it, and the results of one experiment."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.tracked = folder / "results/evaluations"
        self.encoder = folder / "encoder"
        self.encoder.write_bytes(b"weights")

    def result(self, k: int, method: str = "moco-v2") -> Result:
        return Result(
            stage="knn",
            label=f"{method} seed 0 knn",
            folder=self.tracked / method / "seed0/knn",
            outputs=("metrics.json",),
            settings={"k": k},
            inputs={"encoder": self.encoder},
            modules=("mochi.evaluation.tasks.knn",),
        )

    def compute(self, result: Result, **metrics: Any) -> None:
        result.folder.mkdir(parents=True, exist_ok=True)
        (result.folder / "metrics.json").write_text(json.dumps(metrics))
        write_record(result.folder, result, Stopwatch())

    def commit(self) -> None:
        """`dvc commit` of the folder of all evaluations."""
        files = [path for path in self.tracked.rglob("*") if path.is_file()]
        entries = [
            {"md5": self._store(path.read_bytes()), "relpath": path.relative_to(self.tracked).as_posix()}
            for path in files
        ]
        self._store(json.dumps(entries).encode(), ".dir")

    def _store(self, content: bytes, suffix: str = "") -> str:
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        path = self.cache / "files/md5" / md5[:2] / f"{md5[2:]}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o444)
        return md5


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two versions in the cache, with `k` 5 and 4; the results folder has the second."""
    store = Store(tmp_path)
    for k in (5, 4):
        store.compute(store.result(k), top1=float(k))
        store.commit()
    return store


def metrics(result: Result) -> Any:
    return json.loads((result.folder / "metrics.json").read_text())


@pytest.mark.parametrize("removed", [False, True])
def test_the_version_with_the_wanted_settings_is_restored(store: Store, removed: bool) -> None:
    wanted = store.result(5)
    if removed:
        shutil.rmtree(store.tracked)
    assert wanted.why_stale() is not None
    assert restore(wanted, versions(store.cache))
    assert wanted.why_stale() is None
    assert metrics(wanted) == {"top1": 5.0}
    (wanted.folder / "metrics.json").write_text("a copy, not a link to the cache")
    shutil.rmtree(store.tracked)
    assert restore(store.result(4), versions(store.cache))


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"k": 3}},
        {"modules": ("mochi.contrast",)},
        {"stage": "prepare"},
        {"outputs": ("metrics.json", "features.npy")},
    ],
)
def test_without_a_matching_version_nothing_is_restored(store: Store, change: dict[str, Any]) -> None:
    assert not restore(replace(store.result(5), **change), versions(store.cache))
    assert metrics(store.result(4)) == {"top1": 4.0}, "existing files stay"


def test_results_of_another_row_do_not_match(store: Store) -> None:
    assert not restore(store.result(5, "mochi"), versions(store.cache))


def test_results_of_another_encoder_do_not_match(store: Store) -> None:
    store.encoder.write_bytes(b"other weights")
    assert not restore(store.result(5), versions(store.cache))


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_a_version_with_a_lost_object_is_skipped(store: Store, damage: str) -> None:
    content = b'{"top1": 5.0}'
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    path = store.cache / "files/md5" / md5[:2] / md5[2:]
    assert path.read_bytes() == content
    path.unlink()
    if damage == "corrupt":
        path.write_bytes(b'{"top1": 99.0}')
    assert not restore(store.result(5), versions(store.cache))
    assert metrics(store.result(4)) == {"top1": 4.0}


@pytest.mark.parametrize("content", [b"", b"[{", b"{}x", b"[1]", b'[{"md5": "00"}]', b"null", b"\xff\xff"])
def test_a_damaged_list_of_another_folder_is_skipped(store: Store, content: bytes) -> None:
    (store.cache / "files/md5/00").mkdir(exist_ok=True)
    (store.cache / "files/md5/00/0.dir").write_bytes(content)
    assert restore(store.result(5), versions(store.cache))


def test_without_dvc_nothing_is_restored(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither outside a DVC project nor if DVC is not installed."""
    monkeypatch.chdir(tmp_path)
    assert not restore(store.result(5), versions())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not restore(store.result(5), versions())
