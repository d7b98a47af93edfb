"""Where a number comes from: command, commit, settings, code, data, seed, versions, hardware, time."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import mochi
from mochi.config import Run, digest, settings
from mochi.provenance.fingerprint import code_digest, file_digest

_PACKAGE = Path(mochi.__file__).parent
_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "pyarrow", "scikit-image", "scikit-learn")


class Stopwatch:
    """Wall time of a stage, for its provenance."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Seconds since it was made."""
        return round(time.monotonic() - self._start, 3)


def record(
    stage: str, run: Run, module: str, inputs: Mapping[str, Path], watch: Stopwatch, **extra: Any
) -> dict[str, Any]:
    """The provenance of a stage's results, as JSON.

    Args:
        stage: its name in `settings`.
        run: what was run.
        module: the stage's module, for the code digest.
        inputs: name -> file that was read; its sha256 is recorded.
        watch: started when the stage began.
        extra: what the stage wants to add.
    """
    return {
        "stage": stage,
        "experiment": run.experiment,
        "method": run.method,
        "seed": run.seed,
        "command": ["python", "-m", "mochi", *sys.argv[1:]],
        "settings": settings(run, stage),
        "settings_digest": digest(settings(run, stage)),
        "code_digest": code_digest(module),
        "inputs": {name: {"path": str(path), "sha256": file_digest(path)} for name, path in inputs.items()},
        "git": _git(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "hardware": hardware(),
        "wall_seconds": watch.seconds(),
        **extra,
    }


def hardware() -> dict[str, Any]:
    """The machine, as far as results and speed depend on it."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
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

    Results do not count: those that stand in git change while they are made again.
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
        ["git", "-C", str(_PACKAGE.parent), *arguments],  # noqa: S607
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()
