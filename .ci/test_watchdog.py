"""A rank is killed, stopped, fails or never starts: the others end within a minute with the reason."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each rank runs: rank 1 does `sys.argv[1]`, while rank 0 waits for it in a collective operation.
RANK = """
import os, signal, sys, time
import torch, torch.distributed as dist
from mochi.cli import main
from mochi.runtime import watchdog
from mochi.runtime.distributed import process_group
import mochi.cli
watchdog.START_SECONDS, watchdog.RANK_SECONDS, watchdog._BEAT_SECONDS = 10.0, 5.0, 0.3

def work(prog_name):
    event = sys.argv[1] if os.environ["RANK"] == "1" else ""
    if event == "never starts":
        time.sleep(100)
    with process_group(torch.device("cpu")):
        dist.all_reduce(torch.ones(1))
        if event == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if event == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "fails":
            raise mochi.cli.UserError("this image is broken")
        if sys.argv[1] == "all is well":
            time.sleep(0.5 if os.environ["RANK"] == "0" else 0)
        else:
            dist.all_reduce(torch.ones(1))
    sys.stderr.write("done\\n")

mochi.cli.app = work
main()
"""


def torchrun(tmp_path: Path, event: str) -> tuple[int, str, float]:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [*command, str(script), event],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stderr, time.monotonic() - start


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ("never starts", "error: rank 0 of 2: rank 1 did not start within 10 s"),
        ("stops", "error: rank 0 of 2: rank 1 sent no heartbeat for 5 s"),
        ("dies", "Signal 9 (SIGKILL)"),
        ("fails", "error: this image is broken"),
    ],
)
def test_a_rank_that_is_missing_ends_the_others(tmp_path: Path, event: str, message: str) -> None:
    code, text, seconds = torchrun(tmp_path, event)
    assert code != 0
    assert message in text
    assert "done" not in text
    assert seconds < 60


def test_ranks_may_end_at_different_times(tmp_path: Path) -> None:
    code, text, _ = torchrun(tmp_path, "all is well")
    assert code == 0, text
    assert text.count("done") == 2
