"""Commands as a user types them: a mistake gives one message and exit code 1, never a traceback, and no
file is lost.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.main import get_command

import mochi
from mochi import cli
from mochi.config.datasets import Folder
from mochi.data.ingest.prepare import prepare
from tests.commands import refused, run
from tests.project import MOCHI

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "tests/tiny.yaml")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to the current folder, which is a new one here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOCHI_CONFIG", raising=False)


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """The data set of the tiny experiment, in the current folder."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data" / tiny_data.name))


def changed(tmp_path: Path, change: dict[str, Any]) -> str:
    """A file of the tiny experiment with some sections replaced."""
    file = tmp_path / "changed.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(Path(TINY).read_text()) | change, sort_keys=False))
    return str(file)


def test_version() -> None:
    assert run("--version").stdout == f"mochi {mochi.__version__}\n"


def test_help_names_every_command_and_each_starts_with_a_verb() -> None:
    shown = run("--help").stdout
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {"check", "inspect", "plan", "adopt", "explain", "prepare", "pretrain", "evaluate"} <= set(
        commands
    )
    for name, command in commands.items():
        assert name in shown
        first = (command.help or "").split()[0]
        assert first[0].isupper(), f"{name}: {command.help}"
        assert not first.endswith(("s", "ing")), f"{name}: an imperative, as in `Train an encoder.`"


def test_help_shows_defaults() -> None:
    shown = run("pretrain", "--help").stdout
    assert "config/config.yaml" in shown
    assert "MOCHI_CONFIG" in shown


def test_check_finds_a_typo_before_anything_is_computed(tmp_path: Path) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text(Path(TINY).read_text().replace("temperature: 0.2", "temprature: 0.2"))
    message = "pretrain.temprature: unknown key 'temprature'; did you mean 'temperature'?"
    assert message in refused("check", str(file))


def test_check_warns_of_a_long_queue_and_refuses_a_large_batch(data: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(Path(TINY).read_text())["pretrain"] | {"queue_size": 200, "batch_size": 200}
    done = run("check", changed(tmp_path, {"pretrain": recipe}))
    assert done.returncode == 1
    assert f"warning: {MOCHI}: queue_size = 200 is 1.25 times the 160 training images" in done.stdout
    assert f"error: {MOCHI}: batch_size: found 200; the set has 160 images" in done.stdout


def test_check_finds_what_would_fail_after_pretraining(data: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    folder = {"source": "folder", "name": "mine", "path": str(photos)}
    output = run("check", changed(tmp_path, {"dataset": folder})).stdout
    assert f"error: dataset.path: {photos}: not found, and nothing is prepared in data/mine" in output
    evaluation = yaml.safe_load(Path(TINY).read_text())["evaluation"]
    transfer = {
        "evaluation": evaluation | {"mine": {"task": "knn", "k": 1, "temperature": 0.1, "dataset": folder}}
    }
    output = run("check", changed(tmp_path, transfer)).stdout
    assert f"error: evaluation.mine.dataset.path: {photos}: not found, and nothing" in output
    for number in range(70):
        path = photos / "2024" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + number % 2, 50), (number, 0, 0)).save(path)
    prepare(Folder(**folder), tmp_path / "data/mine", jobs=1)
    methods = {"methods": {"moco-v2": {}, "supervised": {"objective": "supervised", "lr": 0.1}}}
    output = run("check", changed(tmp_path, {"dataset": folder, **methods})).stdout
    for line in (
        "error: supervised: found 0 labelled images in train; provide some, or remove the row",
        "error: evaluation.knn: found 0 labelled images in train; provide some, or remove knn",
        "error: evaluation.linear: found 0 labelled images in val",
        "warning: augmentation.image_size: found 16; images of train have a median short side of 40",
    ):
        assert line in output
    sets = yaml.safe_load((ROOT / "config/raccoon.yaml").read_text())["evaluation"]["detection"]
    evaluation = yaml.safe_load(Path(TINY).read_text())["evaluation"] | {"detection": sets}
    output = run("check", changed(tmp_path, {"evaluation": evaluation})).stdout
    assert re.search(
        r"error: evaluation.detection.raccoon\S*: \S+/val.txt: not found; put the set there", output
    )


