"""`mochi features` and `mochi neighbors`: features compared with the pipeline's, neighbours with all
pairs.
"""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFont
from torch.nn import functional as F

from mochi.config import Encoder
from mochi.config.datasets import Folder
from mochi.data.format import open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.data.views.loading import Loading, centre_crops
from mochi.encoders import build_untrained
from mochi.encoders.files import EncoderInfo, save_encoder, write_tensors
from mochi.evaluation.features import encode
from mochi.inference import neighbors
from mochi.inference.folder import FolderFeatures
from mochi.inference.neighbors import caption_font, classes_of, legible, nearest
from tests.commands import refused, run

CONFIG = Encoder(architecture="resnet10", stem="half", width=8)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOCHI_CONFIG", raising=False)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """An untrained encoder whose file describes it."""
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, build_untrained(CONFIG, 0), EncoderInfo.of(CONFIG, image_size=64))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Classes, a single image, unusual names, and files that are not images."""
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    names = [
        "cat/1.png",
        "cat/2 # é.jpg",
        "cat/deep/3.png",
        'dog/<script>"q".png',
        "dog/new\nline.png",
        "loose.png",
    ]
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (90 + number, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name, "PNG" if name.endswith("png") else "JPEG")
    (root / "cat/bad.jpg").write_bytes(b"no image")
    (root / ".DS_Store").write_text("x")
    return root


def test_every_image_once_with_the_features_of_the_pipeline(
    encoder: Path, images: Path, tmp_path: Path
) -> None:
    done = run(
        "features", "--encoder", str(encoder), "--images", "images", "--out", "f.npz", "--batch-size", "2"
    )
    assert done.returncode == 0, done.stderr
    assert "6 images, vectors of 64 numbers" in done.stdout
    found = np.load("f.npz")
    assert sorted(found["paths"]) == sorted(
        str(path.relative_to(images)) for path in images.rglob("*.*g") if path.name != "bad.jpg"
    )
    listed = Path("f.quarantine.csv").read_text()
    assert listed.startswith("path,reason\ncat/bad.jpg,")
    prepare(
        Folder(source="folder", name="x", path=str(images), max_unreadable=0.5), tmp_path / "data/x", jobs=1
    )
    split = open_dataset(tmp_path / "data/x").split("train")
    loading = Loading(16, torch.device("cpu"))
    (batch,) = centre_crops(split, loading, resize=73, image_size=64, rows=np.arange(len(split)))
    expected = encode(build_untrained(CONFIG, 0).eval(), batch.images).numpy()
    order = [list(found["paths"]).index(split.path(row)) for row in range(len(split))]
    np.testing.assert_allclose(
        found["vectors"][order], expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max()
    )
    assert (
        run("features", "--encoder", str(encoder), "--images", "images", "--out", "f.parquet").returncode
        == 0
    )
    table = pq.read_table("f.parquet")
    assert table["path"].to_pylist() == list(found["paths"])
    np.testing.assert_allclose(
        np.array(table["vector"].to_pylist()), found["vectors"], rtol=1e-2, atol=1e-2
    )


def test_the_normalisation_of_the_encoder_is_used(images: Path, tmp_path: Path) -> None:
    tensors = build_untrained(CONFIG, 0).state_dict()
    swapped = {**tensors, "conv1.weight": tensors["conv1.weight"].flip(1)}
    about = {"image_size": 64, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}
    write_tensors(tmp_path / "rgb.safetensors", tensors, EncoderInfo.of(CONFIG, **about))
    about |= {"mean": (0.3, 0.2, 0.1), "channel_order": "BGR"}
    write_tensors(tmp_path / "bgr.safetensors", swapped, EncoderInfo.of(CONFIG, **about))
    for name in ("rgb", "bgr"):
        assert (
            run(
                "features", "--encoder", f"{name}.safetensors", "--images", "images", "--out", f"{name}.npz"
            ).returncode
            == 0
        )
    rgb, bgr = (np.load(f"{name}.npz")["vectors"] for name in ("rgb", "bgr"))
    np.testing.assert_allclose(rgb, bgr, rtol=1e-2, atol=1e-2)


def test_an_encoder_without_metadata_needs_flags(images: Path, tmp_path: Path) -> None:
    write_tensors(tmp_path / "old.safetensors", build_untrained(CONFIG, 0).state_dict(), None)
    command = ["features", "--encoder", "old.safetensors", "--images", "images", "--out", "f.npz"]
    assert "--architecture, --stem, --width and --image-size" in refused(*command)
    flags = ["--architecture", "resnet10", "--stem", "half", "--width", "8"]
    assert "give --image-size" in refused(*command, *flags)
    assert run(*command, *flags, "--image-size", "64").returncode == 0
    assert "--resize: found 1142857143" in refused(*command, *flags, "--image-size", "1000000000")
    assert "--resize: found 10" in refused(*command, *flags, "--image-size", "64", "--resize", "10")
    config = tmp_path / "tiny.yaml"
    shutil.copy(Path(__file__).parent / "tiny.yaml", config)
    assert run(*command, "--config", "tiny.yaml").returncode == 0


