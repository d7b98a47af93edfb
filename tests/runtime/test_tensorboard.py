"""Events as TensorBoard reads them, and a training without tensorboard."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mochi.config import Experiment
from mochi.layout import Paths
from mochi.runtime.tensorboard import write_events
from tests.commands import run
from tests.tiny import FILE


def test_the_numbers_of_each_epoch_are_events(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for epoch in (0, 1):
        write_events(tmp_path / "events", {"epoch": epoch, "loss": 2.0 - epoch, "status": "learning"})
    write_events(None, {"epoch": 2})
    events = reader.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"epoch", "loss"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 2.0), (1, 1.0)]


def test_without_tensorboard_there_is_one_warning(tmp_path: Path) -> None:
    code = (
        "import logging, sys; logging.basicConfig(format='%(message)s')\n"
        "sys.modules['tensorboard'] = None\n"
        "from pathlib import Path; from mochi.runtime.tensorboard import write_events\n"
        "for name in 'aabb': write_events(Path(sys.argv[1]) / name, {'epoch': 0, 'loss': 1.0})"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith("no TensorBoard events are written (")
    assert "mochi-pipeline[tensorboard]" in line
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_the_events_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    code = (
        "import logging, resource, sys; logging.basicConfig(format='%(message)s')\n"
        "from pathlib import Path; from mochi.runtime.tensorboard import write_events, write_step\n"
        "events = Path(sys.argv[1]) / 'events'\n"
        "write_events(events, {'epoch': 0, 'loss': 1.0})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "for step in range(3): write_step(events, step, {'loss': 1.0}); write_step(events / 'x', step, {})"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == f"{tmp_path}/events: no more TensorBoard events are written: File too large\n"


def test_a_training_logs_points_within_epochs_and_its_views_once(
    tiny: Experiment, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_data, tmp_path / "data" / tiny_data.name)
    of_run = ["--config", str(FILE), "--method", "mochi-16-24-8", "--seed", "0"]
    assert run("pretrain", *of_run).returncode == 0
    folder = Paths(tiny.name).log("mochi-16-24-8", 0, "tensorboard-pretrain")
    events = reader.EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    points = events.Scalars("step/loss")
    assert [point.step for point in points] == list(range(10)), "two epochs of five steps"
    with (Paths(tiny.name).pretrain("mochi-16-24-8", 0) / "metrics.csv").open() as file:
        epochs = [float(row["loss"]) for row in csv.DictReader(file)]
    means = [sum(point.value for point in points[first : first + 5]) / 5 for first in (0, 5)]
    assert means == pytest.approx(epochs, rel=1e-5)
    (views,) = events.Images("views")
    size = tiny.augmentation.image_size
    assert (views.width, views.height) == (8 * size, 2 * size)
