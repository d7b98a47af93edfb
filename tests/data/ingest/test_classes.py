"""Classes of train and val that contradict each other: preparation refuses them, check and inspect
report them.
"""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mochi.config.datasets import Folder
from mochi.data.format import open_dataset
from mochi.data.ingest.classes import faults, oddities
from mochi.data.ingest.prepare import prepare
from tests.commands import refused, run
from tests.tiny import FILE

NAMES = {
    "nested": (["train/train/cat/0", "train/train/dog/0"], ["test/test/cat/0", "test/test/dog/0"]),
    "case": (["train/Cat/0", "train/Dog/0"], ["val/cat/0", "val/dog/0"]),
    "other": (["train/one/0", "train/two/0"], ["val/three/0"]),
}
REASONS = {
    "nested": "the only class of train is called 'train': a folder too many was unpacked",
    "case": "classes 'Cat' and 'cat' differ only in case, spaces or Unicode form",
    "other": "no class has images in both train (one, two) and val (three)",
}


def make(root: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20 + number % 2), (number, 0, 0)).save(root / f"{path}.png")
    return root


@pytest.mark.parametrize("kind", NAMES)
def test_splits_without_a_common_class_are_refused_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The accuracy on such a data set is always 0%."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "set", *NAMES[kind][0], *NAMES[kind][1])
    assert REASONS[kind] in refused("prepare", "--source", "folder", "--path", "set", "--out", "data/set")
    content = yaml.safe_load(FILE.read_text())
    content["dataset"] = {"source": "folder", "name": "set", "path": "set"}
    Path("exp.yaml").write_text(yaml.safe_dump(content))
    checked = run("check", "exp.yaml")
    assert checked.returncode == 1
    assert REASONS[kind] in checked.stdout
    assert "warning: no class has images in both" in run("inspect", "set").stdout


def test_a_class_in_two_unicode_forms_is_one_class(tmp_path: Path) -> None:
    make(tmp_path / "set", "train/cafe\u0301/0", "train/café/1", "train/b/0", "val/café/0", "val/b/0")
    out = tmp_path / "data" / "x"
    manifest = prepare(Folder(source="folder", name="x", path=str(tmp_path / "set")), out, jobs=1)
    assert manifest["classes"] == ["b", "café"]
    assert manifest["splits"]["train"]["classes"] == {"b": 1, "café": 2}
    assert open_dataset(out).split("val").labels.tolist() == [0, 1]


def test_similar_names_and_classes_without_training_images_are_reported() -> None:
    counts = {"train": {"Cat": 3, "cat ": 1, "dog": 2, "eel": 0}, "val": {"Cat": 1, "eel": 2, "dog": 1}}
    assert faults(counts) == []
    messages = oddities(counts)
    assert "classes 'Cat' and 'cat ' differ only in case, spaces or Unicode form" in messages[0]
    assert messages[1] == "1 classes of val have no image in train: eel"
    for form in ("\uff43\uff41\uff54", "cat\u200b", "\ufeffCat", "c\u00adat"):
        assert len(oddities({"train": {"cat": 1, "dog": 1, form: 1}})) == 1, form
    assert not oddities({"train": {"dog-1": 1, "dog_1": 1, "dög1": 1, "dog1": 1}})


def test_unlabelled_and_empty_splits_are_accepted() -> None:
    for counts in ({}, {"train": {}}, {"train": {}, "val": {"a": 1}}, {"train": {"a": 0}, "val": {"a": 1}}):
        assert faults(counts) == []


def test_a_data_set_prepared_by_an_older_version_is_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "set", "train/a/0", "val/a/0")
    prepare(Folder(source="folder", name="x", path="set"), tmp_path / "data" / "x", jobs=1)
    manifest = tmp_path / "data" / "x" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["classes"] = ["a", "b"]
    content["splits"]["train"]["classes"], content["splits"]["val"]["classes"] = (
        {"a": 1, "b": 0},
        {"a": 0, "b": 1},
    )
    manifest.write_text(json.dumps(content))
    experiment = yaml.safe_load(FILE.read_text())
    experiment["dataset"] = {"source": "folder", "name": "x", "path": "set"}
    Path("exp.yaml").write_text(yaml.safe_dump(experiment))
    assert "error: no class has images in both train (a) and val (b)" in run("check", "exp.yaml").stdout
