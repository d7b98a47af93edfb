"""Prepared folders, compared file by file with their source. Neither the number of processes, nor an
interruption, nor a second run changes a byte.

The edge cases are those that users reported: hidden files, empty classes, loops of links, unusual names.
"""

import csv
import errno
import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from mochi.config.datasets import Dataset, Folder
from mochi.data.format import open_dataset
from mochi.data.ingest import decode, files, sources, validate, write
from mochi.data.ingest.prepare import prepare
from mochi.data.ingest.raw import ByteRange
from mochi.errors import DataError
from mochi.storage.atomic import StorageError
from tests import full_disk

PREPARE = "mochi.data.ingest.prepare"  # as a name of its package it is the function

Picture = Callable[..., Image.Image]


def folder(path: Path, **options: object) -> Folder:
    return Folder(source="folder", name="photos", path=str(path), **options)


def contents(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def rows_of(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def test_every_source_has_a_section_and_a_module() -> None:
    sections = get_args(get_args(Dataset)[0])
    named = {name for section in sections for name in get_args(section.model_fields["source"].annotation)}
    modules = {module.name for module in pkgutil.iter_modules(sources.__path__)}
    assert {name.replace("-", "_") for name in named} == modules
    for module in modules:
        assert callable(importlib.import_module(f"{sources.__name__}.{module}").collect)


def test_processes_and_repetition_change_no_byte(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "_SERIAL_LIMIT", 0)
    monkeypatch.setattr(validate, "_FILES_PER_TASK", 4)
    one, two = (tmp_path / name / "photos" for name in ("one", "two"))
    prepare(folder(tree), one, jobs=1)
    first = contents(one)
    prepare(folder(tree), two, jobs=2)
    prepare(folder(tree), one, jobs=1)
    assert contents(one) == contents(two) == first


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system"), NotImplementedError()])
def test_one_process_decodes_if_the_host_has_no_semaphores(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:  # fmt: skip
    """Shared memory is read-only or missing in some containers."""

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(validate, "ProcessPoolExecutor", refuse)
    monkeypatch.setattr(validate, "_SERIAL_LIMIT", 0)
    assert prepare(folder(tree), tmp_path / "photos", jobs=2)["splits"]["train"]["count"] == 18
    assert "this process decodes alone" in caplog.text


def test_shards_are_bounded_and_random_access_crosses_them(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data" / "photos"
    manifest = prepare(folder(tree), out, jobs=1, shard_bytes=5000)
    shards = [file for file in manifest["splits"]["train"]["shards"] if "images" in file["file"]]
    assert len(shards) > 3
    assert max(file["bytes"] for file in shards) < 5000 + 3000 + 1000
    split = open_dataset(out).split("train")
    for row in (17, 0, 9):
        assert split.encoded(row).to_pybytes() == (tree / split.path(row)).read_bytes()


def test_small_images_of_one_size_become_one_array(picture: Picture, tmp_path: Path) -> None:
    root = tmp_path / "small"
    (root / "train" / "a").mkdir(parents=True)
    for seed in range(5):
        picture(seed, 16, 16).save(root / "train" / "a" / f"{seed}.png")
    out = tmp_path / "data" / "small"
    manifest = prepare(folder(root), out, jobs=1)
    assert manifest["splits"]["train"]["storage"] == "pixels"
    assert sorted(path.name for path in out.glob("train-*")) == ["train-images.npy", "train-index.arrow"]
    pixels = open_dataset(out).split("train").pixels
    assert pixels is not None
    assert pixels.shape == (5, 16, 16, 3)
    assert all((pixels[seed] == np.asarray(picture(seed, 16, 16))).all() for seed in range(5))


def test_a_new_preparation_removes_the_files_of_the_old_one(
    tree: Path, picture: Picture, tmp_path: Path
) -> None:
    out = tmp_path / "data" / "photos"
    prepare(folder(tree), out, jobs=1, shard_bytes=5000)
    shutil.rmtree(tree)
    (tree / "train" / "a").mkdir(parents=True)
    picture(0, 16, 16).save(tree / "train" / "a" / "0.png")
    prepare(folder(tree), out, jobs=1)
    listed = {file["file"] for file in open_dataset(out).manifest["splits"]["train"]["shards"]}
    reports = {"manifest.json", "quarantine.csv", "duplicates.csv"}
    assert listed == {path.name for path in out.iterdir()} - reports


def test_unreadable_files_are_quarantined_and_named(tree: Path, tmp_path: Path) -> None:
    bad = tree / "train" / "ant"
    (bad / "zero.jpg").touch()
    (bad / "page.jpg").write_text("<html>404</html>")
    (bad / "cut.jpg").write_bytes((whole := (bad / "0.jpg").read_bytes())[: len(whole) * 3 // 5])
    (bad / "packed.jpg").write_bytes(b"\x1f\x8b\x08" + bytes(30))
    out = tmp_path / "data" / "photos"
    with pytest.raises(DataError, match=r"4 of 31 files are unreadable, more than max_unreadable = 0.01"):
        prepare(folder(tree), out, jobs=1)
    assert not (out / "manifest.json").exists()
    manifest = prepare(folder(tree, max_unreadable=0.2), out, jobs=1)
    assert manifest["quarantined"] == 4
    rows = {Path(path).name: (int(size), reason) for path, size, reason in rows_of(out / "quarantine.csv")}
    for name, reason in (
        ("cut.jpg", "JPEG does not decode: "),
        ("packed.jpg", "gzip data, not an image"),
        ("page.jpg", "HTML or XML text, not an image"),
        ("zero.jpg", "empty file (0 bytes)"),
    ):
        assert rows[name][0] == (bad / name).stat().st_size
        assert rows[name][1].startswith(reason)
    assert len(open_dataset(out).split("train")) == 18


def test_a_palette_image_without_its_palette_is_quarantined(tree: Path, tmp_path: Path) -> None:
    """Pillow stops at an assertion."""
    broken = tree / "train" / "cat" / "broken.png"
    Image.new("P", (4, 4)).save(broken)
    data = broken.read_bytes()
    start = data.index(b"PLTE") - 4
    length = int.from_bytes(data[start : start + 4], "big") + 12
    broken.write_bytes(data[:start] + data[start + length :])
    prepare(folder(tree, max_unreadable=0.2), tmp_path / "out", jobs=1)
    (row,) = [row for row in rows_of(tmp_path / "out" / "quarantine.csv") if "broken.png" in str(row)]
    assert "breaks the rules of its format" in str(row)


def test_a_file_without_permission_is_quarantined(tree: Path, tmp_path: Path, monkeypatch) -> None:
    def refuse(part: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(validate, "_read", refuse)
    with pytest.raises(DataError, match=r"27 of 27 .* cannot be read: Permission denied"):
        prepare(folder(tree), tmp_path / "data" / "photos", jobs=1)


def test_hidden_and_foreign_files_are_ignored_and_counted(tree: Path, tmp_path: Path) -> None:
    (tree / ".DS_Store").write_bytes(b"x")
    (tree / "train" / ".ipynb_checkpoints").mkdir()
    (tree / "train" / ".ipynb_checkpoints" / "0-checkpoint.jpg").write_bytes(b"x")
    (tree / "train" / "ant" / "._0.jpg").write_bytes(b"x")
    (tree / "train" / "ant" / "Thumbs.db").write_bytes(b"x")
    (tree / "train" / "labels.csv").write_text("x")
    (tree / "README.md").write_text("x")
    (tree / "train" / "ant" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    manifest = prepare(folder(tree), tmp_path / "data" / "photos", jobs=1)
    assert manifest["classes"] == ["ant", "bee", "cat"]
    assert manifest["ignored"] == {
        "broken link or not a regular file": 1, "hidden or system file": 4, "not an image by its suffix": 2,
    }  # fmt: skip


def test_an_empty_class_keeps_its_number(tree: Path, tmp_path: Path) -> None:
    shutil.rmtree(tree / "train" / "bee")
    (tree / "train" / "bee").mkdir()
    manifest = prepare(folder(tree), tmp_path / "data" / "photos", jobs=1)
    assert manifest["classes"] == ["ant", "bee", "cat"]
    assert manifest["splits"]["train"]["classes"] == {"ant": 6, "bee": 0, "cat": 6}
    assert set(open_dataset(tmp_path / "data" / "photos").split("train").labels) == {0, 2}


@pytest.mark.parametrize(
    "make", [lambda root: None, lambda root: (root / "train" / "a").mkdir(parents=True)]
)
def test_a_folder_without_images_is_refused_with_what_was_expected(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    make(root)
    with pytest.raises(DataError, match=r"empty: found 0 images; expected .* train/<class>/"):
        prepare(folder(root), tmp_path / "out", jobs=1)
    with pytest.raises(DataError, match="no such folder"):
        prepare(folder(tmp_path / "nothing"), tmp_path / "out", jobs=1)


def test_unlabelled_images(tree: Path, picture: Picture, tmp_path: Path) -> None:
    """Images in `unlabeled/`, next to or in train, have no label; other trees are one unlabelled split."""
    for place in (tree / "unlabeled", tree / "train" / "unlabeled"):
        place.mkdir()
        picture(5, 30, 30).save(place / "x.jpg")
    manifest = prepare(folder(tree), tmp_path / "a" / "photos", jobs=1)
    assert manifest["classes"] == ["ant", "bee", "cat"]
    assert manifest["splits"]["train"]["unlabelled"] == 2
    nested = tmp_path / "nested"
    (nested / "2024" / "may").mkdir(parents=True)
    for seed in range(5):
        picture(seed, 30, 30 + seed).save(nested / "2024" / ("may" if seed % 2 else "") / f"{seed}.jpg")
    manifest = prepare(folder(nested), tmp_path / "b" / "nested", jobs=1)
    assert manifest["classes"] == []
    assert manifest["splits"]["train"]["count"] == manifest["splits"]["train"]["unlabelled"] == 5


@pytest.mark.parametrize("case", [str.upper, str.title])
def test_split_folders_are_recognised_in_any_case(
    case: Callable[[str], str], tree: Path, tmp_path: Path
) -> None:
    """`Val/` was once used for pretraining, as one more folder of an unlabelled tree."""
    for name in ("train", "val"):
        (tree / name).rename(tree / case(name))
    manifest = prepare(folder(tree), tmp_path / "data" / "photos", jobs=1)
    assert {name: split["count"] for name, split in manifest["splits"].items()} == {"train": 18, "val": 9}
    assert manifest["classes"] == ["ant", "bee", "cat"]


def test_a_test_split_alone_is_refused(tree: Path, tmp_path: Path) -> None:
    (tree / "train").rename(tree / "tr")
    with pytest.raises(DataError, match=r"found tr, val, but no train folder"):
        prepare(folder(tree), tmp_path / "data" / "photos", jobs=1)


def test_the_test_split_is_used_if_there_is_no_val(tree: Path, tmp_path: Path) -> None:
    (tree / "val").rename(tree / "test")
    manifest = prepare(folder(tree), tmp_path / "a" / "photos", jobs=1)
    assert sorted(manifest["splits"]) == ["train", "val"]
    shutil.copytree(tree / "test", tree / "validation")
    manifest = prepare(folder(tree), tmp_path / "b" / "photos", jobs=1)
    assert sorted(manifest["splits"]) == ["test", "train", "val"]


def test_unusual_names_are_kept(picture: Picture, tmp_path: Path) -> None:
    root = tmp_path / "odd"
    names = [
        "a b.jpg",
        "зеркало 花 café.jpg",
        "new\nline.jpg",
        'quote",comma.jpg',
        "no-suffix",
        "UPPER.JPEG",
    ]
    (root / "train" / "my class").mkdir(parents=True)
    for seed, name in enumerate(names):
        picture(seed, 30, 31 + seed).save(root / "train" / "my class" / name, "JPEG")
    undecodable = os.fsencode(root / "train" / "my class") + b"/caf\xe9.jpg"
    Path(os.fsdecode(undecodable)).touch()
    other = Path(os.fsdecode(os.fsencode(root / "train") + b"/th\xe9"))
    other.mkdir()
    picture(9, 30, 31).save(other / "x.jpg")
    root = root.rename(os.fsdecode(os.fsencode(tmp_path) + b"/odd \xe9"))
    out = tmp_path / "data" / "odd"
    manifest = prepare(folder(root, max_unreadable=0.5), out, jobs=1)
    split = open_dataset(out).split("train")
    assert sorted(split.path(row) for row in range(7)) == sorted(
        [*(f"train/my class/{name}" for name in names), "train/th\\xe9/x.jpg"]
    )
    assert manifest["classes"] == ["my class", "th\\xe9"]
    assert rows_of(out / "quarantine.csv")[0][0] == "train/my class/caf\\xe9.jpg"


def test_a_loop_of_links_is_not_followed_for_ever(tree: Path, tmp_path: Path) -> None:
    (tree / "train" / "ant" / "loop").symlink_to(tree, target_is_directory=True)
    (tree / "train" / "dog").symlink_to(tree / "train" / "cat", target_is_directory=True)
    manifest = prepare(folder(tree), tmp_path / "data" / "photos", jobs=1)
    assert manifest["ignored"] == {"link back to a folder above": 1}
    assert manifest["splits"]["train"]["classes"] == {"ant": 6, "bee": 6, "cat": 6, "dog": 6}


def test_links_that_end_at_each_other_are_ignored(tree: Path, tmp_path: Path) -> None:
    folder = tree / "train" / next(each.name for each in (tree / "train").iterdir() if each.is_dir())
    (folder / "one.jpg").symlink_to("two.jpg")
    (folder / "two.jpg").symlink_to("one.jpg")
    ignored: Counter[str] = Counter()
    files.walk(tree, ignored)
    assert ignored["broken link or not a regular file"] == 2


def test_duplicates_are_reported(tree: Path, tmp_path: Path) -> None:
    shutil.copy(tree / "train" / "ant" / "0.jpg", tree / "train" / "ant" / "again.jpg")
    shutil.copy(tree / "train" / "ant" / "1.jpg", tree / "train" / "bee" / "other.jpg")
    shutil.copy(tree / "train" / "cat" / "1.jpg", tree / "val" / "cat" / "leak.jpg")
    out = tmp_path / "data" / "photos"
    manifest = prepare(folder(tree), out, jobs=1)
    assert manifest["duplicates"] == {"groups": 3, "across_splits": 1, "with_two_labels": 1}
    assert rows_of(out / "duplicates.csv") == [
        ["0", "train", "ant", "train/ant/0.jpg"], ["0", "train", "ant", "train/ant/again.jpg"],
        ["1", "train", "ant", "train/ant/1.jpg"], ["1", "train", "bee", "train/bee/other.jpg"],
        ["2", "train", "cat", "train/cat/1.jpg"], ["2", "val", "cat", "val/cat/leak.jpg"],
    ]  # fmt: skip


def test_a_file_that_changes_changes_its_row(tree: Path, picture: Picture, tmp_path: Path) -> None:
    """A row depends on the content of its file, not on the name or the time."""
    out, changed = tmp_path / "data" / "photos", tree / "train" / "ant" / "0.jpg"
    prepare(folder(tree), out, jobs=1)
    times = changed.stat()
    picture(99, 40, 56).save(changed)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    prepare(folder(tree), out, jobs=1)
    assert open_dataset(out).split("train").encoded(0).to_pybytes() == changed.read_bytes()


def test_reencoded_images_are_counted_and_stored(picture: Picture, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    picture(1, 30, 40).save(root / "a.bmp")
    picture(2, 30, 41).save(root / "b.jpg")
    out = tmp_path / "data" / "photos"
    assert prepare(folder(root), out, jobs=1)["splits"]["train"]["reencoded"] == 1
    assert (open_dataset(out).split("train").image(0) == np.asarray(picture(1, 30, 40))).all()


def test_a_file_longer_than_any_image_is_not_read(tree: Path, tmp_path: Path) -> None:
    """Such as a video or a disk image; three gigabytes were once read by every process."""
    with (tree / "train" / "ant" / "backup").open("wb") as file:
        file.truncate(decode.MAX_BYTES + 1)
    out = tmp_path / "data" / "photos"
    tracemalloc.start()
    prepare(folder(tree, max_unreadable=0.1), out, jobs=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20
    [(path, size, reason)] = rows_of(out / "quarantine.csv")
    assert (path, int(size)) == ("train/ant/backup", decode.MAX_BYTES + 1)
    assert reason == "more than 1024 MiB, too large for an image"


def test_an_interrupted_run_keeps_the_previous_data(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of the interrupted run is left behind."""
    out, clean = tmp_path / "data" / "photos", tmp_path / "clean" / "photos"
    prepare(folder(tree), clean, jobs=1)
    prepare(folder(tree), out, jobs=1)
    real, seen = decode.check, []

    def interrupted(data: bytes, max_side: None) -> decode.CheckResult:
        if len(seen) == 11:
            raise KeyboardInterrupt
        seen.append(data)
        return real(data)

    monkeypatch.setattr(validate, "_FILES_PER_TASK", 5)
    monkeypatch.setattr(decode, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder(tree), out, jobs=1)
    assert contents(out) == contents(clean)
    monkeypatch.undo()
    prepare(folder(tree), out, jobs=1)
    assert contents(out) == contents(clean)


def test_progress_counts_every_file(tree: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    prepare(
        folder(tree), tmp_path / "photos", jobs=1, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(done, 27) for done in range(1, 28)]


def test_real_flowers_have_their_known_duplicates(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    """Three pairs of identical images, one labelled both roses and tulips; nothing is re-encoded."""
    out = tmp_path / "data" / "flowers"
    manifest = prepare(folder(real_data("flowers-128.tar") / "flowers"), out, jobs=1)
    assert manifest["duplicates"] == {"groups": 3, "across_splits": 0, "with_two_labels": 1}
    assert {row[3] for row in rows_of(out / "duplicates.csv")[:2]} == {
        "train/roses/15922772266_1167a06620.jpg", "train/tulips/15922772266_1167a06620.jpg",
    }  # fmt: skip
    assert manifest["splits"]["train"]["count"] == 2934
    assert manifest["splits"]["val"]["count"] == 736
    assert manifest["quarantined"] == manifest["splits"]["train"]["reencoded"] == 0


def test_real_originals_of_many_sizes(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    root = real_data("flowers-originals-50.tar")
    out = tmp_path / "data" / "originals"
    manifest = prepare(folder(root), out, jobs=1)
    entry = manifest["splits"]["train"]
    assert (entry["count"], entry["storage"], entry["unlabelled"]) == (50, "encoded", 50)


def test_the_manifest_is_written_and_no_temporary_file_is_left(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "photos"
    manifest = prepare(folder(tree), out, jobs=1)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert not list(out.glob(".*"))


def test_a_huge_image_among_small_ones(tree: Path, tmp_path: Path) -> None:
    """12,000 x 9,000 pixels keep their bytes, and are cropped like any other image."""
    import torch

    from mochi.config import Augmentation
    from mochi.data.views.loading import Loading, two_views

    giant = tree / "train" / "ant" / "giant.jpg"
    Image.new("L", (12_000, 9_000), 100).save(giant, quality=20)
    out = tmp_path / "data" / "photos"
    manifest = prepare(folder(tree), out, jobs=1)
    assert manifest["quarantined"] == manifest["splits"]["train"]["reencoded"] == 0
    split = open_dataset(out).split("train")
    row = int(np.argmax(split.widths))
    assert (split.heights[row], split.widths[row]) == (9_000, 12_000)
    assert split.encoded(row).to_pybytes() == giant.read_bytes()
    config = Augmentation(version="v1", image_size=16, min_scale=0.2)
    batches = list(two_views(split, config, Loading(19, torch.device("cpu")), seed=0, epoch=0))
    assert row in batches[0].indices
    assert torch.isfinite(batches[0].query).all()


def test_a_split_of_corrupt_files_only_is_empty(tree: Path, tmp_path: Path) -> None:
    shutil.rmtree(tree / "val")
    (tree / "val" / "ant").mkdir(parents=True)
    (tree / "val" / "ant" / "x.jpg").write_text("no picture")
    out = tmp_path / "data" / "photos"
    prepare(folder(tree, max_unreadable=0.1), out, jobs=1)
    split = open_dataset(out).split("val")
    assert (len(split), split.labels.tolist(), split.labelled.tolist()) == (0, [], [])
    assert split.hashes.shape == (0, 32)


def test_a_file_that_changes_while_it_is_read_is_not_stored(
    tree: Path, tmp_path: Path, monkeypatch
) -> None:
    """Its check result and its hash would be of different contents."""
    real = decode.check

    def check_and_overwrite(data: bytes, max_side: None) -> decode.CheckResult:
        (tree / "train" / "ant" / "0.jpg").write_bytes((tree / "train" / "ant" / "1.jpg").read_bytes())
        return real(data)

    monkeypatch.setattr(decode, "check", check_and_overwrite)
    with pytest.raises(DataError, match=r"0.jpg: changed while it was read"):
        prepare(folder(tree), tmp_path / "data" / "photos", jobs=1)


def test_the_largest_side_is_recorded_and_applied(tree: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "data" / "photos", tmp_path / "again" / "photos"
    manifest = prepare(folder(tree, max_side=50), out, jobs=1)
    split = open_dataset(out).split("train")
    assert max(split.widths.max(), split.heights.max()) == 50
    assert manifest["options"]["max_side"] == 50
    assert manifest["splits"]["train"]["shrunk"] == 18
    prepare(folder(tree, max_side=50), again, jobs=2)
    assert contents(out) == contents(again)
    assert "max_side" not in prepare(folder(tree), again, jobs=1)["options"], "a default changes no digest"


def test_images_much_larger_than_needed_are_named(tree: Path, tmp_path: Path) -> None:
    Image.new("L", (3000, 2000)).save(tree / "train" / "ant" / "giant.jpg")
    out = tmp_path / "data" / "photos"
    prepare(folder(tree), out, jobs=1)
    message = open_dataset(out).split("train").oversized()
    assert message.startswith(
        "1 images of train have a side of more than 2048 px, such as train/ant/giant.jpg"
    )
    assert "dataset.max_side: 1024 stores them smaller" in message
    assert open_dataset(out).split("val").oversized() == ""


@pytest.mark.parametrize("max_side", [None, 100])
@pytest.mark.parametrize("small", [False, True])
def test_the_estimated_disk_space_covers_what_is_written(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_side: int | None, *, small: bool
) -> None:
    """Small images of one size are on disk as files and as pixels for a moment."""
    for number, path in enumerate(sorted(tree.rglob("*.jpg"))):
        Image.open(path).resize((40, 50) if small else (200 + 3 * number, 150)).save(path, quality=95)
    out, wanted = (
        tmp_path / "data" / "photos",
        full_disk.required_space(importlib.import_module(PREPARE), monkeypatch),
    )
    peak, real = [0], write.finish

    def finish(new: Path, *arguments: Any) -> dict[str, Any]:
        entry = real(new, *arguments)
        peak[0] = sum(path.stat().st_size for path in new.iterdir())
        return entry

    monkeypatch.setattr(write, "finish", finish)
    manifest = prepare(folder(tree, max_side=max_side), out, jobs=1)
    if manifest["splits"]["train"]["storage"] == "pixels":
        peak[0] += sum(path.stat().st_size for path in tree.rglob("*.jpg"))
    # The size of resized JPEGs is only bounded: by a byte for each pixel of a square.
    most = 1.5 if max_side is None or small else 3
    assert 0.9 * peak[0] < wanted[out] < most * peak[0], (wanted, peak)


def test_too_little_space_keeps_the_previous_data(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data" / "photos"
    prepare(folder(tree), out, jobs=1)
    before = contents(out)
    full_disk.free(1 << 20, monkeypatch)
    with pytest.raises(StorageError, match=r"data/photos: found 1.0 MB of free disk space; expected"):
        prepare(folder(tree, max_side=50), out, jobs=1)
    assert contents(out) == before


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_a_disk_error_keeps_the_previous_data(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, after: int
) -> None:
    out = tmp_path / "data" / "photos"
    prepare(folder(tree), out, jobs=1)
    before, calls = contents(out), []
    real = write.write_index

    def fail(*arguments: object) -> None:
        calls.append(1)
        if len(calls) > after % 2:
            raise OSError(error, os.strerror(error))
        real(*arguments)  # type: ignore[arg-type]

    place = "write_index" if after < 3 else "write_encoded"
    monkeypatch.setattr(write, place, fail if after < 3 else failing(error))
    (tree / "train" / "ant" / "0.jpg").unlink()
    with pytest.raises(StorageError) as failed:
        prepare(folder(tree), out, jobs=1)
    message = str(failed.value)
    assert message.startswith(str(out))
    assert f"cannot be written: {os.strerror(error)}; " in message
    assert "existing files are intact" in message
    assert ("free " in message) == (error in {errno.ENOSPC, errno.EDQUOT})
    assert contents(out) == before
    monkeypatch.undo()
    prepare(folder(tree), out, jobs=1)
    assert len(open_dataset(out).split("train")) == 17


def failing(error: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    return fail


def test_a_file_deleted_before_its_copy_is_named(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was checked already, so quarantine.csv would be too late."""
    out, real = tmp_path / "data" / "photos", decode.check

    def check_and_remove(data: bytes, max_side: None) -> decode.CheckResult:
        (tree / "train" / "ant" / "0.jpg").unlink(missing_ok=True)
        return real(data, max_side)

    monkeypatch.setattr(decode, "check", check_and_remove)
    with pytest.raises(DataError, match=r"ant/0.jpg: vanished while it was read"):
        prepare(folder(tree), out, jobs=1)
    assert not list(out.iterdir())


def test_a_file_deleted_before_its_check_is_quarantined(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = validate._read

    def stale(part: ByteRange) -> bytes:
        if part.file.endswith("ant/0.jpg"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(part)

    monkeypatch.setattr(validate, "_read", stale)
    out = tmp_path / "data" / "photos"
    prepare(folder(tree, max_unreadable=0.1), out, jobs=1)
    assert {row[2] for row in rows_of(out / "quarantine.csv")} == {"cannot be read: Stale file handle"}
