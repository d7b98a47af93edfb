"""The tiny experiment with Snakemake, as a user runs it."""

import json
import shutil

import pandas as pd
import pytest
import yaml
from PIL import Image

from tests.commands import run
from tests.project import CONFIG, ENCODER, MOCHI, Project

QUERIES = ("--dry-run", "--lint", "--dag", "--list")


def test_all_results_exist(project: Project) -> None:
    results = project.folder / "results/tiny"
    for each in ("random-init/seed0", f"{MOCHI}/seed0", f"{MOCHI}/seed1"):
        for file in (
            "encoder.safetensors",
            "head.safetensors",
            "metrics.csv",
            "matching.csv",
            "provenance.json",
        ):
            assert (results / "encoders" / each / file).stat().st_size > 0
        for task in ("linear", "knn"):
            assert (results / "evaluations" / each / task / "metrics.json").stat().st_size > 0
    table = pd.read_csv(results / "summary.csv")
    assert {"difference", "low", "high", "published", "source"} <= set(table.columns)
    row = table[(table["method"] == MOCHI) & (table["task"] == "knn")].iloc[0]
    values = [
        json.loads((results / f"evaluations/{MOCHI}/seed{seed}/knn/metrics.json").read_text())["top1"]
        for seed in (0, 1)
    ]
    assert row["n"] == 2
    assert row["mean"] == pytest.approx(round(sum(values) / 2, 4))
    assert row["std"] == pytest.approx(pd.Series(values).std(), abs=1e-4)
    assert f"| {MOCHI} |" in (results / "summary.md").read_text()
    for name in ("accuracy", "loss", "proxy-task"):
        assert (results / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert MOCHI in (results / "report.html").read_text()
    assert not list((project.folder / "work").rglob("*")), "resume checkpoints are left behind"
    logs = project.folder / f"logs/tiny/{MOCHI}/seed0"
    assert list((logs / "tensorboard-pretrain").glob("events.*"))
    assert "epoch 1: loss" in (logs / "pretrain.log").read_text()
    assert not list(logs.glob("*.part"))


def test_a_second_run_has_nothing_to_do(project: Project) -> None:
    for path in [*project.folder.glob("data/*/*"), *project.folder.rglob("encoder.safetensors")]:
        path.touch()
    assert project.jobs() == {}, "newer files with the same content re-run nothing"


def test_queries_change_no_file(copy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if results are stale."""
    monkeypatch.chdir(copy.folder)
    monkeypatch.delenv("MOCHI_CONFIG", raising=False)
    copy.edit(CONFIG, "k: 5", "k: 4")
    copy.edit("mochi/contrast/negatives.py", "MAX_QUERY_SHARE = 0.5", "MAX_QUERY_SHARE = 0.4")
    before = copy.listing()
    outputs = {query: copy.succeed("snakemake", "--cores", "1", query) for query in QUERIES}
    for query in (["check"], ["explain", MOCHI, "knn"]):
        assert run(*query).returncode == 0
    after = copy.listing()
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    # Snakemake writes a log of each call and a cache of the files on disk; nothing else may change.
    assert {
        name for name in changed if not name.startswith((".snakemake/log/", ".snakemake/iocache/"))
    } == set()
    assert "your workflow is in a good condition" in outputs["--lint"]


def test_a_stage_that_is_up_to_date_imports_no_torch(project: Project) -> None:
    code = (
        "import sys\nfrom mochi import cli\n"
        "try: cli.main()\n"
        "except SystemExit as stop: sys.exit(stop.code or 'torch' in sys.modules)"
    )
    arguments = ["pretrain", "--method", MOCHI, "--seed", "0", "--gpus", "0"]
    done = project.run("python", "-c", code, *arguments)
    assert "up to date" in done.stderr
    assert done.returncode == 0, done.stderr


def test_a_report_that_is_up_to_date_is_not_written_again(project: Project) -> None:
    report = project.folder / "results/tiny/report.html"
    before = report.stat().st_mtime_ns
    done = project.run("python", "-m", "mochi", "report", "--config", CONFIG)
    assert done.returncode == 0
    assert "up to date" in done.stderr
    assert report.stat().st_mtime_ns == before


def test_an_experiment_file_may_be_renamed_and_share_its_data(copy: Project) -> None:
    (copy.folder / CONFIG).rename(copy.folder / "config/renamed.yaml")
    shutil.copy(copy.folder / "config/renamed.yaml", copy.folder / "config/other.yaml")
    copy.edit("config/other.yaml", "name: tiny", "name: other")
    assert copy.jobs("--configfile", "config/renamed.yaml") == {}
    assert "prepare" not in copy.jobs("--configfile", "config/other.yaml")


def test_added_images_make_the_data_set_stale(copy: Project) -> None:
    photos = copy.folder / "photos"
    for split, count in (("train", 24), ("val", 4)):
        for label in ("a", "b"):
            (photos / split / label).mkdir(parents=True)
            for number in range(count):
                picture = Image.new("RGB", (20, 20 + number % 3), (5 * number, 0, 0))
                picture.save(photos / split / label / f"{number}.png")
    experiment = yaml.safe_load((copy.folder / CONFIG).read_text())
    experiment["dataset"] = {"source": "folder", "name": "mine", "path": "photos"}
    (copy.folder / CONFIG).write_text(yaml.safe_dump(experiment, sort_keys=False))
    manifest = "data/mine/manifest.json"
    assert copy.snakemake(manifest).returncode == 0
    assert copy.jobs(manifest) == {}
    shutil.copy(photos / "train/a/0.png", photos / "train/b/more.png")
    assert copy.jobs(manifest) == {"prepare": 1}
    assert copy.snakemake(manifest).returncode == 0
    assert copy.jobs(manifest) == {}
    photos.rename(copy.folder / "elsewhere")
    assert copy.jobs(manifest) == {}


def test_a_mistake_gives_one_line_before_anything_runs(copy: Project) -> None:
    copy.edit(CONFIG, "queue_size:", "queue_sise:")
    done = copy.snakemake()
    assert done.returncode != 0
    assert "pretrain.queue_sise: unknown key 'queue_sise'; did you mean 'queue_size'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_job_shows_its_error_and_how_to_continue(copy: Project) -> None:
    copy.edit(CONFIG, "  lr: 0.06", "  lr: 1.0e+30")
    done = copy.snakemake(ENCODER)
    assert done.returncode != 0
    last = done.stderr.rstrip().splitlines()
    assert any("pretrain.log: error: " in line and "lr" not in line[:20] for line in last)
    assert any("run the same command to continue" in line for line in last)


def test_settings_on_the_command_line_are_refused(project: Project) -> None:
    done = project.snakemake("--config", "seeds=[7]")
    assert done.returncode != 0
    assert "copy the experiment file, change the setting and the name there" in done.stderr


def test_an_experiment_file_is_utf_8_whatever_the_locale(copy: Project) -> None:
    copy.edit(CONFIG, "title: Tiny", "title: Tïny")
    locale = ("env", "LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0")
    copy.succeed(*locale, "snakemake", "--cores", "1", "--dry-run")


@pytest.mark.parametrize(("arguments", "limit"), [((), 1), (("--resources", "gpu=2"), 2)])
def test_jobs_are_limited_to_the_visible_gpus(
    copy: Project, arguments: tuple[str, ...], limit: int
) -> None:
    """On a host that reports one GPU. `--touch` starts jobs without computing anything."""
    one_gpu = ("env", "CUDA_VISIBLE_DEVICES=0")
    output = copy.succeed(*one_gpu, "snakemake", "--cores", "16", "--touch", "--forceall", *arguments)
    assert f'gpu=Resource("gpu", {limit})' in output
