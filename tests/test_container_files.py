"""The container's files, tested without a container: linted, and the entry point run by itself."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.project import ROOT

ENTRYPOINT = ROOT / "container" / "entrypoint.sh"


def run_entrypoint(folder: Path, free_mib: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run the entry point in a folder, with a `df` that reports the given free shared memory."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "df").write_text(f"#!/bin/sh\necho header\necho shm 1 2 {free_mib} 4 /dev/shm\n")
    (tools / "df").chmod(0o755)
    return subprocess.run(
        [str(ENTRYPOINT), *command],
        cwd=folder, env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_dockerfile_passes_the_linter() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [str(linter), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_dockerfile_builds_with_older_engines() -> None:
    """No heredoc and no `COPY --link`: buildah 1.28 of Debian 12 has neither."""
    text = (ROOT / "Dockerfile").read_text()
    assert "--link" not in text
    assert not re.search(r"<<-?\s*['\"]?\w+", text)


@pytest.mark.parametrize(("free", "warned"), [(64, True), (1023, True), (1024, False)])
def test_little_shared_memory_gives_a_warning_and_the_command_runs(
    tmp_path: Path, free: int, warned: bool
) -> None:
    done = run_entrypoint(tmp_path, free, "echo", "two words")
    assert done.stdout == "two words\n"
    assert (f"has {free} MiB free" in done.stderr) == warned
    assert ("--ipc=host" in done.stderr) == warned


def test_the_entry_point_is_replaced_by_the_command(tmp_path: Path) -> None:
    assert run_entrypoint(tmp_path, 4096, "sh", "-c", "exit 7").returncode == 7


def test_a_folder_that_cannot_be_written_gives_a_warning(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to run as a user who cannot write")
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run(
        ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", str(ENTRYPOINT), "true"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "uid 12345 cannot write" in done.stderr
    assert '--user "$(id -u):$(id -g)"' in done.stderr


def test_compose_does_what_the_documented_command_does() -> None:
    text = (ROOT / "docs/container.md").read_text()
    command = shlex.split(next(line for line in text.splitlines() if line.startswith("docker run")))
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["mochi"]
    assert service["gpus"] == command[command.index("--gpus") + 1]
    assert f"--ipc={service['ipc']}" in command
    (mounted,) = service["volumes"]
    assert mounted.replace(".:", "$PWD:") == command[command.index("-v") + 1]
    assert service["image"] == command[command.index("-v") + 2]
    assert service["command"] == command[command.index("-v") + 3 :]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"STOPSIGNAL {service['stop_signal']}" in dockerfile


def test_data_results_and_caches_are_not_copied_into_the_image() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", "data", "results", "work", "logs", ".snakemake"} <= set(ignored)
