"""Every stage on a full file system: finished results stay intact, and one line names the folder.

The file system is a real one, a tmpfs in a separate mount namespace; without the right to mount it, the
tests are skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.detection.sets import tiny_with_detection

ROOT = Path(__file__).parents[1]
RUN = ("--method", "random-init", "--seed", "0")
STAGES = {
    "prepare": ("prepare",),
    "scenes": ("scenes", "data/few-scenes"),
    "pretrain": ("pretrain", *RUN),
    "evaluate": ("evaluate", "linear", *RUN),
    "detect": ("detect", "few", *RUN),
    "report": ("report",),
}
MOUNT = 'mount -t tmpfs -o size=99m none "$1" && cp -a "$2"/. "$1" && cd "$1" || exit 99'

# Runs `python $6... ` with $3 kB free, and compares the finished files before and after.
ON_A_FULL_DISK = f"""
{MOUNT}
hashes() {{ find config data results -type f | sort | tr '\\n' '\\0' | xargs -0 sha256sum; }}
sed -i "s/$4/$5/" config/config.yaml
before=$(hashes)
used=$(df -k --output=used . | tail -1)
mount -o remount,size=$((used + $3))k "$1"
shift 5
"$@"; code=$?
[ "$before" = "$(hashes)" ] || echo "FINISHED FILES CHANGED"
exit $code
"""

UNCHECKED = """
import mochi.storage.atomic
mochi.storage.atomic.require_space = lambda needed: None  # as if others filled the disk meanwhile
from mochi.cli import main
main()
"""


def mounted(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "--map-root-user", "--mount", "bash", "-c", script, "bash", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, done."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "workflow").symlink_to(ROOT / "workflow")
    (folder / "config").mkdir()
    (folder / "config/config.yaml").write_text(yaml.safe_dump(tiny_with_detection()))
    if mounted(MOUNT, str(tmp_path_factory.mktemp("empty")), str(folder)).returncode:
        pytest.skip("this user may not mount a file system")
    for command in STAGES.values():
        done = subprocess.run(
            [sys.executable, "-m", "mochi", *command],
            cwd=folder, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder


# What changes the result, and kB that are free when the stage begins.
CASES = [
    ("prepare", "seed: 0", "seed: 1", (0, 60, 190)),
    ("scenes", "seed: 0", "seed: 1", (0, 40, 120)),
    ("pretrain", "width: 8", "width: 12", (0, 200)),
    ("evaluate", "epochs: 5", "epochs: 6", (0,)),
    ("detect", "iterations: 4", "iterations: 5", (0, 60, 120)),
    ("report", "title: Tiny", "title: Small", (0, 60)),
]


@pytest.mark.parametrize(
    ("stage", "old", "new", "free"), [(*case[:3], free) for case in CASES for free in case[3]]
)
def test_a_disk_that_fills_during_a_stage(
    project: Path, tmp_path: Path, stage: str, old: str, new: str, free: int
) -> None:
    changed = (str(tmp_path), str(project), str(free), old, new)
    done = mounted(ON_A_FULL_DISK, *changed, sys.executable, "-c", UNCHECKED, *STAGES[stage])
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert "FINISHED" not in done.stdout
    (message,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "No space left on device" in message
    assert "ree disk space" in message
    assert any(f" {folder}/" in message for folder in ("data", "results", "work"))


@pytest.mark.parametrize("stage", ["prepare", "scenes", "pretrain", "evaluate", "detect"])
def test_a_disk_that_is_too_full_before_a_stage(project: Path, tmp_path: Path, stage: str) -> None:
    _, old, new, _ = next(case for case in CASES if case[0] == stage)
    changed = (str(tmp_path), str(project), "500", old, new)
    done = mounted(ON_A_FULL_DISK, *changed, sys.executable, "-m", "mochi", *STAGES[stage])
    assert done.returncode == 1, done
    assert "FINISHED" not in done.stdout
    assert "MB of free disk space; expected" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")