def test_check_compares_the_evaluation_with_the_training(data: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(Path(TINY).read_text())
    content["augmentation"]["image_size"] = 64
    output = run("check", changed(tmp_path, content)).stdout
    assert "warning: evaluation.image_size: found 16; encoders are trained at" in output


def test_check_reports_prepared_data_of_another_data_set(tmp_path: Path) -> None:
    content = yaml.safe_load(Path(TINY).read_text())
    assert run("prepare", "--config", TINY).returncode == 0
    assert "not the data set of this experiment" not in run("check", TINY).stdout
    content["dataset"]["train_per_photo"] = 11
    output = run("check", changed(tmp_path, content)).stdout
    assert "not the data set of this experiment (settings: dataset.train_per_photo 10 -> 11)" in output


def test_verify_reads_every_file(data: Path) -> None:
    assert run("check", TINY, "--verify").returncode == 0
    pixels = data / "train-images.npy"
    content = bytearray(pixels.read_bytes())
    content[-1] ^= 1
    pixels.write_bytes(content)
    done = run("check", TINY, "--verify")
    assert done.returncode == 1
    assert re.search(r"error: \S*train-images.npy: missing or corrupt", done.stdout)


def test_plan_counts_runs_steps_and_evaluations_of_the_experiments_own_data(tmp_path: Path) -> None:
    assert run("prepare", "--config", TINY).returncode == 0
    done = run("plan", TINY)
    assert done.returncode == 0, done.stderr
    assert f"{MOCHI}: 2 runs of 10 steps" in done.stdout
    for line in (
        "linear: 3 evaluations of 224 encoded images each",
        "disk: about ",
        "peak memory: ",
        "total, one job at a time: ",
    ):
        assert line in done.stdout
    content = yaml.safe_load(Path(TINY).read_text())
    content["dataset"]["train_per_photo"] = 11
    message = refused("plan", changed(tmp_path, content))
    assert "not the data set of this experiment (settings: dataset.train_per_photo 10 -> 11)" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretrain", "--method", MOCHI, "--seed", "7"), "seed: found 7; mochi-16-24-8 has: 0, 1"),
        (
            ("pretrain", "--method", "moco-v3", "--seed", "0"),
            "unknown key 'moco-v3'; allowed: mochi-16-24-8, random-init",
        ),
        (
            ("evaluate", "top1", "--method", MOCHI, "--seed", "0"),
            "task: found 'top1'; tiny has: linear, knn",
        ),
        (("detect", "voc", "--method", MOCHI, "--seed", "0"), "set: found 'voc'; tiny has: none"),
        (("scenes", "data/voc"), "DIR: found data/voc;"),
    ],
)
def test_names_that_the_experiment_does_not_have_are_refused(
    arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(*arguments, "--config", TINY)


def test_missing_inputs_are_named_before_any_compute() -> None:
    run_of = ["--config", TINY, "--method", MOCHI, "--seed", "0"]
    message = refused("pretrain", *run_of)
    assert "data/photo-patches-tiny/manifest.json: not found" in message
    assert f"results/tiny/encoders/{MOCHI}/seed0/encoder.safetensors: not found" in refused(
        "evaluate", "knn", *run_of
    )


def test_an_output_folder_that_cannot_be_written_is_refused(data: Path, tmp_path: Path) -> None:
    """A file has its name: refused before any compute, even for root."""
    (tmp_path / "results").write_text("mine")
    message = refused("pretrain", "--config", TINY, "--method", "random-init", "--seed", "0")
    assert "results cannot be written there" in message
    assert (tmp_path / "results").read_text() == "mine"


def test_any_encoder_can_be_evaluated_into_a_given_folder(data: Path, tmp_path: Path) -> None:
    of_run = ["--config", TINY, "--method", "random-init", "--seed", "0"]
    assert run("pretrain", *of_run).returncode == 0
    encoder = tmp_path / "results/tiny/encoders/random-init/seed0/encoder.safetensors"
    shutil.move(encoder, tmp_path / "mine.safetensors")
    done = run("evaluate", "knn", *of_run, "--encoder", "mine.safetensors", "--out", "mine")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "mine/metrics.json").read_text())["k"] == 5
    record = json.loads((tmp_path / "mine/provenance.json").read_text())
    assert record["inputs"]["encoder"]["path"] == "mine.safetensors"


