"""A lock of one process, tried by a second one and released by a kill."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mochi.errors import UserError
from mochi.runtime.locks import lock_until_exit, locked
from tests.project import Project

HOLD = """
import sys, time
from pathlib import Path
from mochi.runtime.locks import lock_until_exit
lock_until_exit(Path(sys.argv[1]))
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
    with pytest.raises(UserError, match=rf"held by process {first.pid} on .*; expected no other"):
        lock_until_exit(lock)
    first.send_signal(signal.SIGKILL)
    first.wait(30)
    second = holder(lock, "pass")
    assert second.wait(30) == 0


def test_a_refused_process_does_not_overwrite_the_name_of_the_holder(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    first = holder(lock)
    try:
        for _ in range(2):
            with pytest.raises(UserError, match=rf"held by process {first.pid} on "):
                lock_until_exit(lock)
    finally:
        first.kill()
        first.wait(30)


@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_a_second_user_can_open_the_lock(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        lock_until_exit(tmp_path / "run.lock")
    finally:
        os.umask(before)
    assert (tmp_path / "run.lock").stat().st_mode & 0o777 == 0o666


def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock_until_exit(tmp_path / "run.lock")
    with locked(tmp_path / "work"):
        pass
    assert caplog.text.count("cannot lock (No locks available)") == 2


def test_a_second_snakemake_stops_at_once_and_says_why(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    process = holder(project.folder / ".snakemake" / "run.lock")
    try:
        begin = time.monotonic()
        done = project.snakemake("--forcerun", "report")
        assert time.monotonic() - begin < 30
        assert done.returncode == 1
        assert f"held by process {process.pid}" in done.stdout + done.stderr
        assert "finished job" not in (done.stdout + done.stderr).lower()
        # A dry run writes nothing and needs no lock.
        assert project.jobs() == {}
    finally:
        process.kill()
        process.wait(30)


def test_a_run_is_locked_until_its_process_ends(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    script = (
        "import sys, time; from pathlib import Path; from mochi.runtime.locks import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", script, str(work)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"found process {first.pid} on .* at work on this run"),
            locked(work, wait_seconds=0.3),
        ):
            raise AssertionError
        first.kill()
    for _ in range(2):
        with locked(work, wait_seconds=5):
            assert list(work.iterdir()) == []
    assert list(tmp_path.iterdir()) == [work]


def test_a_waiting_process_gets_the_lock_when_the_other_removes_its_folders(tmp_path: Path) -> None:
    """It was told that the file system cannot lock, and computed the same again without a lock."""
    script = (
        "import shutil, sys, time; from pathlib import Path; from mochi.runtime.locks import locked\n"
        "work = Path(sys.argv[1])\n"
        "with locked(work): print('held', flush=True); time.sleep(0.5)\n"
        "shutil.rmtree(work.parent)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    for number in range(5):
        work = tmp_path / str(number) / "work"
        work.mkdir(parents=True)
        command = [sys.executable, "-c", script, str(work)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as first:
            assert first.stdout is not None
            assert first.stdout.readline() == "held\n"
            with locked(work, wait_seconds=10):
                assert work.with_name(".work.lock").exists()


def test_a_forked_worker_neither_releases_nor_keeps_the_lock(tmp_path: Path) -> None:
    """Loading workers are forked: one that ends does not release the lock; one that survives a kill does
    not have it.
    """
    work = tmp_path / "work"
    script = (
        "import os, sys, time; from pathlib import Path; from mochi.runtime.locks import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    if os.fork() == 0: sys.exit()\n"
        "    os.wait()\n"
        "    if os.fork() == 0: time.sleep(60)\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(work)],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE, start_new_session=True, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            with pytest.raises(UserError, match="at work on this run"), locked(work, wait_seconds=0.3):
                raise AssertionError
            process.kill()
            with locked(work, wait_seconds=5):
                pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)
