"""provenance.json describes how a result was made; the commit is that of the sources, in a repository
made here.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mochi
from mochi.config import Experiment
from mochi.provenance import wanted
from mochi.provenance.fingerprint import file_digest
from mochi.provenance.record import Stopwatch, hardware, write_record
from mochi.provenance.wanted import Result
from tests.tiny import MOCHI


def test_a_record_names_everything_that_decides_a_number(tiny: Experiment, tmp_path: Path) -> None:
    """It is written in a temporary folder, and describes the folder that the files are moved to."""
    (tmp_path / "encoder").write_bytes(b"weights")
    (tmp_path / "new").mkdir()
    outputs = [tmp_path / "new" / name for name in ("metrics.json", "confusion.csv")]
    for path in outputs:
        path.write_text(path.name)
    result = Result(
        **{**vars(wanted.evaluated(tiny, MOCHI, 1, "knn")), "inputs": {"encoder": tmp_path / "encoder"}}
    )
    write_record(tmp_path / "new", result, Stopwatch(), precision="float32", wall_seconds=7.5)
    written = json.loads((tmp_path / "new/provenance.json").read_text())
    assert (written["stage"], written["result"]) == ("evaluate", f"{MOCHI} seed 1 knn")
    assert written["settings"] == result.settings
    assert (written["settings_digest"], written["code_digest"]) == (
        result.settings_digest,
        result.code_digest,
    )
    sha256 = file_digest(tmp_path / "encoder")
    assert written["inputs"] == {"encoder": {"path": str(tmp_path / "encoder"), "sha256": sha256}}
    assert written["outputs"] == {path.name: file_digest(path) for path in outputs}
    assert written["versions"]["python"] == platform.python_version()
    assert torch.__version__.startswith(written["versions"]["torch"])
    assert written["hardware"]["threads"] == torch.get_num_threads()
    assert (written["precision"], written["wall_seconds"]) == ("float32", 7.5)


ASK = """
import sys
from pathlib import Path
from mochi.provenance.record import Stopwatch, write_record
from mochi.provenance.wanted import Result

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
modules = ("mochi.stages",)
write_record(folder, Result("knn", "knn", folder, (), {}, {}, modules), Stopwatch())
"""


def recorded_git(clone: Path) -> dict[str, Any] | None:
    """What the provenance of a result says about the repository around the package in `clone`."""
    environment = {**os.environ, "PYTHONPATH": str(clone), "PYTHONDONTWRITEBYTECODE": "1"}
    out = clone.parent / "out"
    subprocess.run([sys.executable, "-c", ASK, str(out)], cwd=clone.parent, env=environment, check=True)
    content: dict[str, Any] = json.loads((out / "provenance.json").read_text())
    found: dict[str, Any] | None = content["git"]
    return found


def git(clone: Path, *arguments: str) -> str:
    name = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", "-C", str(clone), *name, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_commit_and_whether_the_sources_differ_from_it(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    sources = Path(mochi.__file__).parent
    shutil.copytree(sources, clone / "mochi", ignore=shutil.ignore_patterns("__pycache__", "data"))
    assert recorded_git(clone) is None, "a tarball has no commit"

    (clone / "results").mkdir()
    (clone / "results/scores.csv").write_text("old\n")
    git(clone, "init", "--quiet")
    git(clone, "add", "--all")
    git(clone, "commit", "--quiet", "--message", "All")
    clean = {"commit": git(clone, "rev-parse", "HEAD"), "dirty": False}
    assert recorded_git(clone) == clean

    # Results change while they are computed, and untracked files are not sources.
    (clone / "results/scores.csv").write_text("new\n")
    (clone / "notes.txt").write_text("")
    assert recorded_git(clone) == clean

    with (clone / "mochi/stages.py").open("a") as file:
        file.write("\n# edited\n")
    assert recorded_git(clone) == {**clean, "dirty": True}


@pytest.mark.parametrize(
    ("environment", "used"),
    [({}, ["card 0"]), ({"LOCAL_WORLD_SIZE": "2"}, ["card 0", "card 1"]), ({"MOCHI_DEVICE": "cpu"}, [])],
)
def test_only_gpus_that_were_used_are_recorded(
    environment: dict[str, str], used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "MOCHI_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    assert hardware()["gpus"] == used
