"""The tiny experiment through Snakemake, as a user runs it: everything is made, then nothing is left to do,
and a change re-runs what depends on it and no more."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

from mochi.config import RUN_VERSION
from tests.project import CONFIG, Project

MOCHI = "mochi-16-24-8"


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return finished.copy(tmp_path_factory.mktemp("workflow") / "mochi é")


def test_everything_is_there(project: Project) -> None:
    results = project.folder / "results/tiny"
    for run in ("random-init/seed0", f"{MOCHI}/seed0", f"{MOCHI}/seed1"):
        for file in (
            "pretrain/run.yaml",
            "pretrain/encoder.safetensors",
            "linear/metrics.json",
            "knn/metrics.json",
        ):
            assert (results / run / file).stat().st_size > 0
    table = pd.read_csv(results / "tables/summary.csv")
    assert list(table.columns) == [
        "method", "task", "metric", "mean", "std", "n", "published", "published_std", "source"
    ]  # fmt: skip
    row = table[(table["method"] == MOCHI) & (table["task"] == "knn")].iloc[0]
    values = [
        json.loads((results / f"{MOCHI}/seed{seed}/knn/metrics.json").read_text())["top1"]
        for seed in (0, 1)
    ]
    assert row["n"] == 2
    assert row["mean"] == pytest.approx(round(sum(values) / 2, 4))
    assert row["std"] == pytest.approx(pd.Series(values).std(), abs=1e-4)
    assert f"| {MOCHI} |" in (results / "tables/summary.md").read_text()
    for name in ("accuracy", "training", "negatives"):
        assert (results / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list((project.folder / "work").rglob("*.safetensors")), "resume checkpoints are left behind"
    assert list((project.folder / f"logs/tiny/{MOCHI}/seed0/tensorboard").glob("events.*"))


def test_afterwards_there_is_nothing_to_do(project: Project) -> None:
    assert project.jobs() == {}
    for path in [*project.folder.glob("data/*/*"), *project.folder.rglob("encoder.safetensors")]:
        path.touch()
    assert project.jobs() == {}, "newer files with the same bytes are no reason"


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        (CONFIG, "title:", "# a comment\ntitle:", {}),
        (CONFIG, "lr_drops: [3]", "lr_drops: [4]", {"resolve": 3, "evaluate": 3, "tables": 1, "figures": 1}),
        (CONFIG, "k: 5", "k: 4", {"resolve": 3, "evaluate": 3, "tables": 1, "figures": 1}),
        (
            CONFIG, "num_pair_synthetics: 24, num_query_synthetics: 8, warmup_epochs: 1",
            "num_pair_synthetics: 24, num_query_synthetics: 8, warmup_epochs: 0",
            {"resolve": 2, "pretrain": 2, "evaluate": 4, "tables": 1, "figures": 1},
        ),
        ("mochi/contrast/loss.py", 'The contrastive loss over', 'A new docstring of the loss over', {}),
        (
            "mochi/contrast/negatives.py", "MAX_QUERY_SHARE = 0.5", "MAX_QUERY_SHARE = 0.4",
            {"code": 1, "pretrain": 3, "evaluate": 6, "tables": 1, "figures": 1},
        ),
        (
            "mochi/evaluation/knn.py", "/ temperature).exp()", "/ temperature).exp() + 0",
            {"code": 1, "evaluate": 3, "tables": 1, "figures": 1},
        ),
        ("mochi/report/tables.py", '"top-1"', '"top1"', {"code": 1, "tables": 1}),
    ],
    ids=["comment", "probe", "knn", "method", "docstring", "formula", "vote", "table"],
)  # fmt: skip
def test_a_change_reruns_what_depends_on_it(
    project: Project, file: str, old: str, new: str, expected: dict[str, int]
) -> None:
    path = project.folder / file
    before = path.read_text()
    project.edit(file, old, new)
    try:
        assert project.jobs() == expected
    finally:
        path.write_text(before)


def cloned(project: Project, folder: Path, edit: tuple[str, str, str]) -> Project:
    """A copy with one edit, whose files are all of one time, as in a clone: no date tells of the edit."""
    clone = project.copy(folder)
    clone.edit(*edit)
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (10**9, 10**9))
    return clone


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        (CONFIG, "title:", "# a comment\ntitle:", {}),
        (CONFIG, "k: 5", "k: 4", {"resolve": 3, "evaluate": 3, "tables": 1, "figures": 1}),
        (
            "mochi/contrast/negatives.py", "MAX_QUERY_SHARE = 0.5", "MAX_QUERY_SHARE = 0.4",
            {"code": 1, "pretrain": 3, "evaluate": 6, "tables": 1, "figures": 1},
        ),
        ("mochi/report/tables.py", '"top-1"', '"top1"', {"code": 1, "tables": 1}),
        (CONFIG, "title: ", "title: Another, ", {"tables": 1, "figures": 1}),
        (CONFIG, "seeds: [0, 1]}", "seeds: [0]}", {"tables": 1, "figures": 1}),
        (
            CONFIG, "train_per_photo: ", "train_per_photo: 1",
            {"resolve": 9, "prepare": 1, "pretrain": 3, "evaluate": 6, "tables": 1, "figures": 1},
        ),
    ],
    ids=["comment", "setting", "formula", "table", "title", "rows", "data"],
)  # fmt: skip
def test_results_that_snakemake_does_not_remember_are_held_to_their_own_record(
    project: Project, tmp_path: Path, file: str, old: str, new: str, expected: dict[str, int]
) -> None:
    clone = cloned(project, tmp_path / "clone", (file, old, new))
    shutil.rmtree(clone.folder / ".snakemake")
    assert clone.jobs() == expected
    assert clone.jobs() == expected, "a dry run has changed the answer"


def test_settings_of_an_older_version_are_resolved_anew(project: Project, tmp_path: Path) -> None:
    edit = ("mochi/evaluation/knn.py", "/ temperature).exp()", "/ temperature).exp() + 0")
    clone = cloned(project, tmp_path / "clone", edit)
    shutil.rmtree(clone.folder / ".snakemake")
    for path in (clone.folder / "results/tiny").glob("*/*/knn/run.yaml"):
        path.write_text(path.read_text().replace(f"version: {RUN_VERSION}", f"version: {RUN_VERSION - 1}"))
    assert clone.jobs() == {"code": 1, "resolve": 3, "evaluate": 3, "tables": 1, "figures": 1}


def test_results_that_git_has_replaced_are_told_by_their_own_record(
    project: Project, tmp_path: Path
) -> None:
    """Snakemake remembers the files of one settings, and `git checkout` has brought those of another."""
    clone = project.copy(tmp_path / "clone")
    committed = shutil.copytree(clone.folder / "results", tmp_path / "committed")
    clone.edit(CONFIG, "k: 5", "k: 4")
    assert clone.snakemake().returncode == 0
    assert clone.jobs() == {}
    shutil.rmtree(clone.folder / "results")
    shutil.copytree(committed, clone.folder / "results")
    expected = {"resolve": 3, "evaluate": 3, "tables": 1, "figures": 1}
    assert clone.jobs() == expected
    assert clone.snakemake().returncode == 0
    assert clone.jobs() == {}
    metrics = json.loads((clone.folder / f"results/tiny/{MOCHI}/seed0/knn/metrics.json").read_text())
    assert metrics["k"] == 4


def test_an_experiment_file_may_be_renamed_and_share_its_data(project: Project, tmp_path: Path) -> None:
    clone = project.copy(tmp_path / "clone")
    (clone.folder / CONFIG).rename(clone.folder / "config/renamed.yaml")
    shutil.copy(clone.folder / "config/renamed.yaml", clone.folder / "config/other.yaml")
    clone.edit("config/other.yaml", "name: tiny", "name: other")
    shown = clone.snakemake("--dry-run", "--configfile", "config/renamed.yaml")
    assert "Nothing to be done" in shown.stdout + shown.stderr
    shown = clone.snakemake("--dry-run", "--configfile", "config/other.yaml")
    assert "pretrain " in shown.stdout
    assert "prepare " not in shown.stdout


def test_more_images_in_a_folder_are_another_data_set(project: Project, tmp_path: Path) -> None:
    clone = project.copy(tmp_path / "clone")
    photos = clone.folder / "photos"
    for split, count in (("train", 24), ("val", 4)):
        for label in ("a", "b"):
            (photos / split / label).mkdir(parents=True)
            for number in range(count):
                picture = Image.new("RGB", (20, 20 + number % 3), (5 * number, 0, 0))
                picture.save(photos / split / label / f"{number}.png")
    experiment = yaml.safe_load((clone.folder / CONFIG).read_text())
    experiment["dataset"] = {"source": "folder", "name": "mine", "path": "photos"}
    (clone.folder / CONFIG).write_text(yaml.safe_dump(experiment, sort_keys=False))
    manifest = "data/mine/manifest.json"
    assert clone.snakemake(manifest).returncode == 0
    assert "Nothing to be done" in clone.snakemake("--dry-run", manifest).stdout
    for remembered in (True, False):
        if not remembered:
            shutil.rmtree(clone.folder / ".snakemake")
        shutil.copy(photos / "train/a/0.png", photos / f"train/b/more{remembered}.png")
        assert "prepare " in clone.snakemake("--dry-run", manifest).stdout
        assert clone.snakemake(manifest).returncode == 0
        assert "Nothing to be done" in clone.snakemake("--dry-run", manifest).stdout
    photos.rename(clone.folder / "elsewhere")
    assert "Nothing to be done" in clone.snakemake("--dry-run", manifest).stdout


@pytest.mark.parametrize("remembered", [True, False])
def test_settings_resolved_by_themselves_still_rerun_what_depends_on_them(
    project: Project, tmp_path: Path, remembered: bool
) -> None:
    """As `dvc repro` does it: `snakemake runs` first, the stages after that."""
    clone = cloned(project, tmp_path / "clone", (CONFIG, "k: 5", "k: 4"))
    if not remembered:
        shutil.rmtree(clone.folder / ".snakemake")
    done = clone.snakemake("runs")
    assert done.returncode == 0, done.stderr
    assert clone.jobs() == {"evaluate": 3, "tables": 1, "figures": 1}


def test_a_mistake_is_one_line_before_anything_runs(project: Project) -> None:
    before = (project.folder / CONFIG).read_text()
    project.edit(CONFIG, "queue_size:", "queue_sise:")
    try:
        done = project.snakemake()
    finally:
        (project.folder / CONFIG).write_text(before)
    assert done.returncode != 0
    assert "pretrain.queue_sise: unknown key 'queue_sise'; did you mean 'queue_size'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_on_the_command_line_are_refused(project: Project) -> None:
    done = project.snakemake("--config", "seeds=[7]")
    assert done.returncode != 0
    assert (
        "copy the experiment file, change the line and the name there and pass it with --configfile"
        in done.stderr
    )


@pytest.mark.parametrize(("arguments", "limit"), [((), "1"), (("--resources", "gpu=2"), "2")])
def test_gpus_are_limited_unless_told_otherwise(
    project: Project, arguments: tuple[str, ...], limit: str
) -> None:
    done = project.snakemake("--dry-run", "--forceall", *arguments)
    assert done.returncode == 0
    assert f"gpu={limit}" in done.stderr + done.stdout or "gpu" not in done.stderr
