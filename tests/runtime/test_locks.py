"""One workflow at a time in a folder: a lock held by one process, against a second one and a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mochi.errors import UserError
from mochi.runtime.locks import hold, holding
from tests.project import Project

HOLD = """
import sys, time
from pathlib import Path
from mochi.runtime.locks import hold
hold(Path(sys.argv[1]))
"""


def holder(lock: Path, then: str = "time.sleep(60)") -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + then, str(lock)],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    deadline = time.monotonic() + 30
    while not (lock.exists() and lock.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    first = holder(lock)
    with pytest.raises(UserError, match=rf"held by process {first.pid} on .*; one workflow at a time"):
        hold(lock)
    first.send_signal(signal.SIGKILL)
    first.wait(30)
    second = holder(lock, "pass")
    assert second.wait(30) == 0


def test_a_second_snakemake_refuses_at_once_and_says_why(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    process = holder(project.folder / ".snakemake" / "run.lock")
    try:
        begin = time.monotonic()
        done = project.snakemake("--forcerun", "tables")
        assert time.monotonic() - begin < 30
        assert done.returncode == 1
        assert f"held by process {process.pid}" in done.stdout + done.stderr
        assert "finished job" not in (done.stdout + done.stderr).lower()
        # Looking is allowed.
        assert project.jobs() == {}
    finally:
        process.kill()
        process.wait(30)


def test_a_run_is_held_by_one_process_and_free_once_that_is_gone(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    script = (
        "import sys, time; from pathlib import Path; from mochi.runtime.locks import holding\n"
        "with holding(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", script, str(work)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match="another process at work on this run"),
            holding(work, wait_seconds=0.3),
        ):
            raise AssertionError
        first.kill()
    for _ in range(2):
        with holding(work, wait_seconds=5):
            assert list(work.iterdir()) == []
