"""GPUs are assigned by locks: no GPU has two jobs of a host at once.

GPUs are names only (CUDA_VISIBLE_DEVICES), so no hardware is needed; jobs are real processes that record
when they had which GPU.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mochi.errors import UserError
from mochi.runtime import gpus
from tests.commands import refused
from tests.tiny import FILE

# Claims GPUs, records (names, start, end), and keeps the claim across an exec, as `on_gpus` does.
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


def test_no_gpu_has_two_jobs_and_none_is_idle_while_a_job_waits(tmp_path: Path) -> None:
    notes = [tmp_path / f"{index}.json" for index in range(4)]
    jobs = [start(1, tmp_path / "locks", note, 0.5, "0,1") for note in notes]
    assert [job.wait(30) for job in jobs] == [0] * 4
    held = sorted((json.loads(note.read_text()) for note in notes), key=lambda row: row[1])
    for name in ("0", "1"):
        spans = [(begin, end) for names, begin, end in held if names == [name]]
        assert len(spans) == 2
        assert spans[0][1] <= spans[1][0]
    assert held[1][1] < held[0][2], "the second job waited although a GPU was free"


def test_a_job_for_all_gpus_is_not_starved_by_jobs_for_one(tmp_path: Path) -> None:
    first, both, last = (tmp_path / name for name in ("first", "both", "last"))
    jobs = [start(1, tmp_path / "locks", first, 1.0, "0,1")]
    time.sleep(0.5)
    jobs.append(start(2, tmp_path / "locks", both, 0.1, "0,1"))
    time.sleep(0.4)
    jobs.append(start(1, tmp_path / "locks", last, 0.1, "0,1"))
    assert [job.wait(30) for job in jobs] == [0] * 3
    assert sorted(json.loads(both.read_text())[0]) == ["0", "1"]
    assert json.loads(last.read_text())[1] >= json.loads(both.read_text())[1]


def test_a_killed_job_releases_its_gpu(tmp_path: Path) -> None:
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


def test_requesting_too_many_gpus_names_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found 2 on this host \(0, 1\); 3 are requested"):
        gpus.claim(3, ["0", "1"], tmp_path)


@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_a_second_user_can_open_the_locks(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        locks = tmp_path / "locks"
        gpus.claim(1, ["0"], locks)
    finally:
        os.umask(before)
    assert locks.stat().st_mode & 0o7777 == 0o1777
    assert {path.name for path in locks.iterdir()} == {"gate.lock", "0.lock"}
    assert {path.stat().st_mode & 0o777 for path in locks.iterdir()} == {0o644}


def test_waiting_for_a_gpu_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpus, "_NOTICE_SECONDS", 0.3)
    caplog.set_level("INFO")
    locks = tmp_path / "locks"
    assert gpus.claim(1, ["7"], locks) == ["7"]
    assert caplog.text == ""
    job = start(1, locks, tmp_path / "note", 1.5, "0")
    while not (locks / "0.lock").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    assert gpus.claim(1, ["0"], locks) == ["0"]
    assert job.wait(30) == 0
    assert caplog.text.count("waiting for 1 of the GPUs 0: other runs use them") == 1


def test_gpus_that_others_use_are_taken_last_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """nvidia-smi's numbers; `[N/A]` and less than a tenth of the memory are no use by others."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --query-gpu=uuid,memory.used,memory.total ] || exit 1\n'
        "echo 'GPU-a, 70000, 81559'\necho 'GPU-b, 600, 81559'\necho 'GPU-c, [N/A], [N/A]'\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    locks = tmp_path / "locks"
    assert gpus.claim(2, ["GPU-a", "GPU-b", "GPU-c"], locks) == ["GPU-b", "GPU-c"]
    assert caplog.text == ""
    assert gpus.claim(1, ["GPU-a"], locks) == ["GPU-a"]
    assert "GPU-a: other processes use 70000 of 81559 MiB of its memory" in caplog.text
    fake.write_text("#!/bin/sh\necho broken; exit 9\n")
    assert gpus.claim(1, ["GPU-d"], locks) == ["GPU-d"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23 GiB of "
                "which 1.10 GiB is free. Of the allocated memory 21 GiB is allocated by PyTorch."
            ),
            "of which 1.10 GiB is free; expected room",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "lower the batch",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory"),
            "batch",
        ),
        (
            RuntimeError(
                "CUDA error: no kernel image is available for execution on the device\nSearch for"
            ),
            "on the device: this torch has no kernels for this card; `mochi check`",
        ),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "another process"),
    ],
)
def test_errors_of_a_gpu_are_explained_without_a_traceback(
    error: RuntimeError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mochi.pretraining.stage.run", fails)
    monkeypatch.setattr("mochi.cli._work", lambda *_: nullcontext((Path("work"), Path("logs"))))
    monkeypatch.setattr("mochi.cli._is_done", lambda *_: False)
    text = refused("pretrain", "--config", str(FILE), "--method", "random-init", "--seed", "0")
    assert message in text
    assert "Of the allocated" not in text
    assert gpus.reason(RuntimeError("CUDA error: device-side assert triggered")) is None
    assert gpus.reason(RuntimeError()) is None


LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa-1)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-aaab-2)
  MIG 3g.40gb     Device  0: (UUID: MIG-cc)
  MIG 3g.40gb     Device  1: (UUID: MIG-dd)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-eeee-3)
