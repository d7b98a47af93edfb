"""`mochi status`: what runs, what failed and why, from the files that jobs write."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mochi.config import Column, Experiment
from mochi.layout import Paths
from mochi.runtime import job_status
from mochi.runtime.progress import Progress
from mochi.status import status
from tests.commands import refused, run
from tests.report.made_up import make_up

TINY = str(Path(__file__).parents[1] / "tests/tiny.yaml")
RUN = ["--config", TINY, "--method", "random-init", "--seed", "0"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOCHI_CONFIG", raising=False)


def row(label: str) -> list[str]:
    """The cells of the row of a run."""
    (line,) = (line for line in run("status", TINY).stdout.splitlines() if line.startswith(f"{label}  "))
    return [cell.strip() for cell in line.removeprefix(label).split("  ") if cell.strip()]


def test_before_anything_has_started_nothing_is_written(tmp_path: Path) -> None:
    done = run("status", TINY)
    assert done.returncode == 0
    assert done.stdout.startswith("tiny: ")
    assert " not started" in done.stdout.splitlines()[0]
    assert row("random-init seed 0")[0] == "not started"
    assert list(tmp_path.iterdir()) == []


def test_a_running_job_shows_its_progress(tmp_path: Path) -> None:
    job_folder = Paths("tiny").work("mochi-16-24-8", 1, "pretrain")
    job_folder.mkdir(parents=True)
    with job_status.reported(job_folder), Progress("label", 40) as progress:
        for _ in range(10):
            progress.advance("loss 3.2")
        job_status.report(now=True, health="learning", accuracy=0.125)
        assert row("mochi-16-24-8 seed 1")[:2] == ["pretrain", "10/40 (25%)"]
        assert row("mochi-16-24-8 seed 1")[-2:] == ["12.5%", "learning"]
        assert "1 running" in run("status", TINY).stdout
    assert row("mochi-16-24-8 seed 1")[0] == "not started"
    assert list(job_folder.iterdir()) == [], "a job that succeeds leaves no file"


def test_a_finished_run_shows_the_main_number_of_each_evaluation(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any task, also one whose first column is no top-1."""
    make_up(tiny, lambda *job: {"top1": 8.0, "recall": 31.25})
    monkeypatch.setattr("mochi.status.columns", lambda experiment, task: {"recall": Column("R@1")})
    (line,) = (line for line in status(tiny) if line.startswith("random-init seed 0 "))
    assert line.endswith("linear 31.2, knn 31.2")


def test_a_failed_job_names_its_error_and_the_last_line_of_its_log(tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "data" / tiny_data.name)
    assert run("pretrain", *RUN).returncode == 0
    assert row("random-init seed 0")[0] == "waiting"
    encoder = Paths("tiny").encoder("random-init", 0)
    encoder.write_bytes(b"no encoder")
    assert "cannot be read as safetensors" in refused("evaluate", "knn", *RUN)
    log = Paths("tiny").log("random-init", 0, "knn.log")
    log.parent.mkdir(parents=True)
    log.write_text("reading\nerror: it is no encoder\nTraceback of something else\n")
    output = run("status", TINY).stdout
    assert "1 failed" in output.splitlines()[0]
    assert "random-init seed 0 knn failed: " in output
    assert f"{log}: error: it is no encoder" in output
    assert "the same snakemake command continues" in output
    assert row("random-init seed 0")[0] == "knn (failed)"


def test_a_killed_job_is_interrupted_not_running(tmp_path: Path) -> None:
    job_folder = Paths("tiny").work("random-init", 0, "pretrain")
    job_folder.mkdir(parents=True)
    code = (
        "import os, sys; from pathlib import Path; from mochi.runtime import job_status\n"
        "with job_status.reported(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, str(job_folder)], check=False, env=environment)
    assert (job_folder / "status.json").exists()
    assert row("random-init seed 0")[0] == "pretrain (interrupted)"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"state": 1}', '{"state": "running", "strange": 2}'])
def test_a_damaged_status_file_is_ignored(content: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(content)
    assert job_status.read(tmp_path) is None


def test_a_job_on_another_host_runs_while_it_reports(tmp_path: Path) -> None:
    status = {"state": "running", "host": "elsewhere", "process": 1, "updated": time.time()}
    (tmp_path / "status.json").write_text(json.dumps(status))
    found = job_status.read(tmp_path)
    assert found is not None
    assert found.alive()
    (tmp_path / "status.json").write_text(json.dumps(status | {"updated": time.time() - 300}))
    found = job_status.read(tmp_path)
    assert found is not None
    assert not found.alive()