def test_a_result_that_another_process_computed_meanwhile_is_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job of a killed workflow may end while the next workflow's job waits for its lock."""
    of_run = ["--config", TINY, "--method", "random-init", "--seed", "0"]
    assert run("pretrain", *of_run).returncode == 0
    Path("results").rename("elsewhere")

    @contextmanager
    def waiting(_: Path) -> Iterator[None]:
        shutil.rmtree("results")
        Path("elsewhere").rename("results")
        yield

    monkeypatch.setattr("mochi.runtime.locks.locked", waiting)
    before = Path("elsewhere/tiny/encoders/random-init/seed0/encoder.safetensors").stat()
    done = run("pretrain", *of_run)
    assert done.returncode == 0
    assert "up to date, computed by another process meanwhile" in done.stderr
    after = Path("results/tiny/encoders/random-init/seed0/encoder.safetensors").stat()
    assert (after.st_ino, after.st_mtime) == (before.st_ino, before.st_mtime)
    assert not Path("work").exists()


def test_more_epochs_start_from_the_beginning_and_say_so(data: Path, tmp_path: Path) -> None:
    """With more epochs the learning rate differs at every step: no checkpoint can be continued."""
    of_run = ["--method", MOCHI, "--seed", "0"]
    assert run("pretrain", "--config", TINY, *of_run).returncode == 0
    before = (tmp_path / f"results/tiny/encoders/{MOCHI}/seed0/encoder.safetensors").read_bytes()
    content = yaml.safe_load(Path(TINY).read_text())
    content["pretrain"] |= {"epochs": 3, "lr": 1.0e30}  # it diverges, so the new result is never complete
    done = run("pretrain", "--config", changed(tmp_path, content), *of_run)
    assert done.returncode == 1
    assert "recipe.epochs 2 -> 3" in done.stderr
    assert "to keep both, add a row with the new epochs" in done.stderr
    assert (tmp_path / f"results/tiny/encoders/{MOCHI}/seed0/encoder.safetensors").read_bytes() == before


