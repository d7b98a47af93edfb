"""Detection as a user meets it: its commands, the jobs that Snakemake announces, rows and messages."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mochi import encoders
from mochi.config import ConfigError, Experiment, load_experiment, parse_experiment
from mochi.encoders.files import save_encoder
from mochi.layout import Layout
from mochi.report.collect import scores
from mochi.storage.atomic import write_json
from tests.detection.conftest import small_set
from tests.test_cli import mochi, refused

ROOT = Path(__file__).parents[2]
TINY = yaml.safe_load((ROOT / "tests/tiny.yaml").read_text())
MOCHI = "mochi-16-24-8"


def tiny_with_detection(**changes: Any) -> dict[str, Any]:
    """The tiny experiment with two sets over the same scenes; changes are of the first."""
    data = copy.deepcopy(TINY)
    scenes = {
        "format": "voc", "path": "data/few-scenes", "train": ["VOC/train"], "test": ["VOC/test"],
        "classes": ["brick", "coffee"], "rule": "11-point", "broken_objects": "fail",
        "empty_images": "keep",
        "scenes": {"image_size": 64, "num_train": 6, "num_test": 3, "seed": 0},
    }  # fmt: skip
    base = small_set(Path("VOC"), data=scenes).model_dump(mode="json", exclude_none=True)
    frozen = copy.deepcopy(base)
    frozen["training"] |= {"mode": "frozen", "seeds": [0, 1]}
    data["evaluation"]["detection"] = {"few": {**base, **changes}, "few-frozen": frozen}
    return data


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_with_detection(methods=["random-init"])))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands(folder: Path, encoder_file: Path, tiny: Experiment) -> None:
    for _ in range(2):  # the second replaces scenes whose record is not current, provenance.json and all
        done = mochi("scenes", "data/few-scenes", "--config", "tiny.yaml")
        assert done.returncode == 0, done.stderr
        assert "data/few-scenes train: 6 images" in done.stdout
        Path("data/few-scenes/provenance.json").write_text("{}")
    assert "makes scenes in: none" in refused("scenes", "x", "--config", str(ROOT / "tests/tiny.yaml"))
    options = ("--method", "random-init", "--seed", "0", "--config", "tiny.yaml")
    options += ("--encoder", str(encoder_file), "--out", "out")
    # The encoder of these tests is narrower than tiny's.
    assert "is not a resnet10 with stem half and width 8" in refused("detect", "few", *options)
    assert "set: found 'other'; tiny has: few, few-frozen" in refused("detect", "other", *options)
    save_encoder(encoder_file, encoders.build(tiny.encoder))
    done = mochi("detect", "few", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("out/metrics.json").read_text())["num_fine_tunings"] == 1
    assert not [path for path in Path("work").rglob("*") if path.is_file()]


def test_the_jobs_that_snakemake_announces(folder: Path) -> None:
    """One set for random-init alone, one for all three runs, and their scenes made once."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory",
               str(folder), "--configfile", str(folder / "tiny.yaml"), "--cores", "2",
               "--dry-run"]  # fmt: skip
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)
    }  # fmt: skip
    (folder / "workflow").symlink_to(ROOT / "workflow")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    output = done.stdout + done.stderr
    jobs = dict(re.findall(r"^(\w+)\s+(\d+)$", output, re.MULTILINE))
    assert jobs["scenes"] == "1"
    assert jobs["detect"] == "4"
    assert jobs["pretrain"] == "3"
    places = Layout("tiny")
    assert str(places.evaluation(MOCHI, 1, "detection-few-frozen") / "metrics.json") in output
    assert str(places.evaluation(MOCHI, 0, "detection-few") / "metrics.json") not in output


