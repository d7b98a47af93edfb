"""SIGKILL of a fine-tuning, its workers and ranks, at random moments: the numbers equal those of an
uninterrupted run.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from mochi import encoders
from mochi.config import load_experiment
from mochi.encoders.files import save_encoder
from tests.detection.sets import tiny_with_detection

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MOCHI_DEVICE": "cpu"}
KILLS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny experiment with a detection set whose fine-tunings are long enough to be killed."""
    folder = tmp_path_factory.mktemp("kills")
    content = tiny_with_detection(methods=["random-init"])
    content["evaluation"]["detection"]["few"]["training"] |= {
        "micro_batch": 1, "seeds": [0, 1], "iterations": 60, "lr_drops": [40], "checkpoint_minutes": 1e-9,
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    experiment = load_experiment(folder / "tiny.yaml")
    save_encoder(folder / "encoder.safetensors", encoders.build(experiment.encoder, seed=0))
    scenes = [sys.executable, "-m", "mochi", "scenes", "data/few-scenes", "--config", "tiny.yaml"]
    subprocess.run(scenes, cwd=folder, env=ENVIRONMENT, check=True)
    return folder


def command(processes: int, workers: int, out: str) -> list[str]:
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [
        *start, "mochi", "detect", "few", "--method", "random-init", "--seed", "0", "--config", "tiny.yaml",
        "--encoder", "encoder.safetensors", "--out", out, "--workers", str(workers * processes),
    ]  # fmt: skip


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "metrics.json").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[int, str]:
    """Number of processes -> digest of an uninterrupted run; on two, batch norm uses other parts of a
    batch.
    """
    digests = {}
    for processes in (1, 2):
        out = f"uninterrupted{processes}"
        subprocess.run(command(processes, 0, out), cwd=folder, env=ENVIRONMENT, check=True, timeout=300)
        digests[processes] = digest(folder / out)
    return digests


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_random_kills_change_nothing(
    folder: Path, uninterrupted: dict[int, str], processes: int, workers: int
) -> None:
    out = f"killed{processes}-{workers}"
    rng, killed = np.random.default_rng(10 * processes + workers), 0
    while killed < KILLS:
        process = subprocess.Popen(
            command(processes, workers, out), cwd=folder, env=ENVIRONMENT, start_new_session=True
        )
        deadline = time.monotonic() + 300
        while not list((folder / "work").rglob("*.safetensors")):
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(rng.random() * 2)
        os.killpg(process.pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed += 1
        assert not (folder / out / "metrics.json").exists(), "the run is too short to be killed"
    subprocess.run(command(processes, workers, out), cwd=folder, env=ENVIRONMENT, check=True, timeout=300)
    assert digest(folder / out) == uninterrupted[processes]
    assert not list((folder / "work").rglob("*.safetensors"))
