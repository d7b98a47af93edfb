"""The Slurm profile on a real Slurm, compared with plain `snakemake`: whatever happens to jobs, the same
bytes.

One job is killed, one is stopped until it exceeds its wall time, one runs on two nodes; then a job that
cannot succeed must end the workflow instead of making it wait.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm
import yaml

ROOT = Path(__file__).resolve().parents[1]
KILLED, STOPPED = "mochi-16-24-8/seed0", "mochi-16-24-8/seed1"
SNAKEMAKE = str(Path(sys.executable).parent / "snakemake")


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with slurm.running(tmp_path_factory.mktemp("slurm")):
        yield


def clone(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A clone whose default experiment is the tiny one, with trainings long enough to be interrupted."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    experiment = yaml.safe_load((ROOT / "tests" / "tiny.yaml").read_text())
    experiment["dataset"]["train_per_photo"] = 40
    experiment["pretrain"]["epochs"] = 12
    if change:
        change(experiment)
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))
    profile = folder / "profiles" / "slurm" / "config.yaml"
    adapted = yaml.safe_load(profile.read_text()) | {
        "set-threads": {"pretrain": 1, "evaluate": 1, "analyze": 1},
        "default-resources": {"mem_mb": 1000, "runtime": 5},
        "latency-wait": 10,
        "slurm-init-seconds-before-status-checks": 3,
        "seconds-between-status-checks": 3,
    }
    for rule in ("pretrain", "evaluate", "analyze"):
        adapted["set-resources"][rule] |= {"mem_mb": 1000, "runtime": 1}
    profile.write_text(yaml.safe_dump(adapted))
    return folder


def start(folder: Path, *options: str) -> "subprocess.Popen[bytes]":
    """Start `snakemake --profile profiles/slurm` with its output in snakemake.txt."""
    with (folder / "snakemake.txt").open("wb") as log:
        return subprocess.Popen(
            [SNAKEMAKE, "--profile", "profiles/slurm", *options],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "MOCHI_DEVICE": "cpu",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            start_new_session=True,
        )


def finish(process: "subprocess.Popen[bytes]", seconds: int) -> int:
    """Its exit code; after a time limit SIGKILL, since on SIGTERM Snakemake waits for its jobs."""
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def training(folder: Path, run: str) -> int | None:
    """The process that trains a run, once it has written a checkpoint."""
    checkpoints = list((folder / "work" / "tiny" / run).glob("pretrain/*/checkpoint.safetensors"))
    method, seed = run.split("/seed")
    shown = subprocess.run(
        ["pgrep", "-f", f"mochi pretrain --method {method} --seed {seed}"],
        capture_output=True,
        text=True,
        check=False,
    )
    for pid in map(int, shown.stdout.split()):
        proc = Path(f"/proc/{pid}")
        words = (proc / "cmdline").read_bytes().split(b"\0") if proc.exists() else [b""]
        # Shells and Snakemake have the same words in one argument.
        if words[0].endswith(b"python") and (proc / "cwd").resolve() == folder.resolve() and checkpoints:
            return pid
    return None


def digests(folder: Path) -> dict[str, str]:
    """Digests of what must not depend on interruptions; times and speeds are in other files."""
    files = [
        path
        for pattern in ("**/encoder.safetensors", "**/metrics.json", "summary.csv")
        for path in (folder / "results" / "tiny").glob(pattern)
    ]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_killed_job_and_one_out_of_time_resume_and_change_nothing(tmp_path: Path) -> None:
    plain = clone(tmp_path / "plain")
    subprocess.run([SNAKEMAKE, "--cores", "2"], cwd=plain, check=True, capture_output=True, timeout=600)

    folder = clone(tmp_path / "a cluster")
    process = start(folder)
    done: set[str] = set()
    deadline = time.monotonic() + 240
    while len(done) < 2 and process.poll() is None and time.monotonic() < deadline:
        for run, sent in ((KILLED, signal.SIGKILL), (STOPPED, signal.SIGSTOP)):
            pid = None if run in done else training(folder, run)
            if pid is not None:
                os.kill(pid, sent)
                done.add(run)
        time.sleep(0.05)
    code = finish(process, 600)
    output = (folder / "snakemake.txt").read_text()
    assert done == {KILLED, STOPPED}, output
    assert code == 0, output
    assert "TIMEOUT" in output
    assert "FAILED" in output
    for run in (KILLED, STOPPED):
        assert " resumes at epoch " in (folder / "logs" / "tiny" / run / "pretrain.log").read_text()
    assert len(digests(folder)) == 3 + 6 + 1
    assert digests(folder) == digests(plain)
    assert not list((folder / "work").rglob("*.safetensors"))


def test_one_run_over_two_nodes(tmp_path: Path) -> None:
    """torchrun on both nodes; without GPUs its two ranks use CPUs."""

    def change(experiment: dict[str, Any]) -> None:
        experiment["seeds"] = [0]
        experiment["methods"] = {"moco-v2": {"epochs": 1, "matching_epochs": []}}

    folder = clone(tmp_path / "nodes", change)
    profile = folder / "profiles" / "slurm" / "config.yaml"
    adapted = yaml.safe_load(profile.read_text())
    adapted["set-resources"]["pretrain"] |= {"gpu": 2, "nodes": 2, "mpi": "srun", "tasks": 2}
    profile.write_text(yaml.safe_dump(adapted))
    result = "results/tiny/encoders/moco-v2/seed0/encoder.safetensors"
    code = finish(start(folder, "--retries", "0", result), 240)
    assert code == 0, (folder / "snakemake.txt").read_text()
    provenance = json.loads((folder / result).with_name("provenance.json").read_text())
    assert provenance["world_size"] == 2


def test_a_job_that_cannot_succeed_ends_the_workflow(tmp_path: Path) -> None:
    def change(experiment: dict[str, Any]) -> None:
        experiment["methods"] = {"moco-v2": {"batch_size": 4096}}
        experiment["seeds"] = [0]

    folder = clone(tmp_path / "fails", change)
    code = finish(start(folder, "--retries", "0"), 240)
    output = (folder / "snakemake.txt").read_text()
    assert code == 1, output
    log = folder / "logs" / "tiny" / "moco-v2" / "seed0" / "pretrain.log"
    assert "error: " in log.read_text()