"""


@pytest.mark.parametrize(
    ("allowed", "with_driver", "without"),
    [
        (None, ["GPU-aaaa-1", "MIG-cc", "MIG-dd", "GPU-eeee-3"], []),
        ("", [], []),
        ("-1", [], []),
        ("NoDevFiles", [], []),
        ("0", ["GPU-aaaa-1"], ["0"]),
        (" 2, GPU-aaaa ", ["GPU-eeee-3", "GPU-aaaa-1"], ["2", "GPU-aaaa"]),
        ("0,GPU-aaaa-1", ["GPU-aaaa-1"], ["0", "GPU-aaaa-1"]),
        ("1", ["MIG-cc"], ["1"]),
        ("MIG-dd", ["MIG-dd"], ["MIG-dd"]),
        ("2,-1,0", ["GPU-eeee-3"], ["2"]),
        ("0,3,2", ["GPU-aaaa-1"], ["0", "3", "2"]),
        ("GPU-", [], []),  # matches several
    ],
)
def test_a_visible_gpu_has_one_name_for_all_spellings(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    allowed: str | None,
    with_driver: list[str],
    without: list[str],
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.visible() == without
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\nwhile IFS= read -r line; do echo \"$line\"; done <<'END'\n{LISTED}END\n")
    fake.chmod(0o755)
    assert gpus.visible() == with_driver


@pytest.mark.parametrize(
    ("script", "devices", "expected", "message"),
    [
        (
            "echo 'NVIDIA-SMI has failed because it could not reach the driver'; exit 9",
            0,
            [],
            "could not reach",
        ),
        ("echo broken >&2; exit 1", 2, ["0", "1"], "failed: broken; assuming 2 GPUs, as in /dev"),
        ("exec sleep 60", 1, ["0"], "gave no answer in 0.2 s"),
        (None, 1, ["0"], "cannot be started"),
        (None, 0, [], ""),
        ("echo 'GPU 0: A (UUID: GPU-aa)'", 0, ["GPU-aa"], ""),
        ("printf 'GPU 0: A (UUID: GPU-aa)\\n  MIG 1g (UUID: MIG-bb)\\n'", 0, ["MIG-bb"], ""),
    ],
)
def test_nvidia_smi_may_be_slow_missing_or_broken(
    script: str | None,
    devices: int,
    expected: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every job of a workflow calls it; none may wait for ever or run elsewhere without a message."""
    for number in range(devices):
        (tmp_path / f"nvidia{number}").touch()
    (tmp_path / "nvidiactl").touch()
    if script is not None:
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "_DEVICES", tmp_path)
    monkeypatch.setattr(gpus, "_ANSWER_SECONDS", 0.2 if message.startswith("gave") else 30)
    gpus._warn_once.cache_clear()
    assert gpus.visible() == expected
    assert message in caplog.text
    assert bool(message) == bool(caplog.text)
    for spelled, seen in (("", []), ("-1", []), ("99", [] if expected else ["99"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", spelled)
        assert gpus.visible() == seen, spelled
