"""The commands as a user types them: a mistake ends in one message and exit code 1, never in a traceback,
and nothing that was there is lost."""

import io
import json
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from PIL import Image

from mochi import cli
from mochi.config import Experiment
from mochi.config.datasets import Folder
from mochi.data.ingest.prepare import prepare

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "tests/tiny.yaml")
MOCHI = "mochi-16-24-8"


class Done(NamedTuple):
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def mochi(*arguments: str) -> Done:
    """`python -m mochi ARGUMENTS` in this process: a traceback would fail the test that calls it."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["mochi", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def refused(*arguments: str) -> str:
    done = mochi(*arguments)
    assert done.returncode == 1, done
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    return done.stderr


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("run") / "run.yaml"
    done = mochi("resolve", "--config", TINY, "--method", MOCHI, "--seed", "0", "--out", str(file))
    assert done.returncode == 0, done.stderr
    return str(file)


def test_help_names_every_command() -> None:
    done = mochi("--help")
    assert done.returncode == 0
    for command in (
        "prepare",
        "resolve",
        "pretrain",
        "linear",
        "knn",
        "tables",
        "check",
        "plan",
    ):
        assert command in done.stdout


def test_check_finds_a_typo_before_anything_is_computed(tmp_path: Path) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text(Path(TINY).read_text().replace("temperature: 0.2", "temprature: 0.2"))
    assert "pretrain.temprature: unknown key 'temprature'; did you mean 'temperature'?" in refused(
        "check", "--config", str(file)
    )


def test_check_warns_of_a_long_queue_and_refuses_a_large_batch(tiny_data: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(Path(TINY).read_text())
    data["pretrain"] |= {"queue_size": 200, "batch_size": 200}
    file = tmp_path / "large.yaml"
    file.write_text(yaml.safe_dump(data))
    done = mochi("check", "--config", str(file), "--data-root", str(tiny_data.parent))
    assert done.returncode == 1
    assert f"warning: {MOCHI}: queue_size = 200 is 1.25 times the 160 training images" in done.stdout
    assert f"error: {MOCHI}: batch_size: found 200; the set has 160 images" in done.stdout


def checked(change: dict[str, Any], data_root: Path, tmp_path: Path) -> str:
    """What `check` says of the tiny experiment with some sections changed."""
    file = tmp_path / "changed.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(Path(TINY).read_text()) | change, sort_keys=False))
    return mochi("check", "--config", str(file), "--data-root", str(data_root)).stdout


def test_check_tells_what_would_fail_after_the_training(
    tiny: Experiment, tiny_data: Path, tmp_path: Path
) -> None:
    folder = {"source": "folder", "name": "mine", "path": str(tmp_path / "photos")}
    nowhere = tmp_path / "nowhere"
    assert "photos: not found, and nothing is prepared in" in checked(
        {"dataset": folder}, nowhere, tmp_path
    )
    for number in range(70):
        path = tmp_path / "photos" / "2024" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + number % 2, 50), (number, 0, 0)).save(path)
    out = tmp_path / "data" / "mine"
    prepare(Folder(**folder), out, jobs=1)
    methods = {"methods": {"moco-v2": {}, "supervised": {"objective": "supervised", "lr": 0.1}}}
    said = checked({"dataset": folder, **methods}, out.parent, tmp_path)
    assert "error: supervised: found 0 labelled images in train; bring some, or remove supervised" in said
    assert "error: evaluation.knn: found 0 labelled images in train; bring some, or remove knn" in said
    assert "error: evaluation.linear: found 0 labelled images in val" in said
    assert (
        "warning: augmentation.image_size: found 16; images of train have a median short side of 40" in said
    )
    said = checked({"dataset": folder | {"max_unreadable": 0.5}}, out.parent, tmp_path)
    assert f"warning: {out}: prepared with other options" in said
    sets = yaml.safe_load((Path(TINY).parents[1] / "config/raccoon.yaml").read_text())["evaluation"][
        "detection"
    ]
    evaluation = yaml.safe_load(Path(TINY).read_text())["evaluation"] | {"detection": sets}
    said = checked({"evaluation": evaluation}, tiny_data.parent, tmp_path)
    assert re.search(
        r"error: evaluation.detection.raccoon\S*: \S+/val.txt: not found; bring the set there", said
    )


def test_verify_reads_everything(tiny: Experiment, tiny_data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_data, tmp_path / tiny_data.name))
    arguments = ("check", "--config", TINY, "--data-root", str(tmp_path), "--verify")
    assert mochi(*arguments).returncode == 0
    pixels = copy / "train-images.npy"
    content = bytearray(pixels.read_bytes())
    content[-1] ^= 1
    pixels.write_bytes(content)
    done = mochi(*arguments)
    assert done.returncode == 1
    assert f"error: {pixels}: missing or damaged" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seed", "7"), "--seed: found 7; mochi-16-24-8 has the seeds 0, 1"),
        (
            ("--seed", "0", "--stage", "foo"),
            "--stage: found 'foo'; this experiment has: pretrain, linear, knn",
        ),
    ],
)
def test_resolve_refuses_what_is_not_there(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    out = str(tmp_path / "run.yaml")
    assert said in refused("resolve", "--config", TINY, "--method", MOCHI, "--out", out, *arguments)


def test_plan_counts_runs_and_steps(tiny_data: Path) -> None:
    done = mochi("plan", "--config", TINY, "--data-root", str(tiny_data.parent), "--measure")
    assert done.returncode == 0, done.stderr
    assert f"{MOCHI}: 2 runs of 10 steps" in done.stdout
    assert "3 runs;" in done.stdout


def test_unknown_method(tmp_path: Path) -> None:
    out = str(tmp_path / "run.yaml")
    text = refused("resolve", "--config", TINY, "--method", "moco-v3", "--seed", "0", "--out", out)
    assert "unknown key 'moco-v3'; allowed: mochi-16-24-8, random-init" in text


def test_missing_data_and_foreign_run_files(run_file: str, tmp_path: Path) -> None:
    places = [
        "--data",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "out"),
        "--work",
        str(tmp_path / "w"),
    ]
    assert "prepare" in refused("pretrain", "--run", run_file, *places)
    other = tmp_path / "other.yaml"
    other.write_text(Path(run_file).read_text().replace("version: 2", "version: 99"))
    assert "found 99; this program reads run files of version 2" in refused(
        "pretrain", "--run", str(other), *places
    )


def test_an_output_folder_that_cannot_be_written(run_file: str, tiny_data: Path, tmp_path: Path) -> None:
    """A file stands where the folder should be: refused even for root, before any compute."""
    (tmp_path / "out").write_text("mine")
    places = ["--data", str(tiny_data), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "w")]
    assert "results cannot be written there" in refused("pretrain", "--run", run_file, *places)
    assert (tmp_path / "out").read_text() == "mine"


def test_own_images_from_the_command_line(tmp_path: Path) -> None:
    """What the README says of your own images: hidden files ignored, bad ones listed, the rest stored."""
    for split, number in (("train", 6), ("val", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", (20 + index, 24), (index, 0, 0)).save(folder / f"{index}.jpg")
    (tmp_path / "images/train/cat/.DS_Store").write_text("x")
    (tmp_path / "images/train/cat/bad.jpg").write_bytes(b"no image")
    out = tmp_path / "data" / "mine"
    options = ["--source", "folder", "--path", str(tmp_path / "images"), "--out", str(out)]
    done = mochi("prepare", *options, "--option", "max_unreadable=0.2")
    assert done.returncode == 0, done.stderr
    assert "train: 12 images" in done.stdout
    assert "bad.jpg" in (out / "quarantine.csv").read_text()
    assert "more than max_unreadable" in refused("prepare", *options)
    assert "unknown key 'max_unredable'" in refused("prepare", *options, "--option", "max_unredable=0.2")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "0 images" in refused("prepare", "--source", "folder", "--path", str(empty), "--out", str(out))


def test_check_reports_on_a_folder_of_images(tmp_path: Path) -> None:
    """Text for a person, JSON for a program, and a mistake that is named."""
    folder = tmp_path / "images/train/cat"
    folder.mkdir(parents=True)
    for index in range(4):
        Image.new("RGB", (40, 30 + index), (index, 0, 0)).save(folder / f"{index}.png")
    report = tmp_path / "report.json"
    places = ["--data", str(tmp_path / "images"), "--data-root", str(tmp_path / "data")]
    done = mochi("check", *places, "--report", str(report))
    assert done.returncode == 0, done.stderr
    assert "train: 4 images, 4 labelled" in done.stdout
    assert json.loads(report.read_text())["splits"]["train"]["images"] == 4
    assert "check one thing at a time" in refused("check", "--config", TINY, *places)
    assert "nowhere" in refused("check", "--data", str(tmp_path / "nowhere"))