def test_the_table_takes_each_fine_tuning(folder: Path) -> None:
    experiment = load_experiment(folder / "tiny.yaml")
    for method, seed in (("random-init", 0), (MOCHI, 0), (MOCHI, 1)):
        singles = {
            str(k): {"AP50": 40.0 + k + seed, "AP": 20.0, "AP75": 9.0, "coco_AP": 1.0} for k in (0, 1)
        }
        for task, content in (
            ("linear", {"top1": 1.0}), ("knn", {"top1": 1.0}),
            ("detection-few", {"fine_tunings": singles}),
            ("detection-few-frozen", {"fine_tunings": singles}),
        ):  # fmt: skip
            write_json(Layout("tiny").evaluation(method, seed, task) / "metrics.json", content)
    table = scores(experiment)
    own = table[(table["task"] == "detection-few-frozen") & (table["metric"] == "AP50")]
    assert own[own["method"] == MOCHI]["value"].tolist() == [40.0, 41.0, 41.0, 42.0]
    assert set(table[table["task"] == "detection-few"]["method"]) == {"random-init"}
    assert set(own["metric"]) | set(table["metric"]) == {"top1", "AP50", "AP", "AP75"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["random-int"]}, "few.methods: unknown key 'random-int'; did you mean 'random-init'"),
        ({"pretrain_seeds": [7]}, r"detection.few.pretrain_seeds: found \[7\]; no method has them"),
        ({"modle": {}}, "unknown key 'modle'; did you mean 'model'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_set_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_experiment(tiny_with_detection(**changes), "x.yaml")


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("training", {"micro_batch": 3}, "micro_batch: found 3; it must divide batch_size = 2"),
        ("training", {"lr": [0.1, 0.2]}, "several lr candidates need `search_iterations` and `validation`"),
        ("training", {"lr_drops": [99]}, r"lr_drops: found \[99\]"),
        ("training", {"schedule": "cosine"}, "lr_drops belong to schedule step"),
        ("training", {"seeds": [1, 1]}, "seeds must be distinct"),
        ("training", {"BASE_LR": 0.1}, "unknown key 'BASE_LR'; allowed: batch_size, checkpoint"),
        ("model", {"masks": True}, "masks: found true with format voc"),
        ("model", {"proposals_test": [5]}, "proposals_test"),
        ("data", {"rule": None}, "format voc needs `classes`"),
        ("data", {"classes": None}, "format voc needs `classes`"),
        ("data", {"classes": ["a", "a"]}, "names must be distinct"),
    ],
)
def test_mistakes_in_a_section_are_named(section: str, changes: dict[str, Any], message: str) -> None:
    data = tiny_with_detection()
    data["evaluation"]["detection"]["few"][section] |= changes
    with pytest.raises(ConfigError, match=message):
        parse_experiment(data, "x.yaml")


@pytest.mark.parametrize(
    "changes",
    [
        {"scenes": {"image_size": 64, "num_train": 6, "num_test": 3, "seed": 1}},
        {"scenes": None},
        {"classes": ["coffee", "brick"]},
        {"classes": ["brick", "grass"], "path": "data//few-scenes/"},
    ],
)
def test_sets_that_share_a_folder_of_scenes_must_agree(changes: dict[str, Any]) -> None:
    """Else the second would be trained on what was made for the first."""
    data = tiny_with_detection()
    data["evaluation"]["detection"]["few-frozen"]["data"] |= changes
    with pytest.raises(ConfigError) as error:
        parse_experiment(data, "x.yaml")
    (line,) = str(error.value).splitlines()
    assert line.startswith("x.yaml: evaluation: detection.few-frozen.data.path: found 'data/")
    assert "as in detection.few, with other `scenes` or `classes`" in line
    data["evaluation"]["detection"]["few-frozen"]["data"]["path"] = "data/others"
    parse_experiment(data, "x.yaml")


def test_sets_of_ones_own_may_share_a_folder() -> None:
    """`path` may hold several VOC trees, each with its classes."""
    data = tiny_with_detection()
    sets = data["evaluation"]["detection"].values()
    for chosen, folder, classes in zip(
        sets, ("raccoon", "BCCD"), (["raccoon"], ["RBC", "WBC"]), strict=True
    ):
        own = {"path": "data", "train": [f"{folder}/train"], "test": [f"{folder}/val"], "classes": classes}
        chosen["data"] |= {**own, "scenes": None}
    read = parse_experiment(data, "x.yaml").evaluation.detection.values()
    assert [chosen.data.classes for chosen in read] == [["raccoon"], ["RBC", "WBC"]]
