"""provenance.json: command, commit, settings, code, inputs, outputs, versions, hardware, time."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mochi
from mochi.provenance.fingerprint import file_digest
from mochi.provenance.wanted import RECORD, Result
from mochi.storage.atomic import write_json

_PROJECT = Path(mochi.__file__).parents[1]
_VERSIONED = ("torch", "torchvision", "numpy", "pillow", "pyarrow")


class Stopwatch:
    """Wall time of a stage."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Seconds since it was created."""
        return round(time.monotonic() - self._start, 3)


def write_record(new: Path, result: Result, watch: Stopwatch, **extra: Any) -> None:
    """Write the provenance of the files in `new`, which are about to become `result`.

    Args:
        new: folder of the new files.
        result: the result that they become.
        watch: started when the stage began.
        extra: further fields; they may replace `wall_seconds`.
    """
    record = {
        "stage": result.stage,
        "result": result.label,
        "command": _command(),
        "settings": dict(result.settings),
        "settings_digest": result.settings_digest,
        "code_digest": result.code_digest,
        "inputs": {
            name: {"path": str(path), "sha256": file_digest(path)} for name, path in result.inputs.items()
        },
        "outputs": {name: file_digest(new / name) for name in result.outputs},
        "git": _git(),
        "versions": versions(),
        "hardware": hardware(),
        "wall_seconds": watch.seconds(),
        **extra,
    }
    write_json(new / RECORD, record)


def _command() -> list[str]:
    """The command as typed, and the experiment file that the workflow passes by the environment."""
    arguments, config = sys.argv[1:], os.environ.get("MOCHI_CONFIG")
    return [
        "mochi",
        *arguments,
        *(
            ["--config", config]
            if config and not any(each.startswith("--config") for each in arguments)
            else []
        ),
    ]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect numbers."""
    by_package = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            by_package[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return by_package


def other_versions(result: Result) -> list[str]:
    """`torch 2.9.0 (here 2.10.0)` if others computed the result: shown, not a reason to compute again."""
    recorded = json.loads(result.record.read_text(encoding="utf-8")).get("versions", {})
    here = versions()
    return [
        f"{name} {recorded[name]} (here {here[name]})"
        for name in ("torch", "torchvision")
        if name in recorded and name in here and recorded[name] != here[name]
    ]


def hardware() -> dict[str, Any]:
    """The hardware that results and speed depend on."""
    about = {"cpu": _cpu_name(), "cores": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is None:  # a stage that does not use torch
        return about
    # Of this host's ranks, each of which uses one; others may be visible.
    ranks = 0 if os.environ.get("MOCHI_DEVICE") == "cpu" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = [torch.cuda.get_device_name(i) for i in range(min(ranks, torch.cuda.device_count()))]
    return about | {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git() -> dict[str, Any] | None:
    """Commit, and whether tracked files differ from it; None outside a repository (a tarball).

    Results are ignored: those in git change while they are computed.
    """
    try:
        commit = _ask_git("rev-parse", "HEAD")
        changed = _ask_git(
            "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results"
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(changed)}


def _ask_git(*arguments: str) -> str:
    done = subprocess.run(  # noqa: S603
        ["git", "-C", str(_PROJECT), *arguments],  # noqa: S607
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()
