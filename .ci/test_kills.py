"""SIGKILL of the whole process group at five moments, compared with an uninterrupted run: the same bytes
at the end.

A run after a kill gets no help: no unlock, nothing removed.
"""

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.project import CONFIG, Project, environment

# The file whose appearance triggers the kill: one for each stage of the pipeline.
MOMENTS = {
    "data": "data/*/*",
    "first checkpoint": "work/tiny/*/*/pretrain/*/checkpoint.safetensors",
    "first encoder": "results/tiny/encoders/mochi*/*/encoder.safetensors",
    "first evaluation": "results/tiny/evaluations/mochi*/*/*/metrics.json",
    "report": "results/tiny/.publishing.*",
}


def new(folder: Path) -> Project:
    """The tiny experiment with trainings long enough to be killed."""
    project = Project.new(folder)
    experiment = yaml.safe_load((folder / CONFIG).read_text())
    experiment["dataset"]["train_per_photo"] = 40
    experiment["pretrain"]["epochs"] = 8
    (folder / CONFIG).write_text(yaml.safe_dump(experiment, sort_keys=False))
    return project


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = new(tmp_path_factory.mktemp("kills") / "uninterrupted")
    done = project.snakemake()
    assert done.returncode == 0, done.stderr[-4000:]
    return project


def kill_at(project: Project, command: list[str], pattern: str) -> bool:
    """Start the command and kill its process group once a file exists; returns whether it did."""
    before = set(project.folder.glob(pattern))
    with (project.folder / "output.txt").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=project.folder, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if set(project.folder.glob(pattern)) - before:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
            return True
        time.sleep(0.01)
    return False


def digests(project: Project) -> dict[str, str]:
    results = project.folder / "results" / "tiny"
    patterns = ("**/encoder.safetensors", "**/metrics.json", "summary.csv")
    return {
        str(path.relative_to(results)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in patterns
        for path in results.glob(pattern)
    }


def with_snakemake(_project: Project) -> list[str]:
    return ["snakemake", "--cores", "2"]


def with_dvc(project: Project) -> list[str]:
    project.succeed("git", "init", "--quiet")
    return ["dvc", "repro"]


@pytest.mark.parametrize("prepare", [with_snakemake, with_dvc])
def test_five_kills_change_nothing(
    uninterrupted: Project, tmp_path: Path, prepare: Callable[[Project], list[str]]
) -> None:
    project = new(tmp_path / "killed")
    command = prepare(project)
    for moment, pattern in MOMENTS.items():
        assert kill_at(project, command, pattern), (
            f"{moment}: {(project.folder / 'output.txt').read_text()[-4000:]}"
        )
    done = project.run(*command)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert len(digests(project)) == 3 + 6 + 1
    assert digests(project) == digests(uninterrupted)
    output = (project.folder / "output.txt").read_text() + done.stdout + done.stderr
    assert " resumes at epoch " in output
    assert "unlock" not in output
    assert project.jobs() == {}
    assert not list((project.folder / "work").rglob("*.safetensors"))
    assert not list((project.folder / "results").rglob(".*")), "a killed writer leaves its temporary file"
