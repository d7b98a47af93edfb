"""Events as TensorBoard reads them back, and a training that goes on without tensorboard."""

import subprocess
import sys
from pathlib import Path

import pytest

from mochi.runtime.tensorboard import write_events


def test_the_numbers_of_each_epoch_are_events(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for epoch in (0, 1):
        write_events(tmp_path / "events", {"epoch": epoch, "loss": 2.0 - epoch, "status": "learning"})
    write_events(None, {"epoch": 2})
    events = reader.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"epoch", "loss"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 2.0), (1, 1.0)]


def test_without_tensorboard_one_line_says_so(tmp_path: Path) -> None:
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
