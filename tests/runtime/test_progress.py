"""Verdicts in the cases that people ask about, and the stop at the first loss that is no number."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from mochi.runtime.progress import NonFiniteError, Progress, check_finite, verdict


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "learning"),
        ({"loss": math.log(65537)}, "at chance"),
        ({"queue_fill": 0.5, "loss": 20.0}, "queue filling (50%): a rising loss is normal"),
        ({"spread": 0.001}, "collapsed"),
    ],
)
def test_verdicts(changes: dict[str, float], words: str) -> None:
    healthy = {"loss": 7.0, "chance": math.log(65537), "spread": 0.088, "queue_fill": 1.0, "dim": 128}
    assert verdict(**(healthy | changes)).startswith(words)  # type: ignore[arg-type]


def test_a_loss_that_is_no_number_stops_with_step_rate_and_checkpoint(tmp_path: Path) -> None:
    saved = tmp_path / "last.safetensors"
    check_finite(1.0, step=3, lr=0.1, last_good=saved)
    with pytest.raises(NonFiniteError, match=r"nan at step 3 \(learning rate 0\.1\).*none yet"):
        check_finite(math.nan, step=3, lr=0.1, last_good=saved)
    saved.touch()
    with pytest.raises(NonFiniteError, match=str(saved)):
        check_finite(math.inf, step=3, lr=0.1, last_good=saved)


def test_parameters_that_are_no_numbers_stop_too(tmp_path: Path) -> None:
    """With a loss that knows nothing of it yet."""
    check_finite(1.0, step=3, lr=0.1, last_good=tmp_path, norm=7.0)
    with pytest.raises(NonFiniteError, match=r"parameters is inf at step 3 \(learning rate 0\.1\)"):
        check_finite(1.0, step=3, lr=0.1, last_good=tmp_path, norm=math.inf)


def test_showing_progress_needs_no_torch() -> None:
    """Preparation shows it, and torch would take longer to import than a small set to prepare."""
    code = "import sys, mochi.runtime.progress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_progress_in_a_log_is_plain_lines_with_an_eta(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", total=3, every_seconds=0) as progress:
        for _ in range(3):
            progress.advance("loss 1.0")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("train: 1/3, 0:00:0")
    assert lines[-1] == "train: 3/3, 0:00:00 left, loss 1.0"
