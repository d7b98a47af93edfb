"""Twenty SIGKILLs of pretraining at random moments, of all processes or of one: the same bytes each
time.

With one and two processes, with and without two loading workers. The images are stored as JPEG, because
workers do not load data sets that are one array.
"""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mochi.config import parse_experiment
from mochi.data.ingest.prepare import prepare
from tests.pretraining.runs import steps_done
from tests.tiny import MOCHI, changed

ROOT = Path(__file__).parents[1]
KILLS = 5
"""Kills in each of the four settings."""
EPOCHS = 20
TIMINGS = {"images_per_second", "data_wait"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (root / "train" / "a").mkdir(parents=True)
    for number in range(160):
        pixels = rng.integers(0, 256, (20 + number % 5, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "train" / "a" / f"{number}.jpg")
    content = changed("dataset", {"source": "folder", "name": "jpegs", "path": str(root)})
    content["pretrain"] |= {"epochs": EPOCHS, "checkpoint_minutes": 1e-9}
    folder = tmp_path_factory.mktemp("kills")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    prepare(parse_experiment(content, "tiny").dataset, folder / "data" / "jpegs", jobs=1)
    return folder


class Training:
    """A folder in which one command trains, as often as needed."""

    def __init__(self, folder: Path, data: Path, processes: int, workers: int) -> None:
        folder.mkdir()
        (folder / "data").symlink_to(data / "data")
        self.folder = folder
        self.output = folder / "output.txt"
        run = ["-m", "mochi"]
        if processes > 1:
            run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            run += ["-m", "--", "mochi"]
        self.command = [sys.executable, *run, "pretrain", "--config", str(data / "tiny.yaml")]
        self.command += ["--method", MOCHI, "--seed", "0", "--workers", str(workers)]

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.output.open("ab") as log:
            return subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def steps(self) -> int:
        found = list(self.folder.glob("work/tiny/*/*/pretrain/*/checkpoint.safetensors"))
        try:
            return steps_done(found[0]) if found else -1
        except (OSError, ValueError):  # it was replaced while it was read
            return -1

    def result(self) -> tuple[bytes, list[dict[str, str]]]:
        """Finish the training; returns the bytes of the encoder and the metrics."""
        assert self.start().wait(600) == 0, self.output.read_text()[-3000:]
        (encoder,) = self.folder.glob("results/tiny/encoders/*/*/encoder.safetensors")
        with encoder.with_name("metrics.csv").open() as file:
            rows = [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]
        return encoder.read_bytes(), rows


def children(process: int) -> list[int]:
    """Processes that a process started."""
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(each) for each in listed]


def kill_all(process: int) -> None:
    """A process and all its descendants; torchrun's ranks have their own process groups."""
    with suppress(OSError):  # the process has ended
        below = children(process)
        os.kill(process, signal.SIGKILL)
        for each in below:
            kill_all(each)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_change_nothing(processes: int, workers: int, data: Path, tmp_path: Path) -> None:
    expected = Training(tmp_path / "whole", data, processes, 0).result()
    training, moments = Training(tmp_path / "killed", data, processes, workers), random.Random(0)  # noqa: S311
    done = 0
    for target in sorted(moments.randrange(1, 3 * EPOCHS) for _ in range(KILLS)):
        process = training.start()
        while training.steps() < target:
            assert process.poll() is None, training.output.read_text()[-3000:]
            time.sleep(0.003)
        time.sleep(moments.uniform(0, 0.02))
        below = children(process.pid)
        if below and done % 2:
            # One rank, or one loading worker: the others end by themselves.
            os.kill(moments.choice(below), signal.SIGKILL)
            assert process.wait(60) != 0
        else:
            kill_all(process.pid)
            process.wait(60)
        done += 1
    assert done == KILLS
    assert training.result() == expected
    assert training.output.read_text().count(" resumes at ") == KILLS
