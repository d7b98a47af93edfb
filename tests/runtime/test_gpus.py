"""GPUs handed out by locks: jobs of one host against the rule that no GPU serves two of them at once.

The GPUs are names only (CUDA_VISIBLE_DEVICES), so no hardware is needed; the jobs are real processes that
note when they held which name.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mochi.errors import UserError
from mochi.runtime import gpus

# Claims, notes (names, start, end), and holds the claim across an exec, as `on_gpus` does.
JOB = """
import json, os, sys, time
from pathlib import Path
from mochi.runtime import gpus
count, folder, note, hold = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
taken = gpus.claim(count, gpus.visible(), folder)
rest = "import json,sys,time; s=time.time(); time.sleep(float(sys.argv[3])); " \\
    "open(sys.argv[1],'w').write(json.dumps([json.loads(sys.argv[2]), s, time.time()]))"
os.execv(sys.executable, [sys.executable, "-c", rest, note, json.dumps(taken), hold])
"""


def start(count: int, folder: Path, note: Path, hold: float, names: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", JOB, str(count), str(folder), str(note), str(hold)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": names, "PYTHONPATH": str(Path.cwd())},
    )


def test_no_gpu_serves_two_jobs_and_none_idles_while_a_job_waits(tmp_path: Path) -> None:
    notes = [tmp_path / f"{index}.json" for index in range(4)]
    jobs = [start(1, tmp_path / "locks", note, 0.5, "0,1") for note in notes]
    assert [job.wait(30) for job in jobs] == [0] * 4
    held = sorted((json.loads(note.read_text()) for note in notes), key=lambda row: row[1])
    for name in ("0", "1"):
        spans = [(begin, end) for names, begin, end in held if names == [name]]
        assert len(spans) == 2
        assert spans[0][1] <= spans[1][0]
    assert held[1][1] < held[0][2], "the second job waited although a GPU was free"


def test_a_job_that_wants_all_is_not_starved_by_those_that_want_one(tmp_path: Path) -> None:
    first, both, last = (tmp_path / name for name in ("first", "both", "last"))
    jobs = [start(1, tmp_path / "locks", first, 1.0, "0,1")]
    time.sleep(0.5)
    jobs.append(start(2, tmp_path / "locks", both, 0.1, "0,1"))
    time.sleep(0.4)
    jobs.append(start(1, tmp_path / "locks", last, 0.1, "0,1"))
    assert [job.wait(30) for job in jobs] == [0] * 3
    assert sorted(json.loads(both.read_text())[0]) == ["0", "1"]
    assert json.loads(last.read_text())[1] >= json.loads(both.read_text())[1]


def test_a_killed_job_gives_its_gpu_back(tmp_path: Path) -> None:
    locks = tmp_path / "locks"
    job = start(1, locks, tmp_path / "never", 60, "0")
    while not (locks / "0.lock").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    job.send_signal(signal.SIGKILL)
    job.wait(30)
    begin = time.monotonic()
    after = start(1, locks, tmp_path / "after", 0, "0")
    assert after.wait(30) == 0
    assert time.monotonic() - begin < 10


def test_asking_for_more_than_there_are_names_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found 2 on this host \(0, 1\); 3 are asked for"):
        gpus.claim(3, ["0", "1"], tmp_path)


def test_visible_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's list wins over the driver's; no driver means none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " 3, GPU-ab ")
    assert gpus.visible() == ["3", "GPU-ab"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.visible() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.visible() == []
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho GPU-1\necho GPU-2\n")
    fake.chmod(0o755)
    assert gpus.visible() == ["GPU-1", "GPU-2"]