def test_mistakes_are_named_before_anything_is_encoded(encoder: Path, images: Path, tmp_path: Path) -> None:
    of = ["--encoder", str(encoder), "--images", "images"]
    assert "expected a name that ends in .npz or .parquet" in refused("features", *of, "--out", "f.csv")
    assert "expected a name that ends in .png" in refused("neighbors", *of, "--out", "s.txt")
    assert "no such encoder" in refused(
        "features", "--encoder", "x.safetensors", "--images", "images", "--out", "f.npz"
    )
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").touch()
    for out in ("folder.npz", "file/f.npz", f"{'x' * 300}.npz", "/proc/f.npz"):
        message = refused("features", *of, "--out", out)
        assert f"{out}: cannot be written: " in message
        assert "encode" not in message
    assert "folder.npz: cannot be written" in refused("inspect", "images", "--report", "folder.npz")
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("nowhere", "no such folder"),
        ("empty", "found 0 images"),
        ("images/loose.png", "loose.png: is a file; expected a folder"),
    ):
        assert message in refused(
            "features", "--encoder", str(encoder), "--images", folder, "--out", "f.npz"
        )
    (tmp_path / "text.png").write_text("no image")
    message = refused("neighbors", *of, "--out", "s.png", "--query", "text.png")
    assert "--query: text.png: text, not an image; give an image" in message
    assert "encode" not in message
    for query in ("cat.txt", "images"):
        assert f"--query: {query}: " in refused("neighbors", *of, "--out", "s.png", "--query", query)
    Image.new("RGB", (70, 70), "red").save("mine.png")
    for out, query in (("images/loose.png", "mine.png"), ("mine.png", "./mine.png")):
        before = Path(out).read_bytes()
        message = refused("neighbors", *of, "--out", out, "--query", query)
        assert f"--out: found {out}, an image that is read" in message
        assert Path(out).read_bytes() == before


def test_a_sheet_of_neighbors(encoder: Path, images: Path) -> None:
    of = ["--encoder", str(encoder), "--images", "images", "--k", "3"]
    done = run("neighbors", *of, "--out", "sheet.png", "--num-queries", "4")
    assert done.returncode == 0, done.stderr
    assert "skipped: 'cat/bad.jpg'" in done.stdout
    assert "ignored: {'hidden or system file': 1}" in done.stdout
    with Image.open("sheet.png") as sheet:
        first = sheet.size
    Image.new("RGB", (70, 70), "red").save("mine.png")
    assert (
        run(
            "neighbors",
            *of,
            "--out",
            "two.png",
            "--query",
            "mine.png",
            "--query",
            "images/cat/1.png",
            "--hardest",
        ).returncode
        == 0
    )
    with Image.open("two.png") as sheet:
        assert (sheet.size[0], sheet.size[1] * 2 - 8) == first, "two rows instead of four, as wide"


def test_letters_that_the_font_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of boxes that all look the same."""
    text = "Łódź Жук 猫\u732a\n\udcff.jpg"
    assert legible(text, caption_font()) == "Łódź Жук \\u732b\\u732a\\n\\udcff.jpg"
    monkeypatch.setattr(neighbors, "find_spec", lambda name: None)
    without_matplotlib = caption_font()
    assert legible("cat Ж.jpg", without_matplotlib) == "cat \\u0416.jpg"
    assert isinstance(without_matplotlib, ImageFont.FreeTypeFont)


def test_neighbors_equal_those_of_all_pairs() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    paths = [f"{number}.png" for number in range(40)]
    found = FolderFeatures(paths, vectors, [])
    classes = {path: "ab"[number % 2] for number, path in enumerate(paths[:36])}
    queries = [(paths[row], vectors[row]) for row in (0, 7, 39)]
    cosine = F.cosine_similarity(
        torch.from_numpy(vectors)[:, None].double(), torch.from_numpy(vectors).double(), dim=-1
    )
    for (path, _), row in zip(queries, nearest(queries, found, 5), strict=True):
        expected = cosine[int(path[:-4])].clone()
        expected[int(path[:-4])] = -9
        assert [each.path for each in row] == [paths[i] for i in expected.argsort(descending=True)[:5]]
    for (path, _), row in zip(queries[:2], nearest(queries[:2], found, 40, classes), strict=True):
        assert {classes[each.path] for each in row} == {"ab".replace(classes[path], "")}
        assert len(row) == 18
        assert [each.similarity for each in row] == sorted((each.similarity for each in row), reverse=True)
    (unlabelled,) = nearest(queries[2:], found, 40, classes)
    assert len(unlabelled) == 39, "without classes all other images are negatives"


def test_a_query_is_found_by_any_form_of_its_path(encoder: Path, images: Path) -> None:
    for name, query in (("a", images.absolute()), ("b", Path("images")), ("c", Path("images/../images"))):
        of = ["--encoder", str(encoder), "--images", "images", "--k", "3", "--out", f"{name}.png"]
        assert run("neighbors", *of, "--query", str(query / "cat" / "1.png")).returncode == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() == Path("c.png").read_bytes()


def test_folders_are_classes(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert classes_of(images) == {}, "with an image outside folders, folders are not classes"
    assert caplog.text.count("all images are one split without labels") == 1
    (images / "loose.png").unlink()
    shutil.rmtree(images / "cat/deep")
    assert classes_of(images)["cat/1.png"] == "cat"
