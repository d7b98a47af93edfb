"""Files in folders that are not images, names in two Unicode forms, and lists of names with blanks."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mochi.data.ingest.files import Names, read_list, walk
from tests.commands import run

LEFT_BEHIND = (
    ".DS_Store", "._0.jpg", "Thumbs.db", "ehthumbs.db", "desktop.ini", "Desktop.INI", "Icon\r",
    "0.jpg:Zone.Identifier", "0.jpg:Zone.Identifier:$DATA", "0.jpg~", "0.jpg.bak", "0.jpg.orig",
    ".0.jpg.swp", "0.jpg.swp", "#0.jpg#", "0.jpg.part", "0.jpg.crdownload", "0.jpg.tmp",
    "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/0.jpg", "#snapshot/0.jpg", "@Recycle/0.jpg",
    "$RECYCLE.BIN/0.jpg", "System Volume Information/0.jpg", "lost+found/0.jpg", "__MACOSX/0.jpg",
    "__MACOSX/._0.jpg", ".ipynb_checkpoints/0.jpg", ".Trash-1000/files/0.jpg", "__pycache__/0.jpg",
    "Thumbs.db:encryptable", "0.jpg:com.apple.quarantine", "0.jpg:SmartScreen:$DATA",
    "0.jpg\uf03aZone.Identifier", "0.jpg\uf022AFP_AfpInfo", "0.jpgZone.Identifier", "Icon\uf00d",
    "RECYCLER/S-1-5-21/0.jpg", "FOUND.017/FILE0000.CHK", "LOST.DIR/0.jpg", "~snapshot/hourly.0/0.jpg",
    "0.jpg@SynoEAStream", ":2e_0.jpg", "0.jpg.filepart", "0.jpg.partial", "0.jpg.opdownload", "0.jpg.aria2",
    "IMG_0001.AAE", "IMG_0001.xmp", "MVI_0001.THM", "GX010001.LRV", "0.jpg.md5", "0.jpg.dvc", "README",
    "LICENSE", "SHA256SUMS", "album.lnk", "photos.url",
)  # fmt: skip


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_system_files_are_ignored_and_counted(tmp_path: Path, name: str) -> None:
    for folder in (tmp_path, tmp_path / "train", tmp_path / "train" / "cat"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
        (folder / "0.jpg").write_bytes(b"x")
    ignored: Counter[str] = Counter()
    assert walk(tmp_path, ignored) == ["0.jpg", "train/0.jpg", "train/cat/0.jpg"]
    assert sum(ignored.values()) == 3


def test_nothing_else_is_ignored(tmp_path: Path) -> None:
    names = [
        "recycled/a.jpg",
        "a.b.jpg",
        "~a.jpg",
        "a:b.jpg",
        "10:30.jpg:2.jpg",
        "a:b",
        "found.0001",
        "readme.jpg",
        "license/a.jpg",
        "bak/a.jpg",
        "thumbs/a.jpg",
        "no-suffix",
        "#a.jpg",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert walk(tmp_path) == sorted(names)


@pytest.mark.parametrize("home", ["", "prepared", "train/cat/data"])
def test_prepared_data_inside_the_image_folder_is_ignored(
    tree: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    """A second run once read the arrays of the first as new images, and prepared again every time."""
    monkeypatch.chdir(tree.parent)
    out = str(tree / home)
    options = ["prepare", "--source", "folder", "--path", str(tree), "--out", out]
    first = run(*options)
    assert first.returncode == 0, first.stderr
    assert "train: 18 images" in first.stdout
    again = run(*options)
    assert "up to date" in again.stderr
    path = Path(out) / "manifest.json"
    before = json.loads(path.read_text())
    (Path(out) / "provenance.json").write_text("{}")  # for example of an interrupted run
    assert run(*options).returncode == 0
    assert {**json.loads(path.read_text()), "ignored": {}} == {**before, "ignored": {}}


def test_results_inside_the_image_folder_are_ignored(tree: Path) -> None:
    result = tree / "train" / "results" / "detection"
    result.mkdir(parents=True)
    (result / "provenance.json").write_text('{"settings": {}, "code_digest": "", "outputs": {}}')
    (result / "detections.png").write_bytes(b"x")
    ignored: Counter[str] = Counter()
    assert not [path for path in walk(tree, ignored) if "results" in path]
    assert ignored == {"folder of results or prepared data": 1}


def test_segmentation_masks_of_a_voc_tree_are_ignored(tmp_path: Path) -> None:
    for name in ("JPEGImages/a.jpg", "SegmentationClass/a.png", "SegmentationObject/a.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    assert walk(tmp_path) == ["JPEGImages/a.jpg"]


def test_a_flag_in_a_list_is_1_0_or_minus_1_in_the_last_column(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("a\na - Copy\nb 1\nc  0\nd -1\ne 2\nphoto 1\nf\t-1\n 7\n", encoding="utf-8")
    assert read_list(path, {"photo 1"}.__contains__) == ["a", "a - Copy", "b", "c", "e 2", "photo 1", "7"]


def test_names_are_found_in_both_unicode_forms_and_with_any_suffix(tmp_path: Path) -> None:
    for name in ("cafe\u0301.JPG", "b.Png", "sub/c.jpeg", "d.jpg", "d.png", "f.XML", "g.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = Names(tmp_path)
    assert names.image("café") == tmp_path / "cafe\u0301.JPG"
    assert names.image("b") == tmp_path / "b.Png"
    assert names.image("sub/c") == tmp_path / "sub" / "c.jpeg"
    assert names.image("d") == tmp_path / "d.jpg"
    assert names.image("D") is None
    assert "'d.jpg', which differs in case" in names.alike("D")
    assert "'f.XML', which differs in case" in names.alike("f")
    assert names.alike("g") == "; found 'g.txt', which has another suffix"
    assert names.alike("g.txt") == names.alike("h") == ""
    assert names.find("e.jpg") is names.find("../\0") is names.image("") is None


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".JPEG", ".webp", ".bmp", ".tif"])
def test_preparation_and_detection_read_the_same_files(
    voc: Callable[[str], Path], tmp_path: Path, suffix: str
) -> None:
    """Preparation once accepted only .jpg."""
    from mochi.detection import voc as reader

    root = voc(suffix)
    [image] = reader.read(root, "train", ["square"], "fail").images
    assert image.path.name == f"one{suffix}"
    out = tmp_path / "data" / "x"
    done = run("prepare", "--source", "folder", "--path", str(root), "--out", str(out))
    assert "train: 1 images" in done.stdout, done.stderr


@pytest.fixture
def voc(tmp_path: Path) -> Callable[[str], Path]:
    """A VOC tree of one image with another suffix."""

    def make(suffix: str) -> Path:
        root = tmp_path / "VOC"
        for below in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / below).mkdir(parents=True)
        Image.new("RGB", (48, 40)).save(root / "JPEGImages" / f"one{suffix}")
        (root / "ImageSets/Main/train.txt").write_text("one")
        (root / "Annotations/one.xml").write_text(
            "<annotation><object><name>square</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax>"
            "<ymax>9</ymax></bndbox></object></annotation>"
        )
        return root

    return make