def test_own_images_from_the_command_line(tmp_path: Path) -> None:
    """As in the README: hidden files are ignored, corrupt ones listed, the rest stored."""
    for split, number in (("train", 6), ("val", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", (20 + index, 24), (index, 0, 0)).save(folder / f"{index}.jpg")
    (tmp_path / "images/train/cat/.DS_Store").write_text("x")
    (tmp_path / "images/train/cat/bad.jpg").write_bytes(b"no image")
    options = ["--source", "folder", "--path", "images", "--out", "data/mine"]
    done = run("prepare", *options, "--option", "max_unreadable=0.2")
    assert done.returncode == 0, done.stderr
    assert "train: 12 images" in done.stdout
    assert "bad.jpg" in (tmp_path / "data/mine/quarantine.csv").read_text()
    assert "up to date" in run("prepare", *options, "--option", "max_unreadable=0.2").stderr
    assert "more than max_unreadable" in refused("prepare", *options)
    assert "unknown key 'max_unredable'" in refused("prepare", *options, "--option", "max_unredable=0.2")
    (tmp_path / "empty").mkdir()
    assert "0 images" in refused("prepare", "--source", "folder", "--path", "empty", "--out", "data/mine")


def test_a_missing_experiment_says_where_to_run_the_command() -> None:
    message = refused("check")
    assert "config/config.yaml: no such file; name an experiment file, or run the command in the" in message


def test_adopt_names_a_missing_file_that_no_stage_computes() -> None:
    """Snakemake would stop without a message."""
    message = refused("adopt", str(ROOT / "config/bccd.yaml"))
    assert "data/bccd/BCCD/ImageSets/Main/train.txt: not found; " in message
    assert "put it there" in message


def test_inspect_reports_on_a_folder_of_images(tmp_path: Path) -> None:
    """As text and as JSON; a mistake is named."""
    folder = tmp_path / "images/train/cat"
    folder.mkdir(parents=True)
    for index in range(4):
        Image.new("RGB", (40, 30 + index), (index, 0, 0)).save(folder / f"{index}.png")
    done = run("inspect", "images", "--report", "report.json")
    assert done.returncode == 0, done.stderr
    assert "train: 3 images, 3 labelled" in done.stdout
    assert "val: 1 image, 1 labelled" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["splits"]["train"]["images"] == 3
    assert "nowhere" in refused("inspect", "nowhere")


def test_errors_have_no_control_characters_in_names() -> None:
    """A terminal would execute them."""
    assert refused("inspect", "images \x07\x9b2J").startswith(r"error: images \x07\x9b2J: no such folder")


@pytest.mark.parametrize(
    "command",
    [
        ("check", "x.yaml"),
        ("pretrain", "--config", "x.yaml", "--method", MOCHI, "--seed", "0"),
        ("export", "x.safetensors", "--format", "timm", "--out", "y.safetensors"),
        ("features", "--encoder", "x.safetensors", "--images", "images", "--out", "f.npz"),
        ("inspect", "images"),
    ],
)
def test_inputs_that_may_not_be_read_end_as_other_mistakes_do(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """typer would check them first, and end with code 2 and a frame."""
    for name in ("x.yaml", "x.safetensors"):
        Path(name).write_text("nothing")
    Path("images").mkdir()
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    refused(*command)


def test_a_terminal_without_some_letters_and_a_removed_folder(tmp_path: Path) -> None:
    """A console of Latin-1 ended in a traceback, a removed folder in the crash of a library."""
    for name in ("\U0001f436", "é"):
        (tmp_path / "images/train" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "images/train" / name / "0.png")
    command = [sys.executable, "-m", "mochi", "inspect", "images"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert b"images: 2 files that may be images" in done.stdout
    gone = tmp_path / "gone"
    gone.mkdir()
    shell = ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", *command]
    done = subprocess.run(shell, cwd=gone, env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: the current folder was removed")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(13, "Permission denied", "train/cat"),
            "train/cat: Permission denied; let this user",
        ),
        (
            BlockingIOError(11, "Resource temporarily unavailable"),
            "unavailable; processes or threads cannot",
        ),
        (RuntimeError("can't start new thread"), "can't start new thread; start fewer"),
        (
            OSError(24, "Too many open files", "a.jpg"),
            "a.jpg: Too many open files; raise the limit on open",
        ),
        (
            OSError(28, "No space left on device"),
            "No space left on device; free disk space (or inodes: see `df -i`)",
        ),
        (MemoryError("unable to allocate 9 GiB"), "not enough memory; end other programs"),
        (FileNotFoundError(2, "No such file or directory", "a.jpg"), "a.jpg: No such file or directory\n"),
    ],
)
def test_errors_of_the_system_say_what_to_do(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mochi.data.inspect.inspect", fail)
    assert message in refused("inspect", str(tmp_path))


def test_a_log_on_a_full_disk_does_not_end_a_command(tmp_path: Path) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "images/a/0.png")
    command = [sys.executable, "-m", "mochi", "inspect", "images"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=tmp_path, env=buffered | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
            stderr=full, check=False,
        )  # fmt: skip
    assert done.returncode == 0
    assert b"1 files that may be images" in done.stdout


def test_check_counts_what_it_ignores_in_a_folder(tmp_path: Path) -> None:
    """Links of git-annex without their content were left out without a word."""
    for number in range(40):
        path = tmp_path / "photos" / ("train" if number % 2 else "val") / f"c{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 50), (number, 0, 0)).save(path)
    for number in range(3):
        (tmp_path / f"photos/train/c1/x{number}.jpg").symlink_to(".git/annex/objects/x")
    (tmp_path / "photos/train/c1/.DS_Store").write_text("x")
    folder = {"source": "folder", "name": "mine", "path": str(tmp_path / "photos")}
    output = run("check", changed(tmp_path, {"dataset": folder})).stdout
    assert (
        "warning: dataset: 3 files are broken links or not regular (git-annex, DVC: fetch them)" in output
    )
    assert "note: dataset: ignored: 1 hidden or system file\n" in output
